"""How many examples a client's loaders yield in an epoch: what its results weigh in every mean over clients.

Lengths tell, of sampler and batch sampler, as far as ``drop_last`` and a limit of batches go. Where they do not, what
comes is counted, in the first epoch of a local fit or while evaluating.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import fields, is_dataclass
from typing import Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_fed._compat.lightning import IterDataFetcher, combined_loader, data_fetcher, is_in_turn
from lightning_fed.errors import ClientError
from lightning_fed.values.data import TensorBatches


def examples_in(loader: Any, batches: float = math.inf) -> int | None:
    """Return the examples in a loader's first batches, or ``None`` where lengths do not tell.

    Args:
        loader: A client's loader.
        batches: How many of its batches count.
    """
    if isinstance(loader, (list, tuple)) and not loader:
        return 0
    if (plan := _plan(loader)) is None:
        return None
    try:
        count = len(cast(Sized, plan.sampler))
    except (AttributeError, TypeError, NotImplementedError):
        return None
    if plan.drop_last:
        count -= count % plan.batch_size
    return int(min(count, batches * plan.batch_size))


def _plan(loader: Any) -> BatchSampler | None:
    """Return what puts a loader's batches together, where that is torch's own code."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return None
    if isinstance(loader.dataset, IterableDataset):
        return None
    # Without a batch size each thing that the sampler gives is a batch.
    plan = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    usual = isinstance(plan, TensorBatches) or getattr(type(plan), "__iter__", None) is BatchSampler.__iter__
    return cast(BatchSampler, plan) if usual else None


def _known(loaders: CombinedLoader) -> int | None:
    """Return the examples of an epoch over all of a trainer's loaders, one after the other, or ``None``."""
    flat = loaders.flattened
    if len(flat) > 1 and not is_in_turn(loaders):
        return None
    counts = [examples_in(*one) for one in zip(flat, loaders.limits or [math.inf] * len(flat), strict=True)]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def batch_size(batch: Any) -> int | None:
    """Return the examples of a batch, or ``None`` where nothing in it tells.

    As Lightning weighs what is logged: the length of the first tensor, array or packed sequences; without any, of the
    first list of texts, numbers and the like, or of whatever list there is. A tensor without a dimension tells nothing
    where others have one.
    """
    has_tensor = False
    for _, part in _parts(batch):
        if isinstance(part, (Tensor, np.ndarray, PackedSequence)):
            if (length := _length(part)) is not None:
                return length
            has_tensor = True
    if has_tensor:
        return 1
    lists = [part for _, part in _parts(batch) if isinstance(part, (list, tuple)) and part]
    flat = [part for part in lists if not any(_inside(item) is not None for item in part)]
    return len((flat or lists)[0]) if lists else None


def _length(part: Any) -> int | None:
    """Return how many things a part of a batch has, ``None`` where it has no first dimension."""
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])
    if isinstance(part, (Tensor, np.ndarray)):
        return len(part) if part.ndim else None
    return len(part) if isinstance(part, (list, tuple)) else None


