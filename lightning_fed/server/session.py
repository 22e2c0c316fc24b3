"""One fit: the rounds of its clients over a grid, from the time when the module is set up to the fit's end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import RecordDict
from flwr.serverapp import Grid
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_fed.callbacks.base import CLIENT_METRICS
from lightning_fed.client.local.work import LocalTask
from lightning_fed.client.setup import setup_of
from lightning_fed.client.side import ClientSide
from lightning_fed.engines.base import ClientGrid, LocalGrid
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_all, seed_for
from lightning_fed.server import placement
from lightning_fed.server.checkpoint import RunState
from lightning_fed.server.inputs import FitInputs, Settings
from lightning_fed.server.methods import Methods
from lightning_fed.server.owners import Owners
from lightning_fed.server.roster import RollCall, Roster
from lightning_fed.server.rounds import RoundResult, Rounds
from lightning_fed.server.script import Script, arguments_of
from lightning_fed.server.summary import summary, what_travels, where_results_go
from lightning_fed.strategies.client_part import require_client_part
from lightning_fed.values import weights
from lightning_fed.values.module_form import form_of
from lightning_fed.wire import roll_call

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


@dataclass
class RunningRound:
    """The round that runs: until its new weights are applied, a checkpoint holds what it began with.

    Attributes:
        before: The global weights that it began with.
        new: Those that it gave; as ``before`` while it has given none.
        methods: What methods with tensors had in a checkpoint when it began, by ``state_key``.
    """

    before: weights.Weights
    new: weights.Weights
    methods: dict[str, Any]


class Session:
    """The rounds of one fit. Builds the strategy; before the first round, ``start`` loads what a checkpoint holds.

    Args:
        given: What the fit was given.
        owners: Who decides what.
        settings: What all fits of the trainer have in common.
        trainer: The server's trainer; its module is set up.

    Attributes:
        state: What the run keeps from round to round.
        num_clients: How many clients there are.
        has_clients: Whether they are simulated, on this machine or with all that they have from it.
        staying: Which tensors do not travel.

    Raises:
        ConfigurationError: If strategy, callbacks and clients do not fit together.
    """

    def __init__(self, given: FitInputs, owners: Owners, settings: Settings, trainer: FederatedTrainer) -> None:
        self._side, self._owners, self._settings, self._trainer = given.side, owners, settings, trainer
        self._module, self._engine = given.side.module, given.engine
        # A grid that is not ours can only carry messages.
        ours = given.grid if isinstance(given.grid, ClientGrid) else None
        self.has_clients = isinstance(ours, LocalGrid)
        self._has_probed = not self.has_clients
        if isinstance(ours, LocalGrid):
            given.deal.open()
            if settings.client_storage is not None:
                ours.keep_in(settings.client_storage)
        self.staying = owners.staying(self._module)
        given.side.take_staying(self.staying)
        strategy = owners.build_strategy(self._module)
        require_client_part(strategy, self._side.mods["train"], knows_clients=self.has_clients)
        roster = self._roster_of(given.grid)
        self.num_clients = roster.num_clients
        self._methods = Methods(owners.training(), trainer)
        self.rounds = Rounds(
            given.grid,
            roster,
            strategy,
            callbacks=owners.callbacks,
            cohorts=owners.cohorts,
            failures=owners.failures,
            methods=self._methods,
            trainer=trainer,
            module=self._module,
            seed=settings.seed,
            timeout=settings.timeout,
            max_examples=settings.max_examples,
            max_clients=settings.max_clients,
            num_rounds=self._side.options.rounds,
        )
        owners.check_cohort(self.num_clients, settings.max_clients)
        self._warn_of_monitors()
        script = given.resumed.script if given.resumed else self.script_of(given.side, owners, trainer)
        self.state = RunState(settings.seed, self.num_clients, ours, strategy, script, owners.client_names())
        self._found = given.resumed.found if given.resumed else None
        self._running: RunningRound | None = None

    def _roster_of(self, grid: Grid) -> Roster:
        """Return who is behind a grid, once they are there."""
        if isinstance(grid, ClientGrid):
            grid.gather(self._question)
            return grid
        if hasattr(grid, "client_states"):
            raise ConfigurationError(
                f"The engine's grid is a {type(grid).__name__} around one of ours, which hides what ours can do beyond"
                " carrying messages: derive it from lightning_fed.engines.base.LocalGrid."
            )
        if self._side.dispatcher is not None:
            self._side.dispatcher.refuse("they are behind a grid of Flower's own")
        rank_zero_info(where_results_go(self._trainer))
        owners = self._owners
        return RollCall(grid, self._settings.timeout, owners.least_clients(), owners.known_clients())

    def _question(self) -> RecordDict:
        """Return what a client from elsewhere is asked: whether it is set up as the server is."""
        side = self._side
        setup = setup_of(side.options, side.methods, side.mods, side.options.rounds)
        form = form_of(self._module, self.staying)
        return roll_call.question(form, self._settings.seed, side.options.rounds, setup)

    @staticmethod
    def script_of(side: ClientSide, owners: Owners, trainer: FederatedTrainer) -> Script:
        """Return how the script sets the run up."""
        return Script.of(side.options, side.module, owners.callbacks, trainer.callbacks)

    def start(self) -> None:
        """Load what a checkpoint holds, look whether ``configure_optimizers`` can work, and say who takes part.

        Raises:
            ConfigurationError: If checkpoint, strategy and module do not fit together.
        """
        found, self._found = self._found, None  # which is as large as the strategy's and the clients' state
        if found is not None and found.state != {}:
            self.state.restore(found, arguments_of(self._trainer.callbacks))
        if self.has_clients:
            with self._weights_kept() as before:
                self._side.look_ahead(before, self._settings.seed)
        trainer = self._trainer
        where = f"{self._engine} on {trainer.strategy.root_device}, seed {self._settings.seed}"
        evaluates = self._evaluates(trainer.check_val_every_n_epoch or 1)
        travels = what_travels(self.staying, weights.read(self._module, copy=False))
        rank_zero_info(
            summary(self._owners, self.num_clients, trainer.max_epochs, where, evaluates, self.has_clients, travels)
        )
        for callback in self._owners.callbacks:
            callback.on_federation_start(trainer)

    def run_round(self) -> RoundResult:
        """Run one round; if it fails the module has the weights of before."""
        round, before = self._trainer.current_round, weights.read(self._module)
        self._running = running = RunningRound(before, before, self._methods.states())
        self.state.begin_round()
        if not self._has_probed:
            self._has_probed = True
            self._probe_vectorized()
        evaluates = self._evaluates(round)
        try:
            result = self.rounds.run(round, self.staying.shared(before), evaluates)
        except BaseException:
            weights.load(self._module, before)
            raise
        running.new = {name: result.weights.get(name, tensor) for name, tensor in before.items()}
        self._trainer.forget_earlier(result.metrics, evaluates)
        # What the server draws from here on (its validation) depends on the round alone, also after a restart.
        seed_all(seed_for(self._settings.seed, "server", round=round))
        return result

    def apply_weights(self) -> None:
        """Load the round's new weights into the module."""
        if self._running is not None:
            weights.load(self._module, self._running.new)
            self._running = None
            self.state.end_round()

    def weights_before(self) -> weights.Weights | None:
        """Return the global weights in the middle of a round, where the module may have a client's; else ``None``."""
        return None if self._running is None else self._running.before

    def states_before(self) -> dict[str, Any]:
        """Return what a checkpoint holds of methods in the middle of a round, by ``state_key``."""
        return {} if self._running is None else self._running.methods

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Give the module the global weights while a checkpoint is saved, also in the middle of a round."""
        if self._running is None:
            yield
            return
        with self._weights_kept():
            weights.load(self._module, self._running.before)
            yield

    @contextmanager
    def _weights_kept(self) -> Iterator[weights.Weights]:
        """Give the module's weights, which it has again after the block."""
        present = weights.read(self._module)
        try:
            yield present
        finally:
            weights.load(self._module, present)

    def _probe_vectorized(self) -> None:
        """Can clients be vectorized?"""
        stages = ["train", "evaluate"] if self._evaluates(self._trainer.check_val_every_n_epoch or 1) else ["train"]
        with self._weights_kept() as before:
            clients, seed = min(self._owners.partition.num_clients, 2), self._settings.seed
            tasks = [
                LocalTask(
                    client, 1, seed, before, received=self._methods.to_client(self._trainer.current_round, client)
                )
                for client in range(clients)
            ]
            self._side.probe_vectorized(stages, tasks)

    def _evaluates(self, round: int) -> bool:
        """Return whether clients evaluate in a round."""
        every = self._trainer.check_val_every_n_epoch or 1
        return (
            round % every == 0
            and self._owners.partition.can_evaluate()
            and is_overridden("validation_step", self._module, LightningModule)
        )

    def _warn_of_monitors(self) -> None:
        """Clients that change from round to round are no measure of it."""
        evaluate = self._owners.cohorts.size("evaluate", self.num_clients)
        monitors = placement.monitors_of_a_part(self._trainer.callbacks, CLIENT_METRICS)
        if monitors and 0 < evaluate < self.num_clients:
            rank_zero_warn(
                f"{' and '.join(monitors)}: {evaluate} of {self.num_clients} clients evaluate in a round, each round"
                " others, so the metric jumps with who they are. Let all evaluate, fraction_evaluate=1.0, or monitor"
                " the server's own validation."
            )
