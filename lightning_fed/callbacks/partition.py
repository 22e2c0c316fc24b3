"""Deals the user's train set out among clients with flwr-datasets' partitioners."""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed import checks
from lightning_fed._compat.flwr_datasets import num_partitions, partition_by
from lightning_fed.callbacks.base import PartitionOwner
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_for
from lightning_fed.values.data import ClientLoaders, in_memory, labels_of, require_sliceable, slice_loader

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner
    from matplotlib.figure import Figure

_INDEX = "lightning-fed-index"
# With fewer examples a client, starting worker processes takes longer than reading.
_WORTH_WORKERS = 5000
_LABEL_NAMES = ("label", "labels", "target", "targets")


class Partition(PartitionOwner):
    """Deals the train set out among clients; works on any map-style dataset, of torch or Hugging Face.

    The partitioner runs over a table of labels, shuffled with the run's seed, so no example is read or decoded. Each
    client gets a loader like the user's own over its examples, in the order of the dataset.

    Args:
        partitioner: Any partitioner of ``flwr_datasets.partitioner``, or a number of clients for an IID partition.
        val_fraction: The part of each client's examples held out for its client-side evaluation, in ``[0, 1)``, rounded
            to whole examples; a client always keeps at least one example to train on.
        labels: The label of each example, in the dataset's order, or a function of the dataset that gives them. Needed
            only where they are found neither in ``.targets``, ``.labels``, a column, nor the last tensor. Every example
            has one where the partitioner asks for it.
        cache: Keep what was read of a client in memory, transformed, and read it no more. Only for transforms without
            randomness. Each worker process keeps those of the clients that it served.

    Raises:
        ConfigurationError: If an argument is out of its range.

    >>> from flwr_datasets.partitioner import DirichletPartitioner
    >>> skewed = Partition(DirichletPartitioner(num_partitions=10, partition_by="label", alpha=0.3), val_fraction=0.1)
    >>> skewed.num_clients
    10
    """

    deals_out = True

    def __init__(
        self,
        partitioner: Partitioner | int,
        val_fraction: float = 0.0,
        labels: Sequence[Any] | torch.Tensor | Callable[[Any], Any] | None = None,
        cache: bool = False,
    ) -> None:
        if checks.is_number(partitioner, whole=True):
            if partitioner < 1:
                raise ConfigurationError(f"num_clients={partitioner} must be at least 1.")
            from flwr_datasets.partitioner import IidPartitioner

            partitioner = IidPartitioner(int(partitioner))
        if inspect.isclass(partitioner) or not hasattr(partitioner, "load_partition"):
            raise ConfigurationError(
                f"Partition({checks.as_typed(partitioner)}): write a number of clients, or a partitioner of"
                " flwr_datasets.partitioner, such as Partition(IidPartitioner(num_partitions=10))."
            )
        if not (checks.is_number(val_fraction) and 0 <= val_fraction < 1):
            raise ConfigurationError(f"Partition(val_fraction={val_fraction!r}) must be in [0, 1).")
        self.partitioner: Partitioner = partitioner
        self.val_fraction = val_fraction
        self._labels, self.cache = labels, cache
        self._read: dict[tuple[str, int], Any] = {}
        self._loader: Any = None
        self._dealt: Partitioner | None = None
        self._seed = 0
        self._cache: dict[int, np.ndarray[Any, Any]] = {}

    @property
    def num_clients(self) -> int:
        """How many clients there are; some partitioners know it only once they saw the data."""
        if (count := num_partitions(self.partitioner)) is not None:
            return count
        if self._dealt is None:
            raise ConfigurationError(
                f"{type(self.partitioner).__name__} knows its number of clients only once it saw the data."
            )
        return self._dealt.num_partitions

    def prepare(self, loader: object, seed: int) -> None:
        """See ``PartitionOwner``.

        Raises:
            ConfigurationError: If the loader cannot be sliced, the partitioner does not fit the data, or nobody's
                ``val_fraction`` is one example.
        """
        self._loader, self._seed, self._cache, self._read = require_sliceable(loader), seed, {}, {}
        self._deal(self._loader.dataset)
        self._require_held_out()
        each = len(self._loader.dataset) / self.num_clients
        if self._loader.num_workers and each < _WORTH_WORKERS:
            rank_zero_warn(
                f"DataLoader(num_workers={self._loader.num_workers}) starts that many processes for every client and"
                f" round, to read about {each:.0f} examples each time: num_workers=0 is likely faster."
            )

    def _deal(self, dataset: Any) -> None:
        if self.partitioner.is_dataset_assigned():
            raise ConfigurationError("Partition was given a partitioner that has a dataset already; give it a new one.")
        from datasets import Dataset

        columns = self._columns(dataset)
        self._require_labels(columns)
        order = np.random.default_rng(seed_for(self._seed, "partition")).permutation(len(dataset))
        dealt = copy.deepcopy(self.partitioner)
        dealt.dataset = Dataset.from_dict({_INDEX: order, **{name: column[order] for name, column in columns.items()}})
        self._dealt = dealt
        try:
            self.indices(0)
            if self.num_clients > len(dataset):
                raise ValueError(f"{self.num_clients} clients are too many, some would have none.")
        except (KeyError, ValueError, AttributeError, AssertionError) as error:
            self._dealt = None
            raise ConfigurationError(self._explain(error, len(dataset), list(columns))) from error

    def _explain(self, error: Exception, examples: int, columns: list[str]) -> str:
        name = type(self.partitioner).__name__
        wanted = partition_by(self.partitioner)
        if wanted is not None and wanted not in columns:
            return (
                f"{name}(partition_by={wanted!r}): the training set has no column {wanted!r}; it has"
                f" {columns or 'no labels that can be found'}. Name one of these, or pass the labels:"
                " Partition(..., labels=...)."
            )
        hint = ""
        if "attempts" in str(error):
            hint = (
                " Two ways out: a larger alpha, or a smaller min_partition_size (0 lets clients go without examples)."
            )
        return f"{name} cannot deal out {examples} examples: {error}{hint}"

    def _columns(self, dataset: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Return what a partitioner may deal by, without reading an example."""
        from datasets import ClassLabel, Dataset, Value

        labels = None if self._labels is None else self._given(dataset)
        if labels is None and isinstance(dataset, Dataset):
            cheap = [name for name, kind in dataset.features.items() if isinstance(kind, (Value, ClassLabel))]
            plain = dataset.with_format(None).select_columns(cheap)
            return {name: np.asarray(plain[name][:]) for name in cheap}
        found = labels_of(dataset) if labels is None else labels
        if found is None:
            return {}
        names = set(_LABEL_NAMES)
        if labels is not None:  # given by hand, they are what the partitioner asks for
            names.add(partition_by(self.partitioner, _LABEL_NAMES[0]))
        return dict.fromkeys(sorted(names), np.asarray(found))

    def _given(self, dataset: Any) -> np.ndarray[Any, Any]:
        """Return the labels that the user gave, (n,)."""
        labels: Any = self._labels
        what = "Partition(labels=...) is a"
        if callable(labels):
            labels = labels(dataset)
            what += " function that gave" if labels is None else " function, which gave a"
        if not hasattr(labels, "__len__"):
            kind = "None" if labels is None else f"{type(labels).__name__}, which has no length"
            raise ConfigurationError(f"{what} {kind}: write a list, array or tensor with the label of each example.")
        if len(labels) != len(dataset):
            raise ConfigurationError(f"Partition got {len(labels)} labels for {len(dataset)} training examples.")
        array = np.asarray(labels)
        if array.ndim > 1:
            raise ConfigurationError(
                f"Partition(labels=...) has the shape {array.shape}: one label for each example, a number or a text, is"
                " what examples are dealt out by."
            )
        return array

    def _require_labels(self, columns: dict[str, np.ndarray[Any, Any]]) -> None:
        """Check that every example has what the partitioner deals by."""
        wanted = partition_by(self.partitioner)
        column = columns.get(wanted, np.zeros(0)) if isinstance(wanted, str) else np.zeros(0)
        if column.dtype.kind not in "Of":
            return
        missing = [i for i, label in enumerate(column.tolist()) if label is None or label != label]
        if missing:
            raise ConfigurationError(
                f"{type(self.partitioner).__name__}(partition_by={wanted!r}): {len(missing)} of {len(column)} training"
                f" examples have no {'label' if wanted in _LABEL_NAMES else repr(wanted)} (the first is example"
                f" {missing[0]}). Leave them out of the data set with torch.utils.data.Subset, or give each a label:"
                " Partition(..., labels=...)."
            )

    def _require_held_out(self) -> None:
        """Check that some client has an example to evaluate on, where that is asked for."""
        clients = range(self.num_clients)
        if not self.val_fraction or any(len(self.split(client)[1]) for client in clients):
            return
        most = max(len(self.indices(client)) for client in clients)
        instead = f"s. Write val_fraction={math.ceil(500 / most) / 1000} or more"
        if most == 1:
            instead = ", which it trains on. Write val_fraction=0"
        raise ConfigurationError(
            f"Partition(val_fraction={self.val_fraction!r}) holds nothing out: the largest client has {most}"
            f" example{instead}, or deal out fewer clients."
        )

    def indices(self, client: int) -> np.ndarray[Any, Any]:
        """Return all examples of a client, training and held out: indices into the dataset, int64, ascending."""
        if self._dealt is None:
            raise ConfigurationError("The data has not been dealt out yet: call trainer.fit, or partition.prepare.")
        if client not in self._cache:
            part = self._dealt.load_partition(client)
            self._cache[client] = np.sort(np.asarray(part[_INDEX][:], dtype=np.int64))
        return self._cache[client]

    def split(self, client: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return a client's training and held-out examples: indices into the dataset, int64, ascending."""
        own = self.indices(client)
        held_out = min(int(self.val_fraction * len(own) + 0.5), max(len(own) - 1, 0))
        chosen = np.zeros(len(own), dtype=bool)
        chosen[np.random.default_rng(seed_for(self._seed, "val", client=client)).permutation(len(own))[:held_out]] = (
            True
        )
        return own[~chosen], own[chosen]

    def client(self, client: int, *, round: int) -> ClientLoaders:
        """See ``PartitionOwner``."""
        train, val = (part.tolist() for part in self.split(client))
        seed = seed_for(self._seed, "loader", round=round, client=client)
        return ClientLoaders(
            # After round 1 Lightning starts a fit with two passes; in round 1 the draws are those of a plain Trainer.
            train=self._loader_of("train", client, train, seed=seed, keep_workers=round > 1),
            val=self._loader_of("val", client, val, seed=seed, shuffle=False) if val else None,
        )

    def _loader_of(self, which: str, client: int, indices: list[int], **how: Any) -> Any:
        if self.cache and (which, client) not in self._read:
            self._read[which, client] = in_memory(self._loader, indices)
        return slice_loader(self._loader, indices, part=self._read.get((which, client)), **how)

    def can_evaluate(self) -> bool:
        """Return whether anything is held out."""
        return self.val_fraction > 0

    def sizes(self) -> list[int]:
        """Return the number of training examples of each client."""
        return [len(self.split(client)[0]) for client in range(self.num_clients)]

    def plot(self, path: str | os.PathLike[str] | None = None, **kwargs: Any) -> Figure:
        """Draw each client's label distribution.

        Args:
            path: Where to save the picture, if anywhere.
            **kwargs: As ``flwr_datasets.visualization.plot_label_distributions`` takes them.

        Raises:
            ConfigurationError: If the data has not been dealt out, or has no labels.
        """
        from flwr_datasets.visualization import plot_label_distributions

        self.indices(0)
        assert self._dealt is not None
        columns = self._dealt.dataset.column_names
        label = next((n for n in (partition_by(self.partitioner, ""), *_LABEL_NAMES) if n in columns), None)
        if label is None:
            raise ConfigurationError("Partition.plot() found no labels: pass them, Partition(..., labels=...).")
        few = len(set(self._dealt.dataset[label])) <= 10
        defaults = {"legend": True, "verbose_labels": False, "cmap": "tab10" if few else None}
        figure, axes, _ = plot_label_distributions(self._dealt, label, **{**defaults, **kwargs})
        axes.set_title(kwargs.get("title", "Examples of each client, by label"))
        axes.set_xlabel("client")
        if path is not None:
            figure.savefig(path, dpi=120, bbox_inches="tight")
        return figure
