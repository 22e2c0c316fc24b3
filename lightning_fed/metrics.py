"""Metrics that clients log: their states out of Lightning, and an exact merge over clients.

A torchmetrics metric is merged by its states, as torchmetrics itself does between processes: the merged F1, AUROC or
Pearson equals the value over the pooled data. A plain scalar is averaged over the examples it was computed from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

# How the clients' values of one name become one value.
MEAN, SUM, MAX, MIN = "mean", "sum", "max", "min"
LAST = "last"  # logged with on_step=True, on_epoch=False: the last step's value, averaged over clients by examples
METRIC = "metric"  # a torchmetrics metric with states that merge
RATE = "rate"  # a learning rate of the last epoch; averaged as LAST
COMPUTED = "computed"  # a value that no longer has states to merge: averaged by examples, and said once


@dataclass
class MetricState:
    """What one client knows of one logged name.

    Attributes:
        name: The name the user logged under.
        kind: One of the module's constants, such as ``MEAN`` or ``METRIC``.
        tensors: ``value`` and, for means, ``weight`` (examples); a metric's states by name for ``METRIC``.
        attribute: Where the metric sits in the module, such as ``"val_f1"``; empty for scalars.
        updates: How many times the metric was updated.
    """

    name: str
    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    attribute: str = ""
    updates: int = 0


def catch(trainer: Trainer, module: LightningModule, computed: Iterable[str] = ()) -> list[MetricState]:
    """The states of all that was logged in the epoch that is just ending, before Lightning resets them.

    Args:
        trainer: A client's trainer, in ``on_train_epoch_end`` of the module or ``on_validation_end`` of a callback.
        module: The module that logged.
        computed: Names whose value the module had already computed from a metric.
    """
    attributes = {id(child): name for name, child in module.named_modules() if isinstance(child, Metric)}
    states: list[MetricState] = []
    for result in (trainer._results or {}).values():
        if result.has_reset:
            continue
        name = _name(result.meta)
        if not result.is_tensor:
            caught = [_metric_state(name, result.value, attributes)]
        else:
            caught = _scalar_states(name, result)
            if result.meta.name in computed:
                caught = [MetricState(s.name, COMPUTED, {"value": result.compute().detach()}) for s in caught]
        states.extend(caught)
        if not result.is_tensor and result.meta.forked:
            states.append(MetricState(f"{name}_epoch", caught[0].kind, caught[0].tensors, *_where(caught[0])))
            if isinstance(result._forward_cache, Tensor):
                states.append(MetricState(f"{name}_step", LAST, {"value": result._forward_cache.detach().clone()}))
    return states


@dataclass
class Accumulated:
    """What Lightning's ``_ResultMetric`` accumulates of a logged number, of one client or (clients,) of many."""

    meta: Any
    value: Tensor
    cumulated_batch_size: Tensor | None
    _forward_cache: Tensor | None = None
    is_tensor: ClassVar[bool] = True

    def update(self, value: Tensor, batch_size: Any) -> None:
        """Takes a step's value in, as Lightning does."""
        _ResultMetric.update(self, value, batch_size)  # type: ignore[arg-type]


def catch_each(results: Iterable[Accumulated], clients: int) -> list[list[MetricState]]:
    """As ``catch``, for clients that are trained as one.

    Args:
        results: Logged numbers, (clients,).
        clients: How many there are.
    """
    caught: list[list[MetricState]] = [[] for _ in range(clients)]
    for result in results:
        parts = [result.value, result.cumulated_batch_size, result._forward_cache]
        rows = [[None] * clients if part is None else part.detach().expand(clients).unbind() for part in parts]
        for states, value, examples, last in zip(caught, *rows, strict=True):
            states.extend(_scalar_states(_name(result.meta), Accumulated(result.meta, value, examples, last)))
    return caught


def scalar(state: MetricState) -> float | None:
    """The value of what one client logged; ``None`` where it takes a metric to compute it."""
    if state.kind == METRIC:
        return None
    value = state.tensors["value"]
    return float(value / state.tensors["weight"]) if state.kind == MEAN else float(value)


def _where(state: MetricState) -> tuple[str, int]:
    return state.attribute, state.updates


def _name(meta: Any) -> str:
    if meta.dataloader_idx is not None and meta.add_dataloader_idx:
        return f"{meta.name}/dataloader_idx_{meta.dataloader_idx}"
    return str(meta.name)


