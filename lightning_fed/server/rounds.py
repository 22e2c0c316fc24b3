"""THE LOOP: one federated round in four steps.

::

    on_federation_start()                                       # once: data dealt out, strategy built
    for round in 1 .. max_rounds:                               # Lightning's epochs
        cohort   = participation.sample("train", round)         # from (seed, round)
        cohort   = in_time(cohort)                              # all, unless there is a virtual deadline
        on_round_start(round, "train", cohort)
        messages = strategy.configure_train(round, weights)     # 1  the strategy makes the train messages
        replies  = grid.send_and_receive(messages)              # 2  clients train, one by one as they are read
        for reply in replies:                                   #    in client order; checked
            on_client_end(report)  or  on_client_error(error)
        weights  = strategy.aggregate_train(round, replies)     # 3  the strategy makes the new weights
        the same for "evaluate" with the new weights            # 4  clients evaluate
        on_round_end(round, metrics)
        server optimizer applies the weights; validation, logging, checkpoints, stopping: Lightning's
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_fed.callbacks.base import CLIENT_METRICS, CohortOwner, FailureOwner, FederatedCallback, Stage
from lightning_fed.errors import FederationError, RoundError
from lightning_fed.seeding import seed_for, seeded
from lightning_fed.server.exchange import About, Exchange, Terms, name_of
from lightning_fed.server.methods import Methods
from lightning_fed.server.roster import Roster
from lightning_fed.strategies.own_metrics import own_metrics
from lightning_fed.tracebacks import words
from lightning_fed.values import metrics
from lightning_fed.values.weights import Weights
from lightning_fed.wire import messages

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


@dataclass
class RoundResult:
    """What a round gave.

    Attributes:
        weights: The new weights.
        metrics: Numbers by name.
        about: What is known of these names.
    """

    weights: Weights
    metrics: dict[str, float]
    about: About = field(default_factory=About)


class Rounds:
    """Runs rounds over a Flower grid.

    Args:
        grid: Where the clients are reached.
        roster: Who is behind Flower's addresses.
        strategy: The Flower strategy; it sees only the cohort.
        callbacks: All federated callbacks, in the user's order.
        cohorts: Decides who takes part.
        failures: Decides what becomes of failed clients.
        trainer: The server's trainer, handed to the callbacks' hooks.
        module: The server's module; its metrics tell how metric states merge.
        seed: The run's seed.
        timeout: Seconds to wait for the replies of one stage.
        max_examples: The greatest number of examples that a client is believed to have.
        max_clients: Truncates cohorts (``fast_dev_run``).
        methods: The methods that have tensors, if there are any.
        num_rounds: The rounds of the run, or -1 for no limit.
    """

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        strategy: Strategy,
        *,
        callbacks: Sequence[FederatedCallback],
        cohorts: CohortOwner,
        failures: FailureOwner,
        trainer: FederatedTrainer,
        module: nn.Module,
        seed: int,
        timeout: float = 3600.0,
        max_examples: float = math.inf,
        max_clients: int | None = None,
        methods: Methods | None = None,
        num_rounds: int = -1,
    ) -> None:
        self.grid, self.strategy, self.callbacks, self.cohorts = grid, strategy, callbacks, cohorts
        self.trainer, self.module = trainer, module
        self.seed, self.timeout, self.max_clients = seed, timeout, max_clients
        self.roster = roster
        methods = methods or Methods({}, trainer)
        self._terms = Terms(
            strategy, roster, cohorts, failures, self._tell, seed, num_rounds, timeout, max_examples, methods
        )
        self._said: set[str] = set()

    def run(self, round: int, weights: Weights, evaluate: bool) -> RoundResult:
        """Run one round.

        Args:
            round: The round, from 1.
            weights: The global weights, which are not written to.
            evaluate: Whether clients evaluate the new weights on their own data.

        Raises:
            ClientError: If a client failed and the run may not go on without it.
            RoundError: If there are too few good replies, or the strategy gave no usable weights.
        """
        with quiet_flower():
            trained = self._stage("train", round, weights)  # 1. to 3.
            if trained is None:
                raise RoundError(f"Round {round}: no client was chosen to train.", round=round, stage="train")
            # 4. Clients evaluate the new weights: the same three steps.
            evaluated = self._stage("evaluate", round, trained.weights) if evaluate else None
        logged, about = trained.metrics, trained.about
        if evaluated is not None:
            logged.update({f"{CLIENT_METRICS}{name}": v for name, v in evaluated.metrics.items()})
            about |= evaluated.about.under(CLIENT_METRICS)
        self._tell("on_round_end", round, logged)
        return RoundResult(trained.weights, logged, about)

    def _stage(self, stage: Stage, round: int, weights: Weights) -> RoundResult | None:
        cohort: Sequence[int] = self.cohorts.sample(stage, round, self.roster.num_clients, self.seed)
        cohort = cohort[: self.max_clients]
        for callback in self.callbacks if stage == "train" else ():
            cohort = callback.in_time(self.trainer, round, cohort)
        if not cohort:
            return None
        deadline = self._deadline(round) if stage == "train" else None
        exchange = Exchange(self._terms, stage, round, cohort, weights, deadline)
        with seeded(seed_for(self.seed, f"strategy/{stage}", round=round)):
            # 1. The strategy makes the messages.
            sent = exchange.messages(self.grid)
            if not sent:
                return None
            self._tell("on_round_start", round, stage, exchange.cohort)
            # 2. The grid takes them to the clients, who work one by one as their replies are read.
            timeout = self.timeout if deadline is None else deadline
            with _closed(self.grid.send_and_receive(sent, timeout=timeout)) as received:
                replies = exchange.replies(received)
                # 3. The strategy aggregates the replies, in client order.
                averaged, extra = self._aggregate(exchange, replies)
                for _ in replies:  # a strategy that stopped reading must not hide a failure
                    pass
        exchange.require_enough()
        for note in exchange.notes:
            self._say_once(note, "client: ")
        merged = metrics.merge(exchange.states, self.module)
        own = own_metrics(self.strategy, stage, extra, exchange.reported)
        self._say(AVERAGED, set(merged.averaged) - set(own))
        self._say(_LEFT_OUT, set(merged.left_out) - set(own))
        logged = {**extra, **merged.values, **own}
        self._say_nan(exchange, logged)
        if stage == "evaluate":
            return RoundResult({}, logged, exchange.about())
        return RoundResult(exchange.new_weights(averaged), logged, exchange.about())

    def _aggregate(self, exchange: Exchange, replies: Iterator[Message]) -> tuple[ArrayRecord | None, dict[str, float]]:
        stage, round = exchange.stage, exchange.round
        try:
            if stage == "evaluate":
                return None, messages.scalars(self.strategy.aggregate_evaluate(round, replies))
            arrays, record = self.strategy.aggregate_train(round, replies)
        except FederationError:
            raise
        except Exception as error:
            if error is exchange.raised:
                raise
            raise RoundError(
                f"Round {round}: {name_of(self.strategy)} could not aggregate the {stage} replies: {words(error)}",
                round=round,
                stage=stage,
            ) from error
        return arrays, messages.scalars(record)

    def _deadline(self, round: int) -> float | None:
        """Return after how many seconds who has not replied is late; ``None`` if the timeout comes first."""
        asked = [callback.seconds_to_wait(self.trainer, round) for callback in self.callbacks]
        return min((seconds for seconds in asked if seconds is not None and seconds < self.timeout), default=None)

    def _tell(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self.trainer, *args)

    def _say_once(self, note: str, who: str = "") -> None:
        """Say what a client has to say, in whatever process it was; of notes that begin alike the first."""
        if (beginning := who + note.split(":", 1)[0]) not in self._said:
            self._said.add(beginning)
            rank_zero_warn(note)

    def _say_nan(self, exchange: Exchange, logged: Mapping[str, float]) -> None:
        for name in [name for name, value in logged.items() if math.isnan(value)][:_NAMES]:
            if senders := exchange.senders_of_nan(name):
                self._say_once(
                    f"The logged {name!r} is NaN: in round {exchange.round}, {exchange.stage}, NaN came from client"
                    f" {', '.join(map(str, senders))}. Of later rounds nothing is said."
                )

    def _say(self, what: str, names: Iterable[str]) -> None:
        if new := sorted(set(names) - self._said):
            self._said.update(new)
            more = f" and {len(new) - _NAMES} more" if len(new) > _NAMES else ""
            rank_zero_warn(what.format(", ".join(map(repr, new[:_NAMES])) + more))


_NAMES = 10  # of which something is said in one round
# What is said once of a logged name.
AVERAGED = (
    "The logged {} cannot be merged over clients exactly (a value that the module computed itself, a wrapper such as"
    " MinMax or BootStrapper, a metric whose states do not add up over clients or that keeps part of its value in"
    " attributes beside them, or a name that clients log in different ways): it is the example-weighted mean of the"
    " clients' values. Log the torchmetrics object itself, with all that it needs in add_state, for the exact value."
)
_LEFT_OUT = "The logged {} is not a single number on any client: it is not logged for the round."


@contextmanager
def _closed(received: Iterable[Message]) -> Iterator[Iterable[Message]]:
    """Close what an engine gives after the block: its workers must not wait for the garbage collector."""
    try:
        yield received
    finally:
        if isinstance(received, Generator):
            received.close()


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's INFO lines of every round off the console, unless FLWR_LOG_LEVEL asks for them."""
    logger = logging.getLogger("flwr")
    level = logger.level
    if "FLWR_LOG_LEVEL" in os.environ or level == logging.WARNING:  # to set a level makes all loggers forget theirs
        yield
        return
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
