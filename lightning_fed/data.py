"""A client's slice of a loader or datamodule."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from lightning_fed.errors import ConfigurationError


@dataclass
class ClientLoaders:
    """What one client trains and evaluates on.

    Attributes:
        train: The client's train loader(s); ``None`` when ``datamodule`` gives them.
        val: The client's own held-out part, or ``None``.
        datamodule: A datamodule of the client's own, or ``None``.
        num_examples: The client's training examples; ``None`` where only training tells (a dataset without length).
    """

    train: Any = None
    val: Any = None
    datamodule: LightningDataModule | None = None
    num_examples: int | None = None


def require_sliceable(loader: object) -> DataLoader[Any]:
    """Checks that a train loader can be dealt out among clients by index.

    Raises:
        ConfigurationError: If it is not one DataLoader, or its dataset has no length, or its sampler is tied to the
            whole dataset.
    """
    instead = (
        " Give each client its own loader instead: callbacks=[ClientData(fn)] with fn(client_id) -> DataLoader or"
        " LightningDataModule."
    )
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(
            f"Partition deals out one DataLoader; the training data is a {type(loader).__name__}." + instead
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ConfigurationError(
            f"Partition deals examples out by index, and {type(dataset).__name__} has no length." + instead
        )
    if type(loader.sampler) not in (RandomSampler, SequentialSampler) or not (
        loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    ):
        sampler = loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
        raise ConfigurationError(
            f"Partition cannot deal out a loader whose {type(sampler).__name__} was made for the whole dataset: a"
            " client has only a part of it. Choose the examples with torch.utils.data.Subset and let the DataLoader"
            " shuffle." + instead
        )
    return loader


def slice_loader(
    loader: DataLoader[Any], indices: Sequence[int], *, seed: int, shuffle: bool | None = None
) -> DataLoader[Any]:
    """A loader like ``loader`` (batch size, workers, collate function, subclass, ...) over some of its examples.

    Args:
        loader: A loader that ``require_sliceable`` accepted.
        indices: The examples, by their index in ``loader.dataset``.
        seed: Seeds the shuffling of a loader that came with a generator of its own; any other draws from torch's.
        shuffle: ``False`` also keeps the last, smaller batch; ``None`` does as ``loader`` does.
    """
    part: Dataset[Any] = Subset(loader.dataset, list(indices))
    shuffled = isinstance(loader.sampler, RandomSampler) if shuffle is None else shuffle
    sampler: Sampler[int] = SequentialSampler(part)  # type: ignore[arg-type]
    if shuffled:
        own = getattr(loader.sampler, "generator", None)
        generator = None if own is None else torch.Generator().manual_seed(seed)
        sampler = RandomSampler(part, generator=generator)  # type: ignore[arg-type]
    drop_last = loader.drop_last and shuffle is not False
    # DataLoader refuses to change these attributes, and a subclass may not take them in __init__.
    changed: dict[str, Any] = {"dataset": part, "sampler": sampler, "_iterator": None, "drop_last": drop_last}
    if loader.generator is not None:
        changed["generator"] = torch.Generator().manual_seed(seed)
    if loader.batch_sampler is not None:
        assert loader.batch_size is not None
        changed["batch_sampler"] = BatchSampler(sampler, loader.batch_size, drop_last)
    sliced = copy.copy(loader)
    sliced.__dict__.update(changed)
    return sliced


def count_examples(loader: object) -> int | None:
    """The examples of a loader's dataset, or ``None`` where it has no length."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    return len(dataset)


def labels_of(dataset: object) -> Any:
    """The labels of a map-style dataset without reading its examples, or ``None`` where none are found.

    Looked for in ``.targets`` and ``.labels`` (torchvision), through ``Subset`` and ``ConcatDataset``, and in the last
    tensor of a ``TensorDataset`` if it is one-dimensional and of integers.
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else torch.as_tensor(labels)[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat([torch.as_tensor(part) for part in parts])
    for name in ("targets", "labels"):
        labels = getattr(dataset, name, None)
        if labels is not None and not callable(labels):
            return labels
    if isinstance(dataset, torch.utils.data.TensorDataset):
        last = dataset.tensors[-1]
        return last if last.dim() == 1 and not last.is_floating_point() else None
    return None
