"""What vectorized clients log: each client's own values, accumulated as Lightning does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fed._compat.lightning import ResultMetric
from lightning_fed._compat.results import Accumulated
from lightning_fed._compat.torchmetrics import defaults
from lightning_fed.client.local.shown import shown
from lightning_fed.client.local.trainer import how_logged
from lightning_fed.client.vectorized.rng import NotStackable
from lightning_fed.values.metrics import MetricState, catch_each


@dataclass
class Entry:
    """One call of ``self.log`` in a step, without its value."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_size: Any


@dataclass
class Logged:
    """What some clients logged in a step.

    Attributes:
        rows: Which clients, (clients,) int64; ``None`` for all.
        entries: The calls.
        values: Their values, each (clients,).
    """

    rows: Tensor | None
    entries: Sequence[Entry]
    values: Sequence[Tensor]


class StackedLog:
    """An epoch's logged values.

    Args:
        clients: How many are vectorized.
        check: Logs one client's value in Lightning's own way, which checks the arguments, and gives the result metric.
    """

    def __init__(self, clients: int, check: Callable[[Entry, Tensor], ResultMetric]) -> None:
        self._clients, self._check = clients, check
        self._checked: dict[str, tuple[Any, ResultMetric]] = {}
        self._results: dict[str, Accumulated] = {}  # those of this epoch
        self._last: dict[str, Accumulated] | None = None  # those of the epoch before

    def add(self, logged: Sequence[Logged]) -> None:
        """Take in what all clients logged in one step.

        Raises:
            NotStackable: If they did not all log the same names, one number each.
        """
        first = logged[0]
        if any([e.name for e in one.entries] != [e.name for e in first.entries] for one in logged):
            raise NotStackable("what it logs depends on the batch")
        for i, entry in enumerate(first.entries):
            if any(one.values[i].dim() != 1 for one in logged):
                raise NotStackable(f"it logs {entry.name!r} with more than one number")
            value, batch_size = first.values[i].detach(), entry.batch_size
            if first.rows is not None:
                value, batch_size = self._whole(logged, i)
            self._update(entry, value, batch_size)

    def end_epoch(self) -> None:
        """Take note that an epoch is over."""
        self._last, self._results = self._results, {}

    def of_last_epoch(self) -> list[list[MetricState]]:
        """Return what each client logged in the epoch that ended last; nothing before there is one."""
        if self._last is None:
            return []
        unlogged, on_bar = shown(self._last.values())
        caught = catch_each(self._last.values(), self._clients)
        return [
            [replace(s, logged=s.name not in unlogged, on_bar=s.name in on_bar) for s in states] for states in caught
        ]

    def _whole(self, logged: Sequence[Logged], i: int) -> tuple[Tensor, Tensor]:
        """Return the values and batch sizes of all clients, from those of some and others."""
        like = logged[0].values[i]
        value, sizes = (
            torch.empty(self._clients, dtype=dtype, device=like.device) for dtype in (like.dtype, torch.int64)
        )
        for one in logged:
            value[one.rows], sizes[one.rows] = one.values[i].detach(), int(one.entries[i].batch_size)
        return value, sizes

    def _update(self, entry: Entry, value: Tensor, batch_size: Any) -> None:
        how = how_logged(entry.args, entry.kwargs)
        known, result = self._checked.get(entry.name, (None, None))
        if result is None or known != how:
            result = self._check(entry, value[0])
            self._checked[entry.name] = how, result
        if entry.name not in self._results:
            self._results[entry.name] = _stacked(result, value)
        self._results[entry.name].update(value, batch_size)


def _stacked(result: ResultMetric, like: Tensor) -> Accumulated:
    """Make one of Lightning's result metrics anew, with a value for each client and nothing in it yet."""
    empty = defaults(result)
    batch_size = empty.get("cumulated_batch_size")
    value = empty["value"].to(like.device).expand(len(like))
    return Accumulated(result.meta, value, None if batch_size is None else batch_size.to(like.device))
