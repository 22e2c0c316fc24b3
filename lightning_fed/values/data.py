"""A client's slice of a loader or datamodule."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from lightning_fed._compat.torch import LOADERS_WORKERS, has_count
from lightning_fed.errors import ConfigurationError
from lightning_fed.values.part import Part


@dataclass
class ClientLoaders:
    """What one client trains and evaluates on.

    Attributes:
        train: The client's train loader(s); ``None`` when ``datamodule`` gives them.
        val: The client's own held-out part, or ``None``.
        datamodule: A datamodule of the client's own, or ``None``.
    """

    train: Any = None
    val: Any = None
    datamodule: LightningDataModule | None = None

    def has_val(self) -> bool:
        """Return whether there may be something to evaluate on."""
        return self.val is not None or is_overridden("val_dataloader", self.datamodule, LightningDataModule)


def require_sliceable(loader: object) -> DataLoader[Any]:
    """Check that a train loader can be dealt out among clients by index.

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
    batches, sampler = loader.batch_sampler, _sampler(loader)
    if batches is not None and type(batches) is not BatchSampler:
        sampler = batches
    counted = isinstance(sampler, RandomSampler) and has_count(sampler)
    if type(sampler) not in (RandomSampler, SequentialSampler) or counted:
        raise ConfigurationError(
            f"Partition cannot deal out a loader whose {type(sampler).__name__} was made for the whole dataset: a"
            " client has only a part of it. Choose the examples with torch.utils.data.Subset and let the DataLoader"
            " shuffle." + instead
        )
    return loader


def _sampler(loader: DataLoader[Any]) -> Any:
    """Return what orders the examples: with a batch sampler of its own a loader has a ``sampler`` that nobody reads."""
    return loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)


def slice_loader(
    loader: DataLoader[Any],
    indices: Sequence[int],
    *,
    seed: int,
    shuffle: bool | None = None,
    keep_workers: bool = False,
    part: Dataset[Any] | None = None,
) -> DataLoader[Any]:
    """Return a loader like ``loader`` (batch size, workers, collate function, subclass, ...) over some of its examples.

    Args:
        loader: A loader that ``require_sliceable`` accepted.
        indices: The examples, by their index in ``loader.dataset``.
        seed: Seeds the shuffling of a loader that came with a generator of its own; any other draws from torch's.
        shuffle: ``False`` also keeps the last, smaller batch; ``None`` does as ``loader`` does.
        keep_workers: Keep worker processes from one pass to the next.
        part: These examples, where ``in_memory`` has them, or a ``Part`` of another kind.
    """
    part = Part(loader.dataset, list(indices)) if part is None else part
    batches: Any = loader if loader.batch_sampler is None else loader.batch_sampler
    sampler = _sampler_over(part, _sampler(loader), seed, shuffle)
    drop_last = batches.drop_last and shuffle is not False
    # DataLoader refuses to change these attributes, and a subclass may not take them in __init__.
    changed: dict[str, Any] = {"dataset": part, "sampler": sampler, LOADERS_WORKERS: None, "drop_last": drop_last}
    if keep_workers and loader.num_workers:
        changed["persistent_workers"] = True
    if loader.generator is not None:
        changed["generator"] = torch.Generator().manual_seed(seed)
    if loader.batch_sampler is not None:
        changed["batch_sampler"] = BatchSampler(sampler, batches.batch_size, drop_last)
    sliced = copy.copy(loader)
    sliced.__dict__.update(changed)
    return sliced


def _sampler_over(part: Any, like: Any, seed: int, shuffle: bool | None) -> Sampler[int]:
    """Return a sampler over some examples that draws as the one over all does; arguments as ``slice_loader``."""
    shuffled = isinstance(like, RandomSampler) if shuffle is None else shuffle
    if not shuffled or not len(part):  # RandomSampler refuses to shuffle nothing
        return SequentialSampler(part)
    own = getattr(like, "generator", None)
    generator = None if own is None else torch.Generator().manual_seed(seed)
    return RandomSampler(part, getattr(like, "replacement", False), generator=generator)


