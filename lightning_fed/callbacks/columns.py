"""What examples can be dealt out by: labels and columns of a data set, found without reading an example."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_fed import checks
from lightning_fed.errors import ConfigurationError
from lightning_fed.values.data import labels_of

LABEL_NAMES = ("label", "labels", "target", "targets")
_NAMES = 10  # that an error lists


def columns_of(dataset: Any, labels: Any, wanted: str | None) -> dict[str, np.ndarray[Any, Any]]:
    """Return what a partitioner may deal by, each (n,).

    Args:
        dataset: A map-style dataset, of torch or Hugging Face.
        labels: The labels as the user gave them, or ``None``.
        wanted: The name under which a partitioner asks for the labels, if it asks.
    """
    from datasets import ClassLabel, Value
    from datasets import Dataset as Table

    given = None if labels is None else np.asarray(one_each("labels", labels, dataset))
    if given is not None and given.ndim > 1:
        raise ConfigurationError(
            f"Partition(labels=...) has the shape {given.shape}: one label for each example, a number or a text, is"
            " what examples are dealt out by."
        )
    if given is None and isinstance(dataset, Table):
        cheap = [name for name, kind in dataset.features.items() if isinstance(kind, (Value, ClassLabel))]
        plain = dataset.with_format(None).select_columns(cheap)
        return {name: np.asarray(plain[name][:]) for name in cheap}
    found = labels_of(dataset) if given is None else given
    if found is None:
        return {}
    names = set(LABEL_NAMES)
    if given is not None:  # given by hand, they are what the partitioner asks for
        names.add(wanted or LABEL_NAMES[0])
    return dict.fromkeys(sorted(names), np.asarray(found))


def label_column(dataset: Any, labels: Any, wanted: str | None) -> np.ndarray[Any, Any] | None:
    """Return the label of each example, (n,): that a partitioner asks for, or what is called so."""
    columns = columns_of(dataset, labels, wanted)
    return next((columns[name] for name in (wanted, *LABEL_NAMES) if name in columns), None)


def one_each(argument: str, values: Any, dataset: Any) -> Any:
    """Return what the user gave for each example; that of a function of the data set is asked for.

    Raises:
        ConfigurationError: If it has no length, or another one than the data set.
    """
    what = f"Partition({argument}=...) is a"
    if callable(values):
        values = values(dataset)
        what += " function that gave" if values is None else " function, which gave a"
    if not hasattr(values, "__len__"):
        kind = "None" if values is None else f"{type(values).__name__}, which has no length"
        raise ConfigurationError(f"{what} {kind}: write a list, array or tensor with an entry for each example.")
    if len(values) != len(dataset):
        raise ConfigurationError(
            f"Partition({argument}=...) has {len(values)} entries for {len(dataset)} training examples: write one for"
            " each, in the order of the data set."
        )
    return values


def values_by(dataset: Any, by: Any) -> list[Any]:
    """Return the value of each example by which clients are told apart.

    Args:
        dataset: A map-style dataset, of torch or Hugging Face.
        by: The name of a column or attribute, the values, or a function of the dataset that gives them.

    Raises:
        ConfigurationError: If there is no such column, or an example has no value, or more than one.
    """
    call = f"Partition(by={by!r})" if isinstance(by, str) else "Partition(by=...)"
    found = _column(dataset, by) if isinstance(by, str) else one_each("by", by, dataset)
    if found is None:
        raise ConfigurationError(f"{call}: {_nothing_of(dataset, by)}")
    values = found.tolist() if hasattr(found, "tolist") else [_plain(value) for value in found]
    for example, value in enumerate(values):
        if getattr(value, "ndim", 0) or type(value).__hash__ is None:
            raise ConfigurationError(
                f"{call} has {type(value).__name__} for example {example}: one value for each example, a number, a"
                " text or a tuple of them, is what clients are told apart by."
            )
    if missing := [example for example, value in enumerate(values) if _is_missing(value)]:
        raise ConfigurationError(
            f"{call}: {len(missing)} of {len(values)} training examples have no value (the first is example"
            f" {missing[0]}). Leave them out of the data set with torch.utils.data.Subset, or give each a value."
        )
    return values


def _plain(value: Any) -> Any:
    """Return a tensor or array of one number as the number, which equals others of its kind."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)  # NaN, NaT
    except TypeError:  # pandas.NA
        return True


