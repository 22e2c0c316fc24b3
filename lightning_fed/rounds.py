"""THE LOOP: one federated round in four steps.

::

    on_federation_start()                                       # once: data dealt out, strategy built
    for round in 1 .. max_rounds:                               # Lightning's epochs
        cohort   = participation.sample("train", round)         # from (seed, round)
        on_round_start(round, "train", cohort)
        messages = strategy.configure_train(round, weights)     # 1  the strategy makes the train messages
        replies  = grid.send_and_receive(messages)              # 2  clients train, one by one as they are read
        for reply in replies:                                   #    in client order; checked
            on_client_end(report)  or  on_client_error(error)
        weights  = strategy.aggregate_train(round, replies)     # 3  the strategy makes the new weights
        the same for "evaluate" with the new weights            # 4  clients evaluate
        on_round_end(round, metrics)
        server optimizer takes the weights over; validation, logging, checkpoints, stopping: Lightning's
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_fed import messages, metrics
from lightning_fed.callbacks.base import (
    CLIENT_METRICS,
    ClientReport,
    CohortOwner,
    FailureOwner,
    FederatedCallback,
    Stage,
)
from lightning_fed.errors import ClientError, FederationError, RoundError
from lightning_fed.roster import CohortGrid, RollCall, Roster
from lightning_fed.seeding import seed_for, seeded
from lightning_fed.weights import RunningMean, Weights, check_update, split


@dataclass
class RoundResult:
    """What a round gave: the new weights, and the numbers to log by name."""

    weights: Weights
    metrics: dict[str, float]


class Rounds:
    """Runs rounds over a Flower grid.

    Args:
        grid: Where the clients are reached.
        strategy: The Flower strategy; it sees only the cohort.
        callbacks: All federated callbacks, in the user's order.
        cohorts: Decides who takes part.
        failures: Decides what becomes of failed clients.
        trainer: The server's trainer, handed to the callbacks' hooks.
        module: The server's module; its metrics tell how metric states merge.
        seed: The run's seed.
        timeout: Seconds to wait for the replies of one stage, and for clients to connect.
        max_clients: Truncates cohorts (``fast_dev_run``).
    """

    def __init__(
        self,
        grid: Grid,
        strategy: Strategy,
        *,
        callbacks: Sequence[FederatedCallback],
        cohorts: CohortOwner,
        failures: FailureOwner,
        trainer: Trainer,
        module: nn.Module,
        seed: int,
        timeout: float = 3600.0,
        max_clients: int | None = None,
    ) -> None:
        self.grid, self.strategy, self.callbacks = grid, strategy, callbacks
        self.cohorts, self.failures = cohorts, failures
        self.trainer, self.module = trainer, module
        self.seed, self.timeout, self.max_clients = seed, timeout, max_clients
        self.roster: Roster = (
            cast(Roster, grid) if hasattr(grid, "client_of") else RollCall(grid, timeout, cohorts.min_available_clients)
        )
        self._said: set[str] = set()

    def run(self, round: int, weights: Weights, evaluate: bool) -> RoundResult:
        """One round.

        Args:
            round: The round, from 1.
            weights: The global weights, which are not written to.
            evaluate: Whether clients evaluate the new weights on their own data.

        Raises:
            ClientError: If a client failed and the run may not go on without it.
            RoundError: If there are too few good replies, or the strategy gave no usable weights.
        """
        with quiet_flower():
            trained = self._stage("train", round, weights)
            if trained is None:
                raise RoundError(f"Round {round}: no client was chosen to train.", round=round, stage="train")
            logged = trained.metrics
            if evaluate:
                evaluated = self._stage("evaluate", round, trained.weights)
                if evaluated is not None:
                    logged.update({f"{CLIENT_METRICS}{name}": v for name, v in evaluated.metrics.items()})
        self._tell("on_round_end", round, logged)
        return RoundResult(trained.weights, logged)

    def _stage(self, stage: Stage, round: int, weights: Weights) -> RoundResult | None:
        cohort = self.cohorts.sample(stage, round, self.roster.num_clients, self.seed)[: self.max_clients]
        if not cohort:
            return None
        exchange = Exchange(self, stage, round, cohort, weights)
        with seeded(seed_for(self.seed, f"strategy/{stage}", round=round)):
            sent = exchange.messages()
            if not sent:
                return None
            self._tell("on_round_start", round, stage, exchange.cohort)
            replies = exchange.replies(self.grid.send_and_receive(sent, timeout=self.timeout))
            averaged, extra = self._aggregate(exchange, replies)
        for _ in replies:  # a strategy that stopped reading must not hide a failure
            pass
        exchange.require_enough()
        merged, averaged_only = metrics.merge(exchange.states, self.module)
        self._say_averaged(averaged_only)
        logged = {**extra, **merged}
        if stage == "evaluate":
            return RoundResult({}, logged)
        return RoundResult(self._new_weights(round, weights, averaged, exchange.integers.value()), logged)

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
                f"Round {round}: {_name(self.strategy)} could not aggregate the {stage} replies:"
                f" {type(error).__name__}: {error}",
                round=round,
                stage=stage,
            ) from error
        return arrays, messages.scalars(record)

    def _new_weights(self, round: int, old: Weights, arrays: ArrayRecord | None, integers: Weights) -> Weights:
        name = _name(self.strategy)
        if arrays is None:
            raise RoundError(
                f"Round {round}: {name} gave no new weights. It says why in Flower's log (FLWR_LOG_LEVEL=INFO); robust"
                " strategies need a minimum of replies.",
                round=round,
            )
        new = {**messages.unpack(arrays), **integers}
        try:
            check_update(new, old)
        except ClientError as error:
            raise RoundError(
                f"Round {round}: {name} gave weights that {error}", round=round, tensor=error.tensor
            ) from None
        return {key: new[key] for key in old}

    def _tell(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self.trainer, *args)

    def _say_averaged(self, names: Iterable[str]) -> None:
        if new := sorted(set(names) - self._said):
            self._said.update(new)
            rank_zero_warn(
                f"The logged {', '.join(map(repr, new))} cannot be merged over clients exactly (a metric that the"
                " module already computed, or a wrapper such as MinMax or BootStrapper): it is the example-weighted"
                " mean of the clients' values. Log the torchmetrics object itself for the exact value."
            )


class Exchange:
    """The messages and replies of one stage of one round."""

    def __init__(self, rounds: Rounds, stage: Stage, round: int, cohort: Sequence[int], weights: Weights) -> None:
        self.rounds, self.stage, self.round, self.cohort = rounds, stage, round, cohort
        self.averaged, self.integer_weights = split(weights)
        self.integers = RunningMean()
        self.states: list[tuple[float, list[metrics.MetricState]]] = []
        self.good = self.failed = 0
        self.raised: Exception | None = None  # by a callback or the engine while the strategy read the replies

    def messages(self) -> list[Message]:
        """What the strategy sends, in client order. (Flower shuffles, with the global random state.)"""
        rounds, train = self.rounds, self.stage == "train"
        configure = rounds.strategy.configure_train if train else rounds.strategy.configure_evaluate
        grid = CohortGrid(rounds.grid, [rounds.roster.node_of(client) for client in self.cohort])
        config = messages.round_config(self.round, rounds.seed)
        sent = list(configure(self.round, messages.pack(self.averaged), config, grid))
        messages.attach_integers(sent, self.integer_weights)
        sent.sort(key=lambda message: rounds.roster.client_of(message.metadata.dst_node_id))
        self.cohort = [rounds.roster.client_of(message.metadata.dst_node_id) for message in sent]
        return sent

    def replies(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The good replies in client order, as a strategy sees them; failures go to their owner."""
        try:
            yield from self._replies(replies)
        except Exception as error:
            self.raised = error
            raise

    def _replies(self, replies: Iterable[Message]) -> Iterator[Message]:
        client_of = self.rounds.roster.client_of
        if isinstance(replies, Sequence):
            replies = sorted(replies, key=lambda reply: client_of(reply.metadata.src_node_id))
        waiting = set(self.cohort)
        for reply in replies:
            client = client_of(reply.metadata.src_node_id)
            waiting.discard(client)
            try:
                coefficient = self._accept(client, reply)
            except ClientError as error:
                self._failed(error)
                continue
            self.good += 1
            if coefficient:
                yield reply
            # Let it go before the iterator trains the next client.
            del reply
        for client in sorted(waiting):
            self._failed(self._error(client, f"did not reply within {self.rounds.timeout:g} s."))

    def require_enough(self) -> None:
        """Raises:
        RoundError: If there are fewer good replies than the owner of failures asks for.
        """
        needed = self.rounds.failures.min_results(len(self.cohort))
        if self.good < needed:
            raise RoundError(
                f"Round {self.round}: {self.good} of {len(self.cohort)} clients gave a good {self.stage} reply, and"
                f" {needed} are needed. The weights of the round before are kept in the last checkpoint.",
                round=self.round,
                stage=self.stage,
            )

    def _accept(self, client: int, reply: Message) -> float:
        if reply.has_error():
            exception = reply.error.__dict__.get("exception")
            raise self._error(client, _explain(reply, exception)) from exception
        extras = messages.detach_extras(reply)
        coefficient = messages.num_examples(reply)
        if self.stage == "train":
            self._check_weights(client, reply, extras.integers, coefficient)
            if extras.integers:
                # A strategy that weighs all clients alike (ours say so) gets it for these, too.
                alike = getattr(self.rounds.strategy, "uniform", False)
                self.integers.add(extras.integers, 1.0 if alike else coefficient)
        if coefficient:
            self.states.append((coefficient, extras.states))
            report = ClientReport(client, coefficient, messages.reply_scalars(reply))
            self.rounds._tell("on_client_end", self.round, self.stage, report)
        return coefficient

    def _check_weights(self, client: int, reply: Message, integers: Weights, coefficient: float) -> None:
        arrays = messages.first(reply.content, ArrayRecord)
        if arrays is None:
            raise self._error(client, "sent no weights.")
        if not coefficient > 0:
            raise self._error(client, f"reports {coefficient:g} examples; it cannot be averaged.")
        try:
            check_update({**messages.unpack(arrays), **integers}, {**self.averaged, **self.integer_weights})
        except ClientError as error:
            raise self._error(client, str(error), type(error), error.tensor) from None

    def _error(
        self, client: int, what: str, kind: type[ClientError] = ClientError, tensor: str | None = None
    ) -> ClientError:
        message = f"Round {self.round}, {self.stage}: client {client} {what}"
        return kind(message, round=self.round, client=client, stage=self.stage, tensor=tensor)

    def _failed(self, error: ClientError) -> None:
        self.failed += 1
        self.rounds.failures.on_failure(error, self.failed, len(self.cohort))
        self.rounds._tell("on_client_error", self.round, self.stage, error)


def _explain(reply: Message, exception: BaseException | None) -> str:
    if isinstance(exception, FederationError):
        return str(exception)
    lines = (reply.error.reason or "unknown error").strip()
    return f"raised {lines.splitlines()[-1]}\nThe client's traceback:\n{lines}"


def _name(strategy: Strategy) -> str:
    return str(getattr(strategy, "name", type(strategy).__name__))


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keeps Flower's INFO lines of every round off the console, unless FLWR_LOG_LEVEL asks for them."""
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
