"""Lightning's record of a logged number, copied from an empty one: to construct it takes as long as a small step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Signature
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric as ResultMetric
from torch import Tensor

# What leads from a record to itself, and what is the same for all: of anything else a copy is known to be right.
_OWN = ("update", "compute")
_SHARED = ("meta", "distributed_available_fn")
_PLAIN = (bool, int, type(None), torch.dtype, torch.device, Signature)
# Records that saw nothing, by all that the states of one depend on; ``None`` where they hold something unknown.
_empty: dict[tuple[Any, torch.dtype, torch.device, bool], ResultMetric | None] = {}


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
        made = ResultMetric(metadata, is_tensor)
        made.meta = None  # type: ignore[assignment]
        _empty[key] = made if all(map(_can_be_copied, *zip(*vars(made).items(), strict=True))) else None
    empty = _empty[key]
    return ResultMetric(metadata, is_tensor) if empty is None else _copy(empty, metadata)


def _can_be_copied(name: str, value: Any) -> bool:
    return name in _OWN or name in _SHARED or isinstance(value, (Tensor, dict, set, *_PLAIN))


def _copy(empty: ResultMetric, metadata: Any) -> ResultMetric:
    metric = object.__new__(ResultMetric)
    metric.__dict__ = held = vars(empty).copy()
    for name, value in held.items():
        if isinstance(value, (Tensor, dict, set)):
            held[name] = value.clone() if isinstance(value, Tensor) else value.copy()
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
