"""A federated method is one callback with three parts: server, wire, local training."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import Strategy
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.seeding import seed_for
from lightning_fed.strategies import WeightedMean
from lightning_fed.values.staying import Staying

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer
    from lightning_fed.values.data import ClientLoaders
    from lightning_fed.values.weights import Weights

Stage = Literal["train", "evaluate"]
Decision = Literal["partition", "cohort", "aggregation", "failures"]
Weighting = Literal["examples", "uniform"]

# The prefix of what clients find on their own held-out data; what they log in training keeps the user's names.
CLIENT_METRICS = "clients/"


@dataclass
class ClientReport:
    """What the server sees of one client's work in a round.

    Attributes:
        client: The client's index.
        num_examples: Its averaging coefficient: the examples that its loaders yield in an epoch.
        metrics: The numbers that it reports under the user's names.
        bytes_down: The bytes of the tensors that it was sent: weights, and those of methods.
        bytes_up: The bytes of those that it sent.
    """

    client: int
    num_examples: float
    metrics: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0


class FederatedCallback(Callback):
    """The base of all federated callbacks. It is a Lightning callback, too, with the server's trainer in every hook.

    A method overrides the parts that it needs:

    - **server**: ``server_strategy`` builds the Flower strategy, or wraps the one that another callback built;
    - **wire**: ``client_mods`` gives Flower client mods, which see each message and reply;
    - **local training**: ``local_callbacks`` gives plain Lightning callbacks for the clients' trainers. One of them may
      be a ``LocalMethod``, which gets tensors with the weights, sends some back and keeps some: ``tensors_to_client``
      and ``tensors_from_client`` are the server's side of it.

    What a callback *decides* has exactly one owner; any number may *watch* by the ``on_*`` hooks. State that must
    survive a restart goes into Lightning's ``state_dict`` / ``load_state_dict``.

    >>> class PrintCohort(FederatedCallback):
    ...     def on_round_start(self, trainer, round, stage, cohort):
    ...         print(f"round {round}: clients {cohort} {stage}")
    >>> PrintCohort().on_round_start(None, 1, "train", [0, 2])
    round 1: clients [0, 2] train
    """

    decides: ClassVar[frozenset[Decision]] = frozenset()

    @property
    def has_local_part(self) -> bool:
        """Whether ``local_callbacks``, where it is overridden, gives any: then all sites have to have this callback."""
        return True

    def server_strategy(self, strategy: Strategy | None) -> Strategy | None:
        """Return the strategy of the run.

        Args:
            strategy: ``None`` for the owner of ``"aggregation"``, who builds it; what the callbacks before built, for
                all others, who may wrap it.
        """
        return strategy

    def aggregation(self) -> Averaging | None:
        """Return the aggregation that the method is defined with, for where no callback decides it."""
        return None

    def stays(self, module: nn.Module) -> Staying:
        """Return which tensors of the module do not travel; it has the weights with which the fit begins."""
        return Staying()

    def client_mods(self, stage: Stage) -> Sequence[Mod]:
        """Return Flower mods around the client's ``"train"`` or ``"evaluate"`` function, outermost first."""
        return []

    def local_callbacks(self) -> Sequence[Callback]:
        """Return new Lightning callbacks for one client's local fit.

        Those of all methods come in the order of the methods, but first those with ``adds_to_objective = True``, which
        add a term's gradient: others then have the gradients of the whole objective, whatever the order in the list.
        """
        return []

    def pass_before(self) -> Sequence[Callback]:
        """Return new callbacks for a pass over a client's data before its fit, or none.

        The pass is a fit of one epoch from the weights received, which leaves no trace but what a ``LocalMethod`` among
        them sends: the method's part in the fit proper has that in ``received``, under ``"before/name"``. It has the
        terms that methods add to the objective (``adds_to_objective``), no other callbacks of methods, and copies of
        the client callbacks: what these do to batches and losses is part of the objective. Batches are not accumulated.
        """
        return []

    def tensors_to_client(self, trainer: FederatedTrainer, round: int, client: int) -> Mapping[str, Tensor]:
        """Return the tensors that a client is sent beside the weights when it trains, by name.

        Called for each client of the cohort, ascending, before any of them trains, and once more before the first round
        where clients may be vectorized. Strategies and mods do not see them.
        """
        return {}

    def tensors_expected(self, sent: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors like those that have to come back from a client: names, shapes, kinds of dtype.

        Args:
            sent: What ``tensors_to_client`` gave for it, which is what this gives by default.
        """
        return sent

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Check what a client has sent, beyond what is expected; nothing of it has been taken by anybody yet.

        Raises:
            ClientError: If it cannot be used: ``raise ClientError("sent ...")``.
        """

    def tensors_from_client(
        self, trainer: FederatedTrainer, round: int, report: ClientReport, tensors: Mapping[str, Tensor]
    ) -> None:
        """Take in what a client's ``LocalMethod`` has sent, after ``on_round_start`` and before ``on_round_end``.

        Called in client order, once for each good reply of the round, with finite tensors as they are expected. What
        of it goes into ``state_dict`` has to wait for ``on_round_end``.
        """

    def second_fit(self, received: Mapping[str, Tensor], first: Sequence[Callback]) -> Sequence[Callback]:
        """Return new callbacks for the fit of a second model, which a client keeps and evaluates in place of the other.

        A ``LocalMethod`` among them has a memory of its own; it receives nothing, and nothing that it sends goes out.
        Of the client callbacks the fit has those that the module's ``configure_callbacks`` gives.

        Args:
            received: The weights that the client was sent.
            first: The callbacks that methods had in the fit of the first model, which is over.
        """
        return []

    def in_time(self, trainer: FederatedTrainer, round: int, cohort: Sequence[int]) -> Sequence[int]:
        """Return those of a cohort whose replies will be there in time; the others do not train in the round.

        Args:
            trainer: The server's trainer.
            round: The round, from 1.
            cohort: Client indices, ascending: those whom the callbacks before have left.
        """
        return cohort

    def seconds_to_wait(self, trainer: FederatedTrainer, round: int) -> float | None:
        """Return when a round ends for those who train, in seconds: who has not replied is late, and has not failed."""
        return None

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Act once the data is dealt out and the strategy built; the first round is about to start."""

    def on_round_start(self, trainer: FederatedTrainer, round: int, stage: Stage, cohort: Sequence[int]) -> None:
        """Act before the cohort (client indices, ascending) trains or evaluates."""

    def on_client_end(self, trainer: FederatedTrainer, round: int, stage: Stage, report: ClientReport) -> None:
        """Act on a client's reply that is good."""

    def on_client_error(self, trainer: FederatedTrainer, round: int, stage: Stage, error: ClientError) -> None:
        """Act on a client's failure where the run goes on without it."""

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Act once clients are done with the round; ``metrics``, and what is added to them, are about to be logged."""


class PartitionOwner(FederatedCallback):
    """A callback that decides which data each client has."""

    decides = frozenset({"partition"})
    #: Whether what it deals out is the user's train loader, which then there has to be.
    deals_out: ClassVar[bool] = False

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        raise NotImplementedError

    def prepare(self, loader: object, seed: int) -> None:
        """Prepare for a fit, once, before the first round.

        Args:
            loader: What the user's ``train_dataloader`` gave, or ``None``.
            seed: The run's seed.
        """

    def client(self, client: int, *, round: int) -> ClientLoaders:
        """Return what a client trains and evaluates on."""
        raise NotImplementedError

    @property
    def source(self) -> object:
        """The user's code that makes a client's data, if there is any; its generators are seeded for each client."""
        return None

    def can_evaluate(self) -> bool:
        """Return whether clients may have data of their own to evaluate on."""
        return False

    @property
    def knows_sizes(self) -> bool:
        """Whether ``size_of`` takes no time."""
        return False

    def size_of(self, client: int) -> int | None:
        """Return the number of training examples of a client, or ``None`` where only training tells."""
        return None

    def sizes(self) -> list[int] | None:
        """Return those of all clients, or ``None`` where only training tells."""
        known = [size for client in range(self.num_clients) if (size := self.size_of(client)) is not None]
        return known if len(known) == self.num_clients else None


class CohortOwner(FederatedCallback):
    """A callback that decides which clients take part in a round; this one takes all of them."""

    decides = frozenset({"cohort"})
    min_available_clients = 1

    @property
    def varies(self) -> bool:
        """Whether another number of clients may take part in each round."""
        return False

    def size(self, stage: Stage, num_clients: int) -> int:
        """Return how many clients take part in a stage; where that varies, of the first round."""
        return num_clients

    def sample(self, stage: Stage, round: int, num_clients: int, seed: int) -> list[int]:
        """Return the cohort of a round: client indices, ascending.

        Args:
            stage: ``"train"`` or ``"evaluate"``.
            round: The round, from 1.
            num_clients: How many clients there are.
            seed: The run's seed.
        """
        size = self.size(stage, num_clients)
        if size == num_clients:
            return list(range(num_clients))
        return sorted(random.Random(seed_for(seed, f"cohort/{stage}", round=round)).sample(range(num_clients), size))

    def weights_to_client(self, round: int, weights: Weights) -> Mapping[int, Weights]:
        """Return what clients of the round begin with, by client, where it is not the round's weights.

        Called once a round, after ``sample``, before clients train; tensors are not to be written to.

        Args:
            round: The round, from 1.
            weights: Its weights: all tensors that travel.
        """
        return {}

    def contribution(self, round: int, client: int, trained: Weights, weights: Weights) -> Weights:
        """Return the weights with which a client counts in the aggregation: as it sent them, unless overridden.

        Args:
            round: The round, from 1.
            client: The client's index.
            trained: What it has sent: all floating and complex tensors.
            weights: The round's weights.
        """
        return trained


class FailureOwner(FederatedCallback):
    """A callback that decides what becomes of failed clients; this one stops the run at the first."""

    decides = frozenset({"failures"})

    def on_failure(self, error: ClientError, failed: int, cohort: int) -> None:
        """Act on a client's failure; raising stops the run.

        Args:
            error: What happened, with client, round and stage.
            failed: How many of the cohort have failed so far, this one included.
            cohort: How many clients were asked.
        """
        raise error

    def min_results(self, cohort: int) -> int:
        """Return how many good replies a round of ``cohort`` clients needs."""
        return cohort


class Averaging(FederatedCallback):
    """The base of all methods that start from the clients' mean.

    Args:
        weighting: ``"examples"`` weights a client by the examples of its epoch, ``"uniform"`` all alike.

    Raises:
        ConfigurationError: If ``weighting`` is neither.
    """

    decides = frozenset({"aggregation"})

    def __init__(self, weighting: Weighting = "examples") -> None:
        if weighting not in ("examples", "uniform"):
            raise ConfigurationError(f"{type(self).__name__}(weighting={weighting!r}): write 'examples' or 'uniform'.")
        self.weighting = weighting

    @property
    def uniform(self) -> bool:
        """Whether all clients weigh alike."""
        return self.weighting == "uniform"

    def server_strategy(self, strategy: Strategy | None) -> Strategy:
        """Return the weighted mean."""
        return WeightedMean(uniform=self.uniform)
