"""Lightning's record of a logged number, copied from an empty one: to construct it takes as long as a small step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Signature
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric as ResultMetric
from torch import Tensor

# What leads from a record to itself, and what is the same for all: of anything else a copy is known to be right.
_OWN = ("update", "compute")
_SHARED = ("meta", "distributed_available_fn")
_PLAIN = (bool, int, type(None), torch.dtype, torch.device, Signature)


class _Empty(NamedTuple):
    """A record that saw nothing: what each holds, and the names of those tensors and containers that each has alone."""

    held: dict[str, Any]
    tensors: list[str]
    containers: list[str]

    @classmethod
    def of(cls, record: ResultMetric) -> _Empty | None:
        """Return what a record is copied from; ``None`` if it holds something unknown."""
        held = vars(record)
        known = {name for name, one in held.items() if isinstance(one, (Tensor, dict, set, *_PLAIN))}
        if held.keys() - known - {*_OWN, *_SHARED}:
            return None
        tensors = [name for name, one in held.items() if isinstance(one, Tensor)]
        containers = [name for name, one in held.items() if isinstance(one, (dict, set))]
        return cls({**held, **dict.fromkeys((*_OWN, "meta"))}, tensors, containers)


# By all that the states of a record depend on.
_empty: dict[tuple[Any, torch.dtype, torch.device, bool], _Empty | None] = {}


def result_metric(metadata: Any, is_tensor: bool) -> ResultMetric:
    """Return what ``ResultMetric(metadata, is_tensor)`` does.

    Args:
        metadata: How a value was logged.
        is_tensor: Whether it is a number, and no metric.
    """
    if not is_tensor:
        return ResultMetric(metadata, is_tensor)
    of_tensors = torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled()
    key = (metadata.reduce_fx, *of_tensors)
    if key not in _empty:
        _empty[key] = _Empty.of(ResultMetric(metadata, is_tensor))
    empty = _empty[key]
    return ResultMetric(metadata, is_tensor) if empty is None else _copy(empty, metadata)


def _copy(empty: _Empty, metadata: Any) -> ResultMetric:
    metric = object.__new__(ResultMetric)
    metric.__dict__ = held = empty.held.copy()
    for name in empty.tensors:
        held[name] = held[name].clone()
    for name in empty.containers:
        held[name] = held[name].copy()
    metric.meta = metadata
    # As in the constructor of a metric.
    metric.update = metric._wrap_update(ResultMetric.update.__get__(metric))  # type: ignore[method-assign]
    metric.compute = metric._wrap_compute(ResultMetric.compute.__get__(metric))  # type: ignore[method-assign]
    return metric


@dataclass
class Accumulated:
    """What Lightning's ``ResultMetric`` accumulates of a logged number, of one client or (clients,) of many."""

    meta: Any
    value: Tensor
    cumulated_batch_size: Tensor | None
    _forward_cache: Tensor | None = None
    is_tensor: ClassVar[bool] = True

    def update(self, value: Tensor, batch_size: Any) -> None:
        """Take a step's value in, as Lightning does."""
        ResultMetric.update(self, value, batch_size)  # type: ignore[arg-type]


def same_metadata(metadata: Any, reduce: Callable[..., Any] | None) -> Any:
    """Return how a value is logged in another fit, in the same way as in an earlier one.

    Args:
        metadata: The earlier fit's.
        reduce: The ``reduce`` of the other one's strategy; of what is only kept none, for it leads to its trainer.
    """
    made, sync = replace(metadata, _sync=None), metadata.sync
    made.sync = result._Sync(_should=sync.should, fn=reduce, _group=sync.group, rank_zero_only=sync.rank_zero_only)
    return made


@contextmanager
def records_copied() -> Iterator[None]:
    """In the block Lightning's collections make their records by ``result_metric``."""
    result._ResultMetric = result_metric  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        result._ResultMetric = ResultMetric  # type: ignore[misc]
