"""Any Flower strategy, as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed import checks
from lightning_fed.callbacks.base import FederatedCallback, Stage
from lightning_fed.errors import ConfigurationError
from lightning_fed.wire import messages
from lightning_fed.wire.strategy_state import StandIn


class FlowerStrategy(FederatedCallback):
    """Runs a strategy of ``flwr.serverapp.strategy``, or one of your own, unmodified.

    The strategy sees what it sees in plain Flower, with all floating tensors of the module as its arrays; integer and
    bool tensors (BatchNorm's ``num_batches_tracked``) are averaged apart, so none turns into a float and no clip norm
    counts them. It sees the cohort as all its nodes: leave its fractions at 1.0 and sample with
    ``PartialParticipation``.

    What the run changes of its attributes goes into the checkpoint; what it never changes is configuration, which a
    resumed run takes from the script. A strategy that has ``state_dict`` and ``load_state_dict`` decides that itself.

    Args:
        strategy: The strategy.
        mods: Flower client mods around the client's train function that belong to it, such as ``fixedclipping_mod``.

    Attributes:
        running: The copy that the last fit used, with what it accumulated.

    Raises:
        ConfigurationError: If ``strategy`` is not a message-based Flower strategy.

    >>> from flwr.serverapp.strategy import Krum
    >>> from lightning_fed import FederatedTrainer
    >>> krum = FlowerStrategy(Krum(num_malicious_nodes=1))
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[krum])
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
        """Return a copy of the strategy behind an adaptor: a second fit must not start with the moments of the first.

        What cannot be copied (an open file, a writer, a lock, a connection) both have; a second fit is told so.
        """
        is_second = self.running is not self.strategy
        self.running, shared = _copy(self.strategy)
        if shared and is_second:
            rank_zero_warn(
                f"FlowerStrategy cannot copy {type(self.strategy).__name__}.{', '.join(shared)}: this fit has what the"
                " fit before left there. Give each fit a FlowerStrategy of its own, or write a __deepcopy__ for it."
            )
        return Adaptor(self.running)

    def client_mods(self, stage: Stage) -> Sequence[Mod]:
        """Return the strategy's own mods, around training only: Flower's clipping mods make evaluation fail."""
        return self.mods if stage == "train" else []


class Adaptor(StandIn):
    """The boundary to a strategy that expects all replies at once, with the same metrics in each, of the same form."""

    def summary(self) -> None:
        """Do as the strategy."""
        self.inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Do as the strategy."""
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Do as the strategy, over metrics that all clients report."""
        return self.inner.aggregate_train(server_round, _with_common_metrics(replies))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Do as the strategy."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Do as the strategy, over metrics that all clients report."""
        return self.inner.aggregate_evaluate(server_round, _with_common_metrics(replies))

    def state_dict(self) -> dict[str, Any]:
        """Return what the run has changed of the strategy, and of strategies that it wraps."""
        return self.checkpoint_state.dump()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.checkpoint_state.load(state)


def _with_common_metrics(replies: Iterable[Message]) -> list[Message]:
    kept = list(replies)
    records = [record for reply in kept if (record := messages.first(reply.content, MetricRecord)) is not None]
    common = {name for name, _ in set.intersection(*map(_forms, records))} if records else set()
    for record in records:
        for name in set(record) - common:
            del record[name]
    return kept


def _forms(record: MetricRecord) -> set[tuple[str, int | None]]:
    """Return the names, each with how many numbers it is a list of."""
    return {(name, len(value) if isinstance(value, list) else None) for name, value in record.items()}


def _copy(strategy: Strategy) -> tuple[Strategy, list[str]]:
    """Return a copy that shares nothing with the strategy, and the names of attributes that could not be copied."""
    try:
        return copy.deepcopy(strategy), []
    except Exception:
        return _copy_parts(strategy, {})


def _copy_parts(strategy: Strategy, memo: dict[int, Any]) -> tuple[Strategy, list[str]]:
    made, shared = copy.copy(strategy), []
    for name, value in vars(strategy).items():
        try:
            setattr(made, name, copy.deepcopy(value, memo))
        except Exception as error:
            if isinstance(value, Strategy):
                inner, more = _copy_parts(value, memo)
                setattr(made, name, inner)
                shared += [f"{name}.{one}" for one in more]
            else:
                shared.append(f"{name} ({type(value).__name__}: {error})")
    return made, shared
