"""The messages and replies of one stage of one round; what clients send is checked here, before a strategy sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed.callbacks.base import ClientReport, CohortOwner, FailureOwner, Stage
from lightning_fed.engines.base import ClientGrid
from lightning_fed.errors import ClientError, FederationError, RoundError
from lightning_fed.server.methods import Methods, MethodTensors
from lightning_fed.server.roster import CohortGrid, Roster
from lightning_fed.strategies import WeightedMean
from lightning_fed.strategies.needs import needed_numbers, needs_change
from lightning_fed.strategies.own_metrics import all_inside, is_users
from lightning_fed.tracebacks import release_frames, words
from lightning_fed.values import metrics
from lightning_fed.values.weights import Weights, check_update, size_of
from lightning_fed.views import overrides
from lightning_fed.wire import messages
from lightning_fed.wire.extras import IntegerTensors, replace_weights
from lightning_fed.wire.reply import Expected, read_reply


@dataclass
class Terms:
    """What all exchanges of a run have in common.

    Attributes:
        strategy: Makes the messages.
        roster: Who is behind Flower's addresses.
        cohorts: Decides who takes part, and from which weights.
        failures: Decides what becomes of failed clients.
        tell: ``tell(hook, *arguments)`` calls a hook of all callbacks.
        seed: The run's seed.
        num_rounds: The rounds of the run, or -1 for no limit.
        timeout: Seconds to wait for the replies of one stage.
        max_examples: The greatest number of examples that a client is believed to have.
        methods: The methods that have tensors.
    """

    strategy: Strategy
    roster: Roster
    cohorts: CohortOwner
    failures: FailureOwner
    tell: Callable[..., None]
    seed: int
    num_rounds: int
    timeout: float
    max_examples: float
    methods: Methods


@dataclass
class About:
    """What is known of the names that clients logged.

    Attributes:
        rates: Those of learning rates.
        unlogged: Those that no client wants to have logged.
        on_bar: Those that a client wants on the progress bar.
    """

    rates: frozenset[str] = frozenset()
    unlogged: frozenset[str] = frozenset()
    on_bar: frozenset[str] = frozenset()

    def __or__(self, other: About) -> About:
        return About(self.rates | other.rates, self.unlogged | other.unlogged, self.on_bar | other.on_bar)

    def under(self, prefix: str) -> About:
        """Return the same of names with a prefix."""
        each = (self.rates, self.unlogged, self.on_bar)
        return About(*(frozenset(prefix + name for name in names) for names in each))


class Exchange:
    """The messages and replies of one stage of one round.

    Args:
        terms: What all exchanges of the run have in common.
        stage, round: Where it is.
        cohort: Who takes part, client indices, ascending.
        weights: The weights that the stage begins with.
        deadline: After how many seconds a client that has not replied is late, and has not failed; ``None`` for none.
    """

    def __init__(
        self,
        terms: Terms,
        stage: Stage,
        round: int,
        cohort: Sequence[int],
        weights: Weights,
        deadline: float | None = None,
    ) -> None:
        self.terms, self.stage, self.round, self.cohort = terms, stage, round, cohort
        self.deadline, self.late = deadline, 0
        self.weights = weights
        self._apart, self._size = IntegerTensors(weights), size_of(weights)
        self._methods = MethodTensors(terms.methods, round) if stage == "train" else None
        inside = list(all_inside(terms.strategy))
        self._expected = _expected(inside, terms.max_examples, weights, stage == "train")
        # Where a strategy of ours weighs all clients alike, integer tensors are weighed so, too.
        self._alike = any(isinstance(one, WeightedMean) and one.uniform for one in inside)
        self.states: list[tuple[float, list[metrics.MetricState]]] = []
        self.reported: list[tuple[float, dict[str, float]]] = []
        self._counted: list[int] = []  # the clients of these
        self.notes: dict[str, None] = {}
        self.good = self.failed = 0
        self.raised: Exception | None = None  # by a callback or the engine while the strategy read the replies

    def messages(self, grid: Grid) -> list[Message]:
        """Return what the strategy sends, in client order. (Flower shuffles, with the global random state.)

        Raises:
            RoundError: If the strategy raises.
        """
        strategy, roster = self.terms.strategy, self.terms.roster
        configure = strategy.configure_train if self.stage == "train" else strategy.configure_evaluate
        cohort_grid = CohortGrid(grid, [roster.node_of(client) for client in self.cohort])
        config = messages.round_config(self.round, self.terms.seed, self.terms.num_rounds)
        try:
            sent = list(configure(self.round, messages.pack(self._apart.averaged), config, cohort_grid))
        except FederationError:
            raise
        except Exception as error:
            raise RoundError(
                f"Round {self.round}: {name_of(strategy)} could not make the {self.stage} messages: {words(error)}",
                round=self.round,
                stage=self.stage,
            ) from error
        self._apart.attach(sent)
        sent.sort(key=lambda message: roster.client_of(message.metadata.dst_node_id))
        if self.stage == "train":
            begin = self.terms.cohorts.weights_to_client(self.round, self.weights)
            replace_weights(sent, {roster.node_of(client): own for client, own in begin.items()})
        if self._methods is not None:
            self._methods.attach(sent, roster.client_of)
        self.cohort = [roster.client_of(message.metadata.dst_node_id) for message in sent]
        return sent

    def replies(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Return the good replies in client order, as a strategy sees them; failures go to their owner."""
        try:
            yield from self._replies(replies)
        except Exception as error:
            self.raised = error
            raise

    def _replies(self, replies: Iterable[Message]) -> Iterator[Message]:
        waiting = {self.terms.roster.node_of(client): client for client in self.cohort}
        if isinstance(replies, Sequence):
            replies = sorted(replies, key=lambda reply: waiting.get(reply.metadata.src_node_id, -1))
        for reply in replies:
            client = waiting.pop(reply.metadata.src_node_id, None)
            if client is None:
                self._leave_out(reply)
                continue
            try:
                coefficient = self._accept(client, reply)
            except ClientError as error:
                self._failed(error)
                continue
            self.good += 1
            if coefficient:
                yield self._counted_as(client, reply)
            # Let it go before the iterator trains the next client.
            del reply
        for client in sorted(waiting.values()):
            if self.deadline is not None:
                self.late += 1
                self._undo(client)
                continue
            self._failed(self._error(client, f"did not reply within {self.terms.timeout:g} s."))

    def names(self, which: Callable[[metrics.MetricState], bool]) -> frozenset[str]:
        """Return the names of those of the clients' states of which something holds."""
        return frozenset(state.name for _, states in self.states for state in states if which(state))

    def about(self) -> About:
        """Return what clients tell of the names that they logged."""
        logged = self.names(lambda state: state.logged)
        return About(
            rates=self.names(lambda state: state.attribute == metrics.RATE),
            unlogged=self.names(lambda state: not state.logged) - logged,
            on_bar=self.names(lambda state: state.on_bar),
        )

    def senders_of_nan(self, name: str) -> list[int]:
        """Return the clients that logged NaN under a name, or whose metric has NaN among its states."""
        return [
            client
            for client, (_, states) in zip(self._counted, self.states, strict=True)
            if any(state.name == name and (state.has_nan or state.own != state.own) for state in states)
        ]

    def require_enough(self) -> None:
        """Check that there are as many good replies as the owner of failures asks for.

        Raises:
            RoundError: If there are fewer.
        """
        if self.late == len(self.cohort):
            raise RoundError(
                f"Round {self.round}: none of {self.late} clients replied within the deadline of {self.deadline:g} s.",
                round=self.round,
                stage=self.stage,
            )
        needed = self.terms.failures.min_results(len(self.cohort) - self.late)
        if self.good < needed:
            raise RoundError(
                f"Round {self.round}: {self.good} of {len(self.cohort)} clients gave a good {self.stage} reply, and"
                f" {needed} are needed. The weights of the round before are kept in the last checkpoint.",
                round=self.round,
                stage=self.stage,
            )

    def new_weights(self, arrays: ArrayRecord | None) -> Weights:
        """Return the global weights that the round gives, of what the strategy made of the replies.

        Raises:
            RoundError: If the strategy gave none, or some that cannot be used.
        """
        name = name_of(self.terms.strategy)
        if arrays is None:
            raise RoundError(
                f"Round {self.round}: {name} gave no new weights. It says why in Flower's log (FLWR_LOG_LEVEL=INFO);"
                " robust strategies need a minimum of replies.",
                round=self.round,
            )
        try:
            new = self._apart.merged(messages.unpack(arrays))
            check_update(new, self.weights)
        except ClientError as error:
            raise RoundError(
                f"Round {self.round}: {name} gave weights that {error}", round=self.round, tensor=error.tensor
            ) from None
        except Exception as error:
            raise RoundError(
                f"Round {self.round}: {name} gave weights that cannot be read: {words(error)}", round=self.round
            ) from error
        return {key: new[key].to(tensor.dtype) for key, tensor in self.weights.items()}

    def _accept(self, client: int, reply: Message) -> float:
        if reply.has_error():
            said, exception = messages.raised(reply)
            raise self._error(client, _explain(said, exception)) from exception
        try:
            read = read_reply(reply, self._expected)
            report = ClientReport(client, read.num_examples, read.scalars)
            if self._methods is not None:
                arrays = messages.first(reply.content, ArrayRecord) or ArrayRecord()
                report.bytes_down = self._size + self._methods.bytes_to(client)
                report.bytes_up = size_of(messages.unpack(arrays), read.extras.integers, read.extras.methods)
                self._methods.take(report, read.extras.methods)
        except ClientError as error:
            raise self._error(client, str(error), type(error), error.tensor) from None
        self.notes.update(dict.fromkeys(read.extras.notes))
        if self.stage == "train":
            self._apart.add(read.extras, 1.0 if self._alike else read.num_examples)
        if read.num_examples:
            self.states.append((read.num_examples, metrics.with_own(read.extras.states, read.scalars)))
            self.reported.append((read.num_examples, read.scalars))
            self._counted.append(client)
            self.terms.tell("on_client_end", self.round, self.stage, report)
        return read.num_examples

    def _counted_as(self, client: int, reply: Message) -> Message:
        """Return a reply with the weights with which it counts."""
        if self.stage == "train" and overrides(self.terms.cohorts, CohortOwner, "contribution"):
            records = [(key, one) for key, one in reply.content.items() if isinstance(one, ArrayRecord)]
            for key, record in records:
                own = messages.unpack(record)
                counts = self.terms.cohorts.contribution(self.round, client, own, self.weights)
                if counts is not own:
                    reply.content[key] = messages.pack(counts)
        return reply

    def _leave_out(self, reply: Message) -> None:
        rank_zero_warn(
            f"Round {self.round}, {self.stage}: a reply of node {reply.metadata.src_node_id} is left out: it has"
            " replied already, or nobody asked it."
        )

    def _error(
        self, client: int, what: str, kind: type[ClientError] = ClientError, tensor: str | None = None
    ) -> ClientError:
        message = f"Round {self.round}, {self.stage}: client {client} {what}"
        return kind(message, round=self.round, client=client, stage=self.stage, tensor=tensor)

    def _failed(self, error: ClientError) -> None:
        self.failed += 1
        if error.client is not None:
            self._undo(error.client)
        self.terms.failures.on_failure(error, self.failed, len(self.cohort))
        self.terms.tell("on_client_error", self.round, self.stage, error)
        release_frames(error)  # the user may keep it, and its frames have the client's weights and batches

    def _undo(self, client: int) -> None:
        """Let a client keep what it kept when the round began."""
        if self.stage == "train" and isinstance(self.terms.roster, ClientGrid):
            self.terms.roster.undo(client)


def _expected(inside: Sequence[Strategy], max_examples: float, weights: Weights, trains: bool) -> Expected:
    return Expected(
        weights,
        trains,
        frozenset(key for one in inside if isinstance(key := getattr(one, "weighted_by_key", None), str)),
        max_examples,
        records=not any(is_users(type(one), f"aggregate_{stage}") for one in inside for stage in ("train", "evaluate")),
        needed=needed_numbers(inside),
        needs_change=needs_change(inside),
    )


def name_of(strategy: Strategy) -> str:
    """Return a strategy's own name, or its class's."""
    return str(getattr(strategy, "name", type(strategy).__name__))


def _explain(said: str, exception: BaseException | None) -> str:
    return str(exception) if isinstance(exception, FederationError) else f"raised {said}"