def _column(dataset: Any, name: str) -> Any:
    """Return a column of a data set, or an attribute with an entry for each example; ``None`` if there is none."""
    if isinstance(dataset, Subset):
        whole = _column(dataset.dataset, name)
        if whole is None:
            return None
        values = list(whole)
        return [values[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_column(part, name) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [value for part in parts for value in part]
    if not _is_table(dataset) and _is_one_each(value := getattr(dataset, name, None), dataset):
        return value
    table = next((table for table in _tables(dataset) if name in _names_in(table)), None)
    if table is None:
        return None
    if hasattr(table, "select_columns"):  # of Hugging Face: with its format, images would be decoded
        table = table.with_format(None).select_columns([name])
    return table[name][:]


def _tables(dataset: Any) -> list[Any]:
    """Return a data set that is a table, or the tables that it holds, with a row for each example."""
    held = getattr(dataset, "__dict__", {}).values()
    return [one for one in (dataset, *held) if _is_table(one) and len(one) == len(dataset)]


def _is_table(thing: Any) -> bool:
    """Return whether a thing is a table of Hugging Face or pandas, or like one."""
    if isinstance(thing, Dataset):  # of torch: its columns' names may be there, but it is asked for examples
        return False
    names = getattr(thing, "column_names", getattr(thing, "columns", None))
    return isinstance(names, Iterable) and hasattr(thing, "__len__") and hasattr(thing, "__getitem__")


def _names_in(table: Any) -> list[str]:
    return [name for name in getattr(table, "column_names", getattr(table, "columns", ())) if isinstance(name, str)]


def _is_one_each(value: Any, dataset: Any) -> bool:
    is_list = hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, Mapping))
    return is_list and len(value) == len(dataset)


def _nothing_of(dataset: Any, name: str) -> str:
    """Say that a data set has no such column, and what it has."""
    names = sorted(_names_of(dataset))
    near = difflib.get_close_matches(name, names)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    has = f"It has {', '.join(map(repr, names[:_NAMES]))}{more}." if names else "It has none."
    return (
        f"the training set, a {type(dataset).__name__}, has no column or attribute {name!r} with a value for each"
        f" example.{meant} {has} Or pass the values themselves: Partition(by=[...])."
    )


def _names_of(dataset: Any) -> set[str]:
    if isinstance(dataset, Subset):
        return _names_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return set.intersection(*map(_names_of, dataset.datasets))
    own = {} if _is_table(dataset) else getattr(dataset, "__dict__", {})
    attributes = {name for name, value in own.items() if name[0] != "_" and _is_one_each(value, dataset)}
    return attributes.union(*map(_names_in, _tables(dataset)))


def require_one_way(partitioner: Any, by: Any, min_examples: Any) -> None:
    """Check what says who has which examples.

    Raises:
        ConfigurationError: If nothing does, two things do, or one is of the wrong kind.
    """
    if partitioner is not None and by is not None:
        raise ConfigurationError(
            f"Partition({checks.as_typed(partitioner)}, by={checks.as_typed(by)}): both say who has which examples:"
            " keep one of them."
        )
    if not (checks.is_number(min_examples, whole=True) and min_examples >= 1):
        raise ConfigurationError(f"Partition(min_examples={min_examples!r}) must be a whole number, at least 1.")
    if by is None and min_examples != 1:
        raise ConfigurationError(
            f"Partition(min_examples={min_examples}) goes with by=: a partitioner has its own (min_partition_size=)."
        )
    if by is not None:
        is_list = hasattr(by, "__len__") and hasattr(by, "__getitem__") and not isinstance(by, Mapping)
        if inspect.isclass(by) or not (is_list or callable(by)):
            raise ConfigurationError(
                f"Partition(by={checks.as_typed(by)}): write the name of a column, or a list, array or tensor with a"
                " value for each example."
            )
    elif checks.is_number(partitioner, whole=True):
        if partitioner < 1:
            raise ConfigurationError(f"num_clients={partitioner} must be at least 1.")
    elif inspect.isclass(partitioner) or not hasattr(partitioner, "load_partition"):
        raise ConfigurationError(
            f"Partition({'' if partitioner is None else checks.as_typed(partitioner)}): write a number of clients, or a"
            " partitioner of flwr_datasets.partitioner, such as Partition(IidPartitioner(num_partitions=10)), or by=,"
            " the column that tells clients apart."
        )
