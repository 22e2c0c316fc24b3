"""Any Flower strategy, as it is."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed import checks, messages
from lightning_fed.callbacks.base import FederatedCallback, Stage
from lightning_fed.errors import ConfigurationError
from lightning_fed.plain import from_plain, to_plain


class FlowerStrategy(FederatedCallback):
    """Runs a strategy of ``flwr.serverapp.strategy``, or one of your own, unmodified.

    The strategy sees what it sees in plain Flower, with all floating tensors of the module as its arrays; integer and
    bool tensors (BatchNorm's ``num_batches_tracked``) are averaged apart, so none turns into a float and no clip norm
    counts them. It sees the cohort as all its nodes: leave its fractions at 1.0 and sample with
    ``PartialParticipation``. Its arrays, numbers and records go into the checkpoint.

    Args:
        strategy: The strategy.
        mods: Flower client mods around the client's train function that belong to it, such as ``fixedclipping_mod``.

    Attributes:
        running: The copy that the last fit used, with what it accumulated.

    Raises:
        ConfigurationError: If ``strategy`` is not a message-based Flower strategy.
    """

    decides = frozenset({"aggregation"})

    def __init__(self, strategy: Strategy, mods: Sequence[Mod] = ()) -> None:
        if not isinstance(strategy, Strategy):
            why = checks.why_not(strategy) if checks.is_of_another_kind(strategy) else "is none"
            raise ConfigurationError(
                f"FlowerStrategy({checks.as_typed(strategy)}) wants an instance of flwr.serverapp.strategy.Strategy:"
                f" {checks.as_typed(strategy)} {why}."
            )
        if callable(mods) or not all(callable(mod) for mod in mods):
            raise ConfigurationError(f"FlowerStrategy(mods={mods!r}): write a list of client mods, mods=[...].")
        self.strategy, self.mods = strategy, mods
        self.running = strategy

    def server_strategy(self, strategy: Strategy | None) -> Strategy:
        """A copy of the strategy behind an adaptor: a second fit must not start with the moments of the first."""
        self.running = copy.deepcopy(self.strategy)
        return Adaptor(self.running)

    def client_mods(self, stage: Stage) -> Sequence[Mod]:
        """The strategy's own mods, around training only: Flower's clipping mods make evaluation fail."""
        return self.mods if stage == "train" else []


class Adaptor(Strategy):
    """The boundary to a strategy that expects all replies at once, with the same metrics in each.

    Args:
        inner: The strategy.
    """

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner
        self.name = type(inner).__name__

    def summary(self) -> None:
        """As the strategy."""
        self.inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy."""
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the strategy, over metrics that all clients report."""
        return self.inner.aggregate_train(server_round, _with_common_metrics(replies))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the strategy, over metrics that all clients report."""
        return self.inner.aggregate_evaluate(server_round, _with_common_metrics(replies))

    def state_dict(self) -> dict[str, Any]:
        """What the strategy holds: arrays, numbers and records, also of strategies that it wraps."""
        return strategy_state(self.inner)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        load_strategy_state(self.inner, state)


def _with_common_metrics(replies: Iterable[Message]) -> list[Message]:
    kept = list(replies)
    records = [record for reply in kept if (record := messages.first(reply.content, MetricRecord)) is not None]
    common = set.intersection(*(set(record) for record in records)) if records else set()
    for record in records:
        for name in set(record) - common:
            del record[name]
    return kept


def strategy_state(strategy: Strategy) -> dict[str, Any]:
    """A strategy's state for a checkpoint: by its own ``state_dict``, else its arrays, numbers and records."""
    if hasattr(strategy, "state_dict"):
        return strategy.state_dict()
    return _state_of(strategy)[0]


def warn_of_unsaved(strategy: Strategy) -> None:
    """Names what of a strategy, or of those that it wraps, cannot go into a checkpoint."""
    if isinstance(strategy, Adaptor):
        strategy = strategy.inner
    if hasattr(strategy, "state_dict"):
        return
    for wrapped in vars(strategy).values():
        if isinstance(wrapped, Adaptor):
            warn_of_unsaved(wrapped)
    if unknown := _state_of(strategy)[1]:
        rank_zero_warn(
            f"{type(strategy).__name__} holds {', '.join(sorted(unknown))}, which cannot go into a checkpoint: a"
            " resumed run starts with it new."
        )


def load_strategy_state(strategy: Strategy, state: dict[str, Any]) -> None:
    """Takes back what ``strategy_state`` gave."""
    if hasattr(strategy, "load_state_dict"):
        strategy.load_state_dict(state)
    else:
        _load_state(strategy, state)


def _state_of(strategy: Strategy) -> tuple[dict[str, Any], set[str]]:
    state: dict[str, Any] = {}
    unknown: set[str] = set()
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):
            own = getattr(value, "state_dict", None)
            inner, more = _state_of(value) if own is None else (own(), set())
            state[name] = {"__strategy__": inner}
            unknown |= more
        elif not (inspect.isroutine(value) or isinstance(value, (type, functools.partial))):
            try:
                state[name] = to_plain(value)
            except TypeError:
                unknown.add(name)
    return state, unknown


def _load_state(strategy: Strategy, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(value, dict) and "__strategy__" in value:
            load_strategy_state(getattr(strategy, name), value["__strategy__"])
        else:
            setattr(strategy, name, from_plain(value))
