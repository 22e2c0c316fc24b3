"""Metrics that clients log: their states out of Lightning, and an exact merge over clients.

A torchmetrics metric is merged by its states: the merged F1, AUROC or Pearson equals the value over the pooled data. A
plain scalar is averaged over the examples it was computed from. What cannot be merged is averaged by examples and said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fed._compat.lightning import last_value, results_of
from lightning_fed._compat.results import Accumulated
from lightning_fed._compat.torchmetrics import updates
from lightning_fed.values.metric_states import States, is_mergeable, states_of, value_over

# How the clients' values of one name become one value.
MEAN, SUM, MAX, MIN = "mean", "sum", "max", "min"
LAST = "last"  # of the last step that logged it: averaged over clients by examples
METRIC = "metric"  # a torchmetrics metric with states that merge
COMPUTED = "computed"  # a value that no longer has states to merge: averaged by examples, and said once
MERGED = frozenset({MEAN, SUM, MAX, MIN})  # those that become one number of many
KINDS = MERGED | {LAST, METRIC, COMPUTED}

# Hooks that log when there is no batch, so that nothing tells of how many examples a value is.
_WITHOUT_BATCH = {
    *("on_train_start", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end"),
    *("on_test_start", "on_test_epoch_start", "on_test_epoch_end"),
}


# The attribute of a state that is no metric of the module's, but a client's learning rate.
RATE = "learning rate"


@dataclass
class MetricState:
    """What one client knows of one logged name.

    Attributes:
        name: The name the user logged under.
        kind: One of the module's constants, such as ``MEAN`` or ``METRIC``.
        tensors: ``value``, for means with its ``weight`` (examples); a metric's states by name for ``METRIC``.
        attribute: Where the metric sits in the module, such as ``"val_f1"``; empty for scalars.
        updates: How many times the metric was updated.
        own: The client's own value of a metric, if it is one number; it travels among the client's numbers.
        logged: Whether it goes to loggers, as the user logged it.
        on_bar: Whether the user wants it on the progress bar.
    """

    name: str
    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    attribute: str = ""
    updates: int = 0
    own: float | None = None
    logged: bool = True
    on_bar: bool = False

    @property
    def weight(self) -> float:
        """How many examples the value is of, where it says so; else 0."""
        return 0.0 if self.kind == METRIC or "weight" not in self.tensors else float(self.tensors["weight"])

    @property
    def has_nan(self) -> bool:
        """Whether there is a NaN in it."""
        return any(bool(tensor.isnan().any()) for tensor in self.tensors.values())


def catch(trainer: Trainer, module: LightningModule, computed: Iterable[str] = ()) -> list[MetricState]:
    """Return the states of all that was logged in the epoch that is just ending, before Lightning resets them.

    Args:
        trainer: A client's trainer, in ``on_train_epoch_end`` of the module, or in a callback's ``on_validation_end``
            or ``on_test_end``.
        module: The module that logged.
        computed: Names whose value the module had already computed from a metric.
    """
    logged = [result for result in (results_of(trainer) or {}).values() if not result.has_reset]
    attributes = {id(child): name for name, child in module.named_modules() if isinstance(child, Metric)}
    return _by_name(logged, partial(_of_epoch, attributes=attributes), set(computed))


def catch_later(
    trainer: Trainer, module: LightningModule, computed: Iterable[str] = ()
) -> Callable[[], list[MetricState]]:
    """Return a function that gives what ``catch`` gives now; until it is called numbers cost next to nothing."""
    results = [result for result in (results_of(trainer) or {}).values() if not result.has_reset]
    if not all(result.is_tensor for result in results):
        caught = catch(trainer, module, computed)  # a metric's states are written to in place, and numbers never
        return lambda: caught
    held = [
        Accumulated(result.meta, result.value, getattr(result, "cumulated_batch_size", None), last_value(result))
        for result in results
    ]
    return partial(_by_name, held, _of_numbers, set(computed))


def catch_each(results: Iterable[Accumulated], clients: int) -> list[list[MetricState]]:
    """Do as ``catch``, for vectorized clients.

    Args:
        results: Logged numbers, (clients,).
        clients: How many there are.
    """
    each: list[list[Accumulated]] = [[] for _ in range(clients)]
    for result in results:
        parts = [result.value, result.cumulated_batch_size, last_value(result)]
        rows = [[None] * clients if part is None else part.detach().expand(clients).unbind() for part in parts]
        for logged, value, examples, last in zip(each, *rows, strict=True):
            logged.append(Accumulated(result.meta, value, examples, last))
    return [_by_name(logged, _of_numbers) for logged in each]


def _by_name(
    logged: Sequence[Any], of_epoch: Callable[[Any], MetricState | None], computed: Iterable[str] = ()
) -> list[MetricState]:
    """Return one state a name, by Lightning's rule for ``callback_metrics``.

    An epoch's value replaces a step's; of several hooks the one counts that began to log it last.
    """
    found: dict[str, MetricState] = {}
    for on_step in (True, False):
        for result in logged:
            if not (result.meta.on_step if on_step else result.meta.on_epoch):
                continue
            state = _of_step(result) if on_step else of_epoch(result)
            if state is None:
                continue
            if result.is_tensor and result.meta.name in computed:
                state = replace(state, kind=COMPUTED, tensors={"value": _value(state)})
            found.update((name, replace(state, name=name)) for name in dict.fromkeys(_names(result.meta, on_step)))
    return list(found.values())


def logged_names(results: Mapping[str, Any] | None) -> frozenset[str]:
    """Return the names under which Lightning keeps what one of its loops logged when it ran last.

    Args:
        results: The loop's.
    """
    metas = [result.meta for result in (results or {}).values() if not result.has_reset]
    each = [(meta, on_step) for meta in metas for on_step in (True, False)]
    return frozenset(
        name for meta, step in each if (meta.on_step if step else meta.on_epoch) for name in _names(meta, step)
    )


def _names(meta: Any, on_step: bool) -> tuple[str, str]:
    """Return the names under which Lightning keeps a logged value."""
    loader = meta.dataloader_idx if meta.add_dataloader_idx else None
    suffix = "" if loader is None else f"/dataloader_idx_{loader}"
    return meta.name + suffix, meta.forked_name(on_step) + suffix


def _of_step(result: Any) -> MetricState | None:
    last = last_value(result)
    return MetricState("", LAST, {"value": last.detach().clone()}) if isinstance(last, Tensor) else None


def _of_epoch(result: Any, attributes: Mapping[int, str]) -> MetricState | None:
    return _of_numbers(result) if result.is_tensor else _of_metric(result.value, attributes)


def _of_numbers(result: Any) -> MetricState:
    meta, value = result.meta, result.value.detach()
    if not meta.is_mean_reduction:
        return MetricState(
            "", MAX if meta.is_max_reduction else MIN if meta.is_min_reduction else SUM, {"value": value.clone()}
        )
    state = MetricState("", MEAN, {"value": value.double(), "weight": _double(result.cumulated_batch_size)})
    if meta.fx.partition(".")[0] not in _WITHOUT_BATCH:
        return state
    # A number of the whole epoch (an F1 computed by hand, MinMaxMetric.compute()), from who knows how many examples,
    # unless the user said it: without a batch Lightning counts 1.
    tensors = {"value": _value(state)}
    if float(state.tensors["weight"]) != 1:
        tensors["weight"] = state.tensors["weight"]
    return MetricState("", COMPUTED, tensors)


def _double(number: Any) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64)


def _value(state: MetricState) -> Tensor:
    value = state.tensors["value"]
    return value / state.tensors["weight"] if state.kind == MEAN else value


def scalar(state: MetricState) -> float | None:
    """Return the value of what one client logged; ``None`` where it is not one number."""
    if state.kind == METRIC:
        return state.own
    value = _value(state)
    return float(value) if value.numel() == 1 else None


def with_own(states: Iterable[MetricState], values: Mapping[str, float]) -> list[MetricState]:
    """Return the states with the client's own values of its metrics, which it reports by name."""
    return [replace(state, own=values.get(state.name)) if state.kind == METRIC else state for state in states]


