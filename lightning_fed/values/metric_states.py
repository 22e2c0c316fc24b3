"""The states of one torchmetrics metric over several clients, merged as torchmetrics merges those of processes.

Only where that gives the value over the pooled data: an error says that it does not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

from lightning_fed._compat.torchmetrics import as_updated, defaults, reductions


class States(NamedTuple):
    """What one client sends of a metric.

    Attributes:
        tensors: Its states by name.
        updates: How many times it was updated.
        own: The value that the client itself computed, if it is one number.
        examples: How many examples the client counts with.
    """

    tensors: Mapping[str, Tensor]
    updates: int
    own: float | None = None
    examples: float = 1.0


_OF_TORCHMETRICS = (dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum)


def is_mergeable(metric: Metric) -> bool:
    """Return whether the states of a metric over clients may give the value over the pooled data.

    Wrappers (MinMax, BootStrapper, a sum of two metrics) keep theirs in metrics inside; a list that is not concatenated
    (detection boxes) would lose its borders.
    """
    if not reductions(metric) or any(isinstance(child, Metric) for child in metric.children()):
        return False
    lists = [name for name, default in defaults(metric).items() if isinstance(default, list)]
    return all(
        reductions(metric)[name] is dim_zero_cat and all(isinstance(item, Tensor) for item in _items(metric, name))
        for name in lists
    )


def states_of(metric: Metric) -> dict[str, Tensor]:
    """Return copies of a mergeable metric's states, lists as one tensor."""
    states = {}
    for name, state in metric.metric_state.items():
        whole = state if isinstance(state, Tensor) else dim_zero_cat(list(state)) if state else torch.zeros(0)
        states[name] = whole.detach().clone()
    return states


def _items(metric: Metric, name: str) -> Sequence[Any]:
    state = getattr(metric, name)
    return state if isinstance(state, list) else [state]


def value_over(original: Metric, clients: Sequence[States]) -> float:
    """Return the value of a metric over the data of several clients.

    Args:
        original: The server's metric, which is not touched.
        clients: The clients' states.

    Raises:
        ValueError: If the states do not add up, or the value is not a single number.
        Exception: What the metric itself raises.
    """
    metric = copy.deepcopy(original).cpu()
    if not type(metric).__module__.startswith("torchmetrics."):
        _require_whole(metric, clients)
    if len(clients) > 1 and any(not _is_plain(metric, name) for name in defaults(metric)):
        _require_neutral(metric, clients)
    value = _value(metric, clients)
    if dim_zero_mean in reductions(metric).values():
        by_examples = [client.examples if client.updates else 0.0 for client in clients]
        if not _is_close(value, _value(metric, clients, by_examples)):
            raise ValueError("a state that is a mean may be one over updates or over examples")
    return value


def _value(metric: Metric, clients: Sequence[States], weights: Sequence[float] | None = None) -> float:
    metric.reset()
    updates = [client.updates for client in clients]
    for name in defaults(metric):
        parts = [client.tensors[name].cpu() for client in clients]
        setattr(metric, name, _merged(metric, name, parts, updates if weights is None else weights))
    as_updated(metric, sum(updates))
    value = metric.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError("the value is not a single number")
    return float(value)


def _merged(metric: Metric, name: str, parts: list[Tensor], weights: Sequence[float]) -> Tensor | list[Tensor]:
    default, reduction = defaults(metric)[name], reductions(metric)[name]
    if isinstance(default, list):
        # A client that never updated the metric has nothing to add, not even an empty row.
        return [part for part in parts if part.numel()]
    if len(parts) == 1:
        return parts[0]
    if reduction is dim_zero_cat:
        return dim_zero_cat(parts)
    stacked = torch.stack(parts)
    if reduction is dim_zero_mean:
        return _mean(stacked, weights)
    return stacked if reduction is None else reduction(stacked)


def _mean(stacked: Tensor, weights: Sequence[float]) -> Tensor:
    """Return a mean of means, by how much each is of: what one metric that saw it all would hold.

    (Between processes torchmetrics weighs all alike, and cannot average integers.)
    """
    wide = stacked.to(torch.promote_types(stacked.dtype, torch.float64))
    shares = torch.tensor(weights if any(weights) else [1] * len(weights), dtype=torch.float64)
    mean = torch.tensordot((shares / shares.sum()).to(wide.dtype), wide, dims=1)
    return mean.to(torch.promote_types(stacked.dtype, torch.get_default_dtype()))


def _is_plain(metric: Metric, name: str) -> bool:
    """Return whether torchmetrics itself knows how a state adds up over clients."""
    return reductions(metric)[name] in _OF_TORCHMETRICS


def _require_whole(metric: Metric, clients: Sequence[States]) -> None:
    """Check that a metric's value depends on its states alone, and on no attribute beside them.

    All clients are asked, for an attribute may differ from what the server's metric has on one of them only.

    Raises:
        ValueError: If a client's states do not give the value that the client itself computed.
    """
    for client in clients:
        if client.updates and client.own is not None and not _is_close(_value(metric, [client]), client.own):
            raise ValueError("the states do not hold all that the value depends on")


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) or (a != a and b != b)


def _require_neutral(metric: Metric, clients: Sequence[States]) -> None:
    """Check a metric that leaves its states apart, or reduces them in a way of its own.

    Some know what to do with the states of several clients (Pearson), others only forgot to say how theirs are reduced.
    What a client that saw nothing adds must be nothing.

    Raises:
        ValueError: If it is not.
    """
    empty = States(defaults(metric), 0)
    own = {i: _value(metric, [client]) for i, client in enumerate(clients) if client.updates}
    known = next((i for i, value in own.items() if math.isfinite(value)), None)
    if known is None:
        return
    for pair in ([clients[known], empty], [empty, clients[known]]):
        if not _is_close(_value(metric, pair), own[known]):
            raise ValueError("the states of several clients do not add up")