def _scalar_states(name: str, result: Any) -> list[MetricState]:
    meta, value = result.meta, result.value.detach()
    if meta.is_mean_reduction and "epoch" in meta.fx:
        # A value of the whole epoch (an F1 computed by hand, MinMaxMetric.compute()), from who knows how many examples.
        return [MetricState(name, COMPUTED, {"value": result.compute().detach().clone()})]
    if not meta.on_epoch:
        return [MetricState(name, LAST, {"value": value.clone()})]
    if meta.is_mean_reduction:
        weight = torch.as_tensor(result.cumulated_batch_size, dtype=torch.float64)
        epoch = MetricState(name, MEAN, {"value": value.double(), "weight": weight})
    else:
        kind = MAX if meta.is_max_reduction else MIN if meta.is_min_reduction else SUM
        epoch = MetricState(name, kind, {"value": value.clone()})
    if not meta.on_step:
        return [epoch]
    last = MetricState(f"{name}_step", LAST, {"value": torch.as_tensor(result._forward_cache).detach().clone()})
    return [epoch, MetricState(f"{name}_epoch", epoch.kind, epoch.tensors), last]


def is_mergeable(metric: Metric) -> bool:
    """Whether the states of a metric over clients give the value over the pooled data.

    Wrappers (MinMax, BootStrapper, a sum of two metrics) keep theirs in metrics inside; a list that is not concatenated
    (detection boxes) would lose its borders.
    """
    if not metric._reductions or any(isinstance(child, Metric) for child in metric.children()):
        return False
    lists = [name for name, default in metric._defaults.items() if isinstance(default, list)]
    return all(
        metric._reductions[name] is dim_zero_cat and all(isinstance(item, Tensor) for item in _items(metric, name))
        for name in lists
    )


def _items(metric: Metric, name: str) -> Sequence[Any]:
    state = getattr(metric, name)
    return state if isinstance(state, list) else [state]


def _metric_state(name: str, metric: Metric, attributes: Mapping[int, str]) -> MetricState:
    attribute = attributes.get(id(metric), "")
    if not attribute or not is_mergeable(metric):
        value = metric.compute()
        return MetricState(name, COMPUTED, {"value": torch.as_tensor(value).detach()}, attribute)
    tensors = {}
    for state in metric._defaults:
        items = _items(metric, state)
        tensors[state] = dim_zero_cat(list(items)).detach() if items else torch.zeros(0)
    return MetricState(name, METRIC, {k: v.clone() for k, v in tensors.items()}, attribute, int(metric._update_count))


def merge(
    clients: Sequence[tuple[float, Sequence[MetricState]]], module: nn.Module
) -> tuple[dict[str, float], list[str]]:
    """One value a name over all clients that logged it.

    Args:
        clients: ``(num_examples, states)`` in client order.
        module: The server's module; its metrics tell how states are merged, and are not touched.

    Returns:
        The values by name, and the names whose metric could not be merged and was averaged over examples instead.
    """
    by_name: dict[str, list[tuple[float, MetricState]]] = {}
    for num_examples, states in clients:
        for state in states:
            by_name.setdefault(state.name, []).append((num_examples, state))
    values = {name: _merge_one(entries, module) for name, entries in by_name.items()}
    return values, [name for name, entries in by_name.items() if any(s.kind == COMPUTED for _, s in entries)]


def _merge_one(entries: list[tuple[float, MetricState]], module: nn.Module) -> float:
    kind = entries[0][1].kind
    if kind == METRIC:
        return _merge_metric([state for _, state in entries], module)
    values = torch.stack([state.tensors["value"].double().cpu() for _, state in entries])
    if kind == MEAN:
        weights = torch.stack([state.tensors["weight"].cpu() for _, state in entries])
        return float(values.sum() / weights.sum())
    if kind in (SUM, MAX, MIN):
        return float(getattr(values, kind)())
    coefficients = torch.tensor([num_examples for num_examples, _ in entries], dtype=torch.float64)
    return float((values * coefficients).sum() / coefficients.sum())


def _merge_metric(states: list[MetricState], module: nn.Module) -> float:
    original = module.get_submodule(states[0].attribute)
    assert isinstance(original, Metric)
    metric = copy.deepcopy(original).cpu()
    metric.reset()
    for name, default in metric._defaults.items():
        parts = [state.tensors[name].cpu() for state in states]
        reduction = metric._reductions[name]
        if isinstance(default, list):
            # A client that never updated the metric has nothing to add, not even an empty row.
            setattr(metric, name, [part for part in parts if part.numel()])
        else:
            stacked = torch.stack(parts)
            setattr(metric, name, stacked if reduction is None else reduction(stacked))  # type: ignore[operator]
    metric._update_count = sum(state.updates for state in states)
    metric._computed = None
    return float(metric.compute())
