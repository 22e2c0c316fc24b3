"""What a client works on: the module, its data, its task and the options of all local fits, as one value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import Callback, LightningDataModule, LightningModule

from lightning_fed.client.local.elapsed import Plan
from lightning_fed.client.local.isolation import Isolation, making_data
from lightning_fed.seeding import seed_for
from lightning_fed.state.snapshot import DataSnapshot
from lightning_fed.values.by_round import total
from lightning_fed.values.data import ClientLoaders
from lightning_fed.values.staying import Staying
from lightning_fed.values.weights import Weights

ClientState = Literal["reset", "carry", "global"]


@dataclass
class LocalOptions:
    """What all local fits of a run have in common.

    Attributes:
        trainer: Arguments for each client's ``Trainer``.
        epochs: Local epochs a round; those of each, of which the last goes on; or ``None`` where ``steps`` counts.
        steps: Local optimizer steps a round, or ``None``.
        callbacks: The user's client callbacks, copied for each fit; the module's own are the last of them.
        module_callbacks: How many of these the module's ``configure_callbacks`` gave.
        method_callbacks: Builds the callbacks that federated methods bring, outermost first.
        client_state: What becomes of optimizers and schedulers from round to round.
        local_validation: Whether a fit validates on the client's held-out part.
        rounds: The rounds of the run as this process' script has them, or -1 for no limit.
        isolation: Restores module and datamodule after each local run.
        log_dir: The server's ``log_dir``.
        epochs_by: The name of the function that gives the epochs of a round, for a resumed run to compare.
        staying: Which tensors do not travel.
        pass_before: Builds the callbacks of a pass over a client's data before its fit, or ``None``.
        second_fit: ``second_fit(received, first)`` builds the callbacks of the fit of a client's own model, from those
            of methods in the fit before it; or ``None``.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    epochs: int | tuple[int, ...] | None = 1
    steps: int | None = None
    callbacks: Sequence[Callback] = ()
    module_callbacks: int = 0
    method_callbacks: Callable[[], Sequence[Callback]] = list
    client_state: ClientState = "global"
    local_validation: bool = False
    rounds: int = -1
    isolation: Isolation = field(default_factory=Isolation)
    log_dir: str | None = None
    epochs_by: str | None = None
    staying: Staying = field(default_factory=Staying)
    pass_before: Callable[[], Sequence[Callback]] | None = None
    second_fit: Callable[[Weights, Sequence[Callback]], Sequence[Callback]] | None = None

    def epochs_of(self, round: int) -> int | None:
        """Return the local epochs of a round, or ``None`` where ``steps`` counts."""
        return self.epochs[min(round, len(self.epochs)) - 1] if isinstance(self.epochs, tuple) else self.epochs

    def first_epoch(self, round: int) -> int:
        """Return the number of the first epoch of a round: a client's epochs count on from round to round."""
        return total(self.epochs or 1, round - 1)

    def plan(self, round: int, rounds: int | None = None) -> Plan:
        """Return how the run divides a client's training into rounds.

        Args:
            round: The round at hand.
            rounds: The rounds of the run as the server has them; ``None`` if it does not say.
        """
        rounds = self.rounds if rounds is None else rounds
        # A server that runs more rounds than it has told must not find that there is nothing left to train.
        rounds = rounds if rounds == -1 else max(rounds, round)
        by_round = self.epochs if isinstance(self.epochs, tuple) else ()
        return Plan(self.epochs_of(round), self.steps, rounds, self.client_state == "reset", by_round)


@dataclass
class LocalTask:
    """What one client does in one round.

    Attributes:
        client: The client's index.
        round: The round, from 1.
        seed: The run's seed.
        weights: The round's weights.
        state: What the client kept of its last fit, by ``FitState.dump``.
        callback_states: What its callbacks kept, by ``fit_state.dump_callbacks``.
        received: What the server's methods sent beside the weights, by ``"method/name"``.
        memory: What its methods keep, likewise.
        set_up: Whether the module has to be set up.
        rounds: The rounds of the run as the server has them, or -1 for no limit; ``None`` if it does not say.
    """

    client: int
    round: int
    seed: int
    weights: Weights
    state: bytes | None = None
    callback_states: bytes | None = None
    received: Weights = field(default_factory=dict)
    memory: Weights = field(default_factory=dict)
    set_up: bool = False
    rounds: int | None = None

    def seed_of(self, purpose: str) -> Callable[[str], int]:
        """Give the seed of what draws for a purpose: of the generator at a path, of everybody's for an empty path."""
        seed, round, client = self.seed, self.round, self.client  # and not the task, which has weights
        return lambda path: seed_for(seed, f"{purpose}/{path}" if path else purpose, round=round, client=client)

    @contextmanager
    def making_data(self, maker: object) -> Iterator[None]:
        """Let the user's code make the client's data in the block: a random split is the same in each round and stage.

        Args:
            maker: What holds that code, and maybe generators of its own.
        """
        with making_data(DataSnapshot({"data": maker}), self.seed, self.client):
            yield


@dataclass
class LocalWork:
    """What a client works on.

    Attributes:
        module: The module; the server's own within one process.
        datamodule: The server's datamodule, whose hooks apply to the client's batches, or ``None``.
        loaders: The client's data.
        task: Client, round, seed and weights.
        options: What all local fits have in common.
    """

    module: LightningModule
    datamodule: LightningDataModule | None
    loaders: ClientLoaders
    task: LocalTask
    options: LocalOptions

    @property
    def plan(self) -> Plan:
        """How the run divides the client's training into rounds."""
        return self.options.plan(self.task.round, self.task.rounds)

    @property
    def first_epoch(self) -> int:
        """The number of the round's first epoch."""
        return self.options.first_epoch(self.task.round)


WorkOf = Callable[[LocalTask], LocalWork]