def _of_metric(metric: Metric, attributes: Mapping[int, str]) -> MetricState | None:
    attribute = attributes.get(id(metric), "")
    if attribute and is_mergeable(metric):
        return MetricState("", METRIC, states_of(metric), attribute, updates(metric))
    value = metric.compute()
    # Of anything else Lightning says that it must be a tensor.
    return MetricState("", COMPUTED, {"value": value.detach()}, attribute) if isinstance(value, Tensor) else None


class Merged(NamedTuple):
    """What became of the clients' values.

    Attributes:
        values: One value a name.
        averaged: The names that are the example-weighted mean of the clients' own values because their states do not
            merge.
        left_out: The names that have no value: no client has a single number.
    """

    values: dict[str, float]
    averaged: list[str]
    left_out: list[str]


def merge(clients: Sequence[tuple[float, Sequence[MetricState]]], module: nn.Module) -> Merged:
    """Return one value a name over all clients that logged it.

    Args:
        clients: ``(num_examples, states)`` in client order.
        module: The server's module; its metrics tell how states are merged, and are not touched.
    """
    by_name: dict[str, list[tuple[float, MetricState]]] = {}
    for num_examples, states in clients:
        for state in states:
            by_name.setdefault(state.name, []).append((num_examples, state))
    merged = Merged({}, [], [])
    for name, entries in by_name.items():
        value = _exact(entries, module)
        if value is None:
            value = _mean(entries)
            (merged.left_out if value is None else merged.averaged).append(name)
        if value is not None:
            merged.values[name] = value
    return merged


def _exact(entries: Sequence[tuple[float, MetricState]], module: nn.Module) -> float | None:
    """Return the value over all clients' data, or ``None`` where that is not to be had from what they sent."""
    kinds, states = {state.kind for _, state in entries}, [state for _, state in entries]
    if kinds == {LAST}:
        return _mean(entries)
    if kinds == {METRIC}:
        if len({state.attribute for state in states}) > 1:
            return None
        if len(states) == 1 and states[0].own is not None:
            return states[0].own
        try:
            metric = module.get_submodule(states[0].attribute)
            if not isinstance(metric, Metric):  # of which a copy may be large
                return None
            clients = [States(state.tensors, state.updates, state.own, count) for count, state in entries]
            return value_over(metric, clients)
        except Exception:  # of the metric's own code, which may not be written for the states of several clients
            return None
    if len(kinds) > 1 or kinds == {COMPUTED}:
        return None
    values = torch.stack([state.tensors["value"].double().cpu() for state in states])
    if kinds == {MEAN}:
        return float(values.sum() / torch.stack([state.tensors["weight"].cpu() for state in states]).sum())
    return float(getattr(values, kinds.pop())())


def _mean(entries: Sequence[tuple[float, MetricState]]) -> float | None:
    """Return the example-weighted mean of the clients' own values, over those that have a single number."""
    total = weights = 0.0
    for num_examples, state in entries:
        value = scalar(state)
        if value is not None:
            weight = float(state.tensors.get("weight", num_examples)) if state.kind == COMPUTED else num_examples
            total, weights = total + value * weight, weights + weight
    return total / weights if weights else None
