"""What a value is: one of the wrong kind is named with its place and the way out."""

from __future__ import annotations

import inspect
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, TypeGuard

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn

from lightning_fed.caching import cached

# Both packages are the same code, but neither takes the other's classes.
_OTHER_LIGHTNING = (
    "is of pytorch_lightning, a FederatedTrainer of lightning.pytorch, and neither knows the other's classes: import it"
    " from lightning.pytorch. Where it is somebody else's, let pytorch_lightning be lightning.pytorch before you import"
    ' that: sys.modules["pytorch_lightning"] = lightning.pytorch'
)
# Where a class comes from -> what it is, and where it goes. The first that fits counts.
_ORIGINS = {
    "pytorch_lightning": _OTHER_LIGHTNING,
    "flwr.serverapp.strategy": "is a Flower strategy: write FlowerStrategy({name}(...))",
    "flwr.server.strategy": (
        "is a strategy of NumPyClient's time: take its counterpart of flwr.serverapp.strategy, and write"
        " FlowerStrategy({name}(...))"
    ),
    "flwr.compat.client": (
        "is a Flower client, and here a client is the LightningModule with its own data: pass the module to fit(), its"
        " data by ClientData, and what changes messages as client mods (FlowerStrategy(mods=[...]))"
    ),
    "flwr.clientapp": "is a Flower ClientApp, which the trainer makes of the module: pass the module to fit()",
    "flwr_datasets.partitioner": "is a partitioner: write Partition({name}(...))",
    "lightning.pytorch.loggers": "is a logger: write logger=[{name}(...)]",
    "lightning.pytorch.core.datamodule": "is a datamodule: write fit(datamodule=...)",
    "lightning.pytorch.core.module": "is the module to train: pass it to fit()",
    "lightning.pytorch.strategies": "is a Lightning strategy: leave it out, and choose an engine=",
}


def number_faults(values: Mapping[str, object]) -> list[str]:
    """Return a sentence for each value that is no whole number; ``None`` is for one that was not given."""
    return [
        f"{name}={value!r} must be a whole number."
        for name, value in values.items()
        if value is not None and not is_number(value, whole=True)
    ]


def is_number(value: object, *, whole: bool = False) -> TypeGuard[float]:
    """Return whether a value is a number; ``True`` and ``False`` are none."""
    kind = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool)


def positive_faults(name: str, value: object, rule: str) -> list[str]:
    """Return a sentence, with the rule, if a value is no number above 0."""
    good = is_number(value) and value > 0  # which NaN is not
    return [] if good else [f"{name}={value!r} must be {rule}."]


def path_faults(name: str, value: object, rule: str) -> list[str]:
    """Return a sentence, with the rule, if a value is no path."""
    good = isinstance(value, os.PathLike) or (isinstance(value, str) and value != "")
    return [] if good else [f"{name}={value!r} must be {rule}."]


def switch_faults(values: Mapping[str, object]) -> list[str]:
    """Return a sentence for each value that is neither ``True`` nor ``False``."""
    return [f"{name}={v!r}: write True or False." for name, v in values.items() if not isinstance(v, bool)]


def listed(given: Any) -> list[Any]:
    """Return what was given for a list of callbacks, as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Callback)) else [given]


def callback_faults(place: str, given: Sequence[Any]) -> list[str]:
    """Return a sentence for each entry of a list of callbacks that is none.

    Args:
        place: The argument's name.
        given: Its entries.
    """
    return [f"{place}=[{as_typed(one)}]: {why_not(one)}." for one in given if not isinstance(one, Callback)]


def fit_faults(model: Any, train: Any, datamodule: Any) -> list[str]:
    """Return a sentence for each argument of ``fit`` that is not what its name says."""
    found = []
    if not isinstance(model, LightningModule):
        what = why_not(model) if _origin(model) or inspect.isclass(model) else "is no LightningModule"
        if isinstance(model, nn.Module) and not _origin(model):
            what = "is a torch module without training_step and configure_optimizers: write a LightningModule around it"
        found.append(f"fit(model={as_typed(model)}): {what}.")
    for name, value in (("datamodule", datamodule), ("train_dataloaders", train)):
        wrong = value is not None and not isinstance(value, LightningDataModule) and name == "datamodule"
        if wrong or inspect.isclass(value) or "pytorch_lightning" in _origins(value):
            what = why_not(value) if inspect.isclass(value) or _origin(value) else "is no LightningDataModule"
            found.append(f"fit({name}={as_typed(value)}): {what}.")
    if train is not None and datamodule is not None:
        found.append(
            f"fit(train_dataloaders={as_typed(train)}, datamodule={as_typed(datamodule)}): which of them is to be dealt"
            " out? Pass one of the two."
        )
    return found


def is_of_another_kind(value: Any) -> bool:
    """Return whether a value is a class, or of those that are known to be put where something else is wanted."""
    return inspect.isclass(value) or _origin(value) is not None


def why_not(value: Any) -> str:
    """Return what a value is, where something else is wanted, and the way out."""
    kind = value if inspect.isclass(value) else type(value)
    origin = _origin(value)
    if origin is not None and not (inspect.isclass(value) and origin.startswith("lightning.")):
        return _ORIGINS[origin].format(name=kind.__name__)
    if inspect.isclass(value):
        return f"is a class and not an instance: write {kind.__name__}(...)"
    return f"is a {kind.__name__} and no Lightning callback"


def _origins(value: Any) -> frozenset[str]:
    return _origins_of(value if inspect.isclass(value) else type(value))


@cached(4096)  # asked of each client's data, in each round
def _origins_of(kind: type) -> frozenset[str]:
    modules = {one.__module__ for one in kind.__mro__}
    return frozenset(one for one in _ORIGINS if any(f"{module}.".startswith(f"{one}.") for module in modules))


def _origin(value: Any) -> str | None:
    found = _origins(value)
    return next((origin for origin in _ORIGINS if origin in found), None)


def is_whole(value: Any) -> bool:
    """Return whether something is a whole number: Python's or NumPy's, and no bool."""
    return isinstance(value, SupportsIndex) and not isinstance(value, bool)


def as_typed(value: Any) -> str:
    """Return a value as its user would write it, on one line."""
    if inspect.isclass(value):
        return value.__name__
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    return f"{type(value).__name__}(...)"