def _parts(part: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Return a batch and all that is in it, the outer before the inner, each with the way to it."""
    yield path, part
    for i, item in enumerate(_inside(part) or ()):
        yield from _parts(item, (*path, i))


def _inside(part: Any) -> Iterable[Any] | None:
    if isinstance(part, (Tensor, np.ndarray, str, bytes, PackedSequence)):
        return None
    if isinstance(part, Mapping):
        return part.values()
    if is_dataclass(part):
        return [getattr(part, field.name) for field in fields(part)]
    return part if isinstance(part, Collection) else None


class _Tells:
    """What tells the examples of a loader's batches: the loader's own ``batch_size``, in a full one, knows.

    The first tensor may be one image of many, or have the steps of time in front.

    Args:
        loader: Where the batches come from.
    """

    def __init__(self, loader: Any) -> None:
        full = loader.batch_size if isinstance(loader, DataLoader) else None
        # With a batch size of 1 what comes is mostly a batch that the data set has made.
        self._full = full if type(full) is int and full > 1 else None
        self._path: tuple[int, ...] | None = None

    def count(self, batch: Any) -> int | None:
        """Do as ``batch_size``, but where that contradicts the loader in a full batch."""
        usual = batch_size(batch)
        if self._path is None and self._full is not None and usual is not None and usual != self._full:
            self._path = next((path for path, part in _parts(batch) if self._has_all(path, part)), None)
        if self._path is None:
            return usual
        length = next((_length(part) for path, part in _parts(batch) if path == self._path), None)
        return usual if length is None or length > (self._full or 0) else length

    def _has_all(self, path: tuple[int, ...], part: Any) -> bool:
        # Of a tuple the parts are what an example has, of a list they may be the examples.
        return _length(part) == self._full and (bool(path) or not isinstance(part, tuple))


class CountExamples(Callback):
    """Counts the examples of one local run: of a fit's first epoch, of a validation or test.

    For loaders whose lengths do not tell, or that are not open yet. It hears of every batch only where it must, since
    that costs each step.

    Attributes:
        count: How many there are; 0 where there is no batch.
    """

    def __init__(self) -> None:
        self.count = 0
        self._loaders: CombinedLoader | None = None
        self._tells: list[_Tells] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, as the loaders are open."""
        # A step that takes its batches itself has them only afterwards.
        later = isinstance(data_fetcher(trainer.fit_loop), IterDataFetcher)
        self._begin(trainer, combined_loader(trainer.fit_loop), (_AfterSteps if later else _BeforeSteps)(self, trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count in a validation of its own, as the loaders are open."""
        if trainer.state.fn == "validate":
            self._begin(trainer, combined_loader(trainer.validate_loop), _InValidation(self, trainer))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count in a test, likewise."""
        self._begin(trainer, combined_loader(trainer.test_loop), _InTest(self, trainer))

    def _begin(self, trainer: Trainer, loaders: CombinedLoader | None, each: _EachBatch) -> None:
        assert loaders is not None
        self.look_at(loaders)
        known = _known(loaders)
        self.count = known or 0
        if known is None:
            trainer.callbacks.append(each)  # type: ignore[attr-defined]

    def look_at(self, loaders: CombinedLoader) -> None:
        """Take note of the loaders whose batches will come."""
        self._loaders = loaders
        together = len(loaders.flattened) > 1 and not is_in_turn(loaders)
        self._tells = [_Tells(None if together else loader) for loader in loaders.flattened]

    def add(self, batch: Any, loader: int = 0) -> None:
        """Count a batch of one of the loaders; raises as ``examples_of``."""
        self.count += self.examples_of(batch, loader)

    def examples_of(self, batch: Any, loader: int = 0) -> int:
        """Return the examples of a batch of one of the loaders.

        Raises:
            ClientError: If nothing tells how many it has.
        """
        size = self._tells[loader].count(batch)
        return self._most(batch) if size is None else size

    def _most(self, batch: Any) -> int:
        kind, assumed = type(batch).__name__, None
        if self._loaders is not None:
            assumed = getattr(self._loaders.flattened[0], "batch_size", None)
        if type(assumed) is not int:
            raise ClientError(
                f"weighs in every mean by its number of examples, and nothing tells how many examples a {kind} has, as"
                " its batches are. Give it a tensor with the examples as its first dimension, in a dict, tuple or"
                " dataclass, or read it with DataLoader(..., batch_size=...)."
            )
        rank_zero_warn(
            f"Nothing tells how many examples a {kind} has, as a client's batches are: it counts batch_size={assumed}"
            " for each, and the last may have fewer."
        )
        return assumed


class _EachBatch(Callback):
    def __init__(self, counter: CountExamples, trainer: Trainer) -> None:
        self._counter, self._epoch = counter, trainer.current_epoch

    def _add(self, trainer: Trainer, batch: Any, loader: int = 0) -> None:
        if trainer.current_epoch == self._epoch:
            self._counter.add(batch, loader)


class _BeforeSteps(_EachBatch):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._add(trainer, batch)


class _AfterSteps(_EachBatch):
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._add(trainer, batch)


class _InValidation(_EachBatch):
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._add(trainer, batch, dataloader_idx)


class _InTest(_EachBatch):
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._add(trainer, batch, dataloader_idx)


def nothing_to_train_on(loader: Any, limit: float | None = None) -> ClientError:
    """Return why a client has no batch, and the way out.

    Args:
        loader: What it was given to train on.
        limit: The trainer's ``limit_train_batches``.
    """
    if limit == 0:
        return ClientError("has nothing to train on: limit_train_batches=0 leaves no client a batch. Leave it out.")
    plan, why = _plan(loader), "has no training examples. Deal out fewer clients or"
    if plan is not None and plan.drop_last and (count := len(cast(Sized, plan.sampler))):
        why = (
            f"has {count} training examples, fewer than batch_size={plan.batch_size}, and drop_last=True leaves them"
            " out: it would train on nothing. Write drop_last=False or a smaller batch_size, deal out"
        )
    return ClientError(
        f"{why} larger parts (min_partition_size= of the partitioner), or let it fail: FaultTolerance(min_results=...)."
    )