class _Examples(Dataset[Any]):
    """Examples that have been read."""

    def __init__(self, examples: list[Any]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Any:
        return self._examples[index]


def in_memory(loader: DataLoader[Any], part: Part) -> Dataset[Any]:
    """Return a part of a loader's examples, read now; as tensors where its batches are lists of tensors."""
    examples = [part[i] for i in range(len(part))]
    if examples and type(examples[0]) in (tuple, list) and loader.collate_fn is default_collate:
        with suppress(TypeError, RuntimeError):  # of unequal shapes: that is an error once a batch has two of them
            columns = default_collate(examples)
            if all(type(column) is Tensor for column in columns):
                return TensorDataset(*columns)
    return _Examples(examples)


class Gathered(TensorDataset):
    """A TensorDataset, or a part of one, that gives a batch by one indexing call for each tensor.

    Args:
        tensors: All examples.
        indices: Those that it has, or ``None`` for all.

    Attributes:
        whole: All examples, of which it has only some.
    """

    def __init__(self, tensors: Sequence[Tensor], indices: Sequence[int] | None) -> None:
        self.whole = tensors
        self._indices = None if indices is None else _within(indices, len(tensors[0]))

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Its own examples."""
        return tuple(self.whole) if self._indices is None else tuple(self.__getitems__(torch.arange(len(self))))

    def __len__(self) -> int:
        return len(self.whole[0]) if self._indices is None else len(self._indices)

    def where(self, indices: Tensor) -> Tensor:
        """Return where in ``whole`` some of its examples are."""
        return indices if self._indices is None else self._indices[indices]

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int] | Tensor) -> list[Tensor]:
        chosen = self.where(torch.as_tensor(indices))
        return [tensor.index_select(0, chosen.to(tensor.device)) for tensor in self.whole]


def _within(indices: Sequence[int], count: int) -> Tensor:
    """Return indices as a tensor, (n,) int64, those from the end counted from the beginning.

    Raises:
        IndexError: If one is not of ``count`` examples.
    """
    given = torch.as_tensor(indices, dtype=torch.int64)
    if not len(given):
        return given
    lowest, highest = (int(bound) for bound in torch.aminmax(given))
    if lowest < -count or highest >= count:
        wrong = lowest if lowest < -count else highest
        raise IndexError(f"index {wrong} of a Subset is out of range: its dataset has {count} examples")
    return given if lowest >= 0 else given.where(given >= 0, given + count)


class TensorBatches(BatchSampler):
    """The batches of a BatchSampler, each as one tensor of indices."""

    def __iter__(self) -> Iterator[Any]:
        yield from self.order().split(self.batch_size)[: len(self)]  # type: ignore[no-untyped-call]

    def order(self) -> Tensor:
        """Return what its sampler gives in an epoch, (n,) int64: the same draws, without a number after the other."""
        sampler: Any = self.sampler
        count = len(sampler.data_source)
        if type(sampler) is SequentialSampler:
            return torch.arange(count)
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _as_it_is(batch: Any) -> Any:
    return batch


def gathering(loader: Any) -> Any:
    """Return the loader, with the same batches in the same order; tensors are gathered, not collated one by one."""
    usual = type(loader) is DataLoader and loader.collate_fn is default_collate and not loader.num_workers
    if not usual or loader.batch_sampler is None:
        return loader
    dataset, indices = loader.dataset, None
    while type(dataset) in (Subset, Part):
        # The outer part's indices alone are looked up: a client must not pay for the whole data set.
        indices = dataset.indices if indices is None else [dataset.indices[i] for i in indices]
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset or any(t.is_sparse or t.requires_grad for t in dataset.tensors):
        return loader
    fast = copy.copy(loader)
    fast.__dict__.update(dataset=Gathered(dataset.tensors, indices), collate_fn=_as_it_is)
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler and _draws_at_once(batches.sampler):
        fast.__dict__["batch_sampler"] = TensorBatches(batches.sampler, batches.batch_size, batches.drop_last)
    return fast


def _draws_at_once(sampler: Any) -> bool:
    """Return whether a sampler draws all its numbers when it is asked for the first, or none."""
    if type(sampler) is RandomSampler:
        # With a generator of its own the numbers that nobody asks for would be drawn, too.
        return not sampler.replacement and not has_count(sampler) and sampler.generator is None
    return type(sampler) is SequentialSampler


def labels_of(dataset: Any) -> np.ndarray[Any, Any] | None:
    """Return the labels of a map-style dataset, (n,), without reading its examples, or ``None`` where none are found.

    Looked for in ``.targets`` and ``.labels`` (torchvision), through ``Subset`` and ``ConcatDataset``, and in the last
    tensor of a ``TensorDataset`` if it is one-dimensional and of integers.
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if len(found) == len(parts) else None
    for name in ("targets", "labels"):
        labels = _one_each(getattr(dataset, name, None), dataset)
        if labels is not None:
            return labels
    if isinstance(dataset, TensorDataset):
        last = dataset.tensors[-1]
        return None if last.is_floating_point() else _one_each(last, dataset)
    return None


def _one_each(labels: Any, dataset: Any) -> np.ndarray[Any, Any] | None:
    """Return the labels as an array, unless they are something else: the names of the classes, boxes, ..."""
    try:
        array = np.asarray(labels)
        if array.dtype == object:
            array = np.asarray(array.tolist())
    except (TypeError, ValueError):
        return None
    return array if array.shape == (len(dataset),) and array.dtype != object else None
