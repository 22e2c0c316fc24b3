"""What one fit holds together: the data dealt out, the strategy, the rounds, and their state in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_fed._compat.known_lightning import is_known, why_slower
from lightning_fed._compat.lightning import set_train_source
from lightning_fed.callbacks.base import CLIENT_METRICS
from lightning_fed.client.app import ClientSide
from lightning_fed.engines.base import LocalGrid
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_all, seed_for
from lightning_fed.server import placement
from lightning_fed.server.checkpoint import Found, RunState
from lightning_fed.server.deal import Deal
from lightning_fed.server.exchange import About
from lightning_fed.server.owners import Owners
from lightning_fed.server.rounds import Rounds
from lightning_fed.server.script import Script, arguments_of
from lightning_fed.server.summary import summary
from lightning_fed.server.view import RoundLoader
from lightning_fed.strategies import ServerOptimizer
from lightning_fed.strategies.client_part import require_client_part
from lightning_fed.values import weights
from lightning_fed.wire.checkpoint_file import FEDERATION


class Federation(Callback):
    """The server's part of a fit at Lightning's hooks; one for each ``FederatedTrainer``.

    Args:
        owners: Who decides what.
        seed: The run's seed.
        timeout: Seconds to wait for replies.
        max_clients: Truncates cohorts (``fast_dev_run``).
        engine: The engine's name, for the summary.

    Attributes:
        metrics: What the clients of the last round gave.
        has_begun: Whether the fit has got to its first round; ``True`` outside of a fit.
    """

    def __init__(self, owners: Owners, seed: int, timeout: float, max_clients: int | None, engine: str) -> None:
        self.owners, self.seed, self.timeout, self.max_clients = owners, seed, timeout, max_clients
        self.engine = engine
        self.metrics: dict[str, float] = {}
        self.about = About()
        self._grid: Grid | None = None
        self._deal: Deal | None = None
        self._side: ClientSide | None = None
        self._module: LightningModule | None = None
        self._rounds: Rounds | None = None
        self._state: RunState | None = None
        self._found: Found | None = None
        self._script: Script | None = None
        self._new: weights.Weights | None = None
        self._before: weights.Weights | None = None
        self._undecided = True
        self.has_begun = True
        self._kept: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A pickle has no grid and no clients; what a checkpoint needs of them is in it."""
        arguments = self.owners, self.seed, self.timeout, self.max_clients, self.engine
        return {"arguments": arguments, "metrics": self.metrics, "about": self.about, "_kept": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state.pop("arguments"))  # type: ignore[misc]
        self.__dict__.update(state)

    @property
    def state_key(self) -> str:
        """The key of the federation's state in a checkpoint."""
        return FEDERATION

    def begin(self, grid: Grid, deal: Deal, side: ClientSide) -> None:
        """Takes up a grid; Lightning's fit follows."""
        self._grid, self._deal, self._side, self._module = grid, deal, side, side.module
        self._found = self._script = self._rounds = self._state = self._before = None
        self._undecided, self.has_begun = True, False

    def end(self) -> None:
        """Lets the grid and all data go; what a checkpoint saved after the fit needs is kept."""
        self.has_begun = True
        self._deal = self._side = self._module = self._rounds = self._new = None

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """The list of callbacks is whole: the module's own have joined it."""
        if self._deal is None or self._side is None:
            return  # not our fit, but a validation or test
        trainer.take_up_callbacks()
        self._deal.owner, self._side.mods = self.owners.partition, self.owners.mods()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is set up: deals the data out, builds the strategy, takes up what a checkpoint holds."""
        assert self._grid is not None
        assert self._deal is not None
        assert self._side is not None
        self._side.options.log_dir = trainer.log_dir
        # To Lightning alone: who asks the datamodule for its train loader in a hook gets the user's own.
        set_train_source(trainer, RoundLoader())
        weights.refuse_unfit(pl_module)
        if not is_known():
            rank_zero_warn(why_slower())
        if self._is_ours:
            self._deal.open()
        strategy = self._build_strategy(pl_module)
        require_client_part(strategy, self._side.mods["train"], knows_clients=self._is_ours)
        self._rounds = Rounds(
            self._grid,
            strategy,
            callbacks=self.owners.callbacks,
            cohorts=self.owners.cohorts,
            failures=self.owners.failures,
            trainer=trainer,
            module=pl_module,
            seed=self.seed,
            timeout=self.timeout,
            max_clients=self.max_clients,
        )
        clients = self._rounds.roster.num_clients
        self._check_cohort(clients)
        self._warn_of_monitors(trainer, clients)
        self._state = RunState(self.seed, clients, self._grid, strategy, self._script or self._read_script(trainer))
        if self._found is not None and self._found.state != {}:
            self._state.restore(self._found, arguments_of(trainer.callbacks))  # type: ignore[attr-defined]
        self._found = None
        if self._is_ours:
            self._look_ahead()
        rank_zero_info(self._summary(trainer))
        for callback in self.owners.callbacks:
            callback.on_federation_start(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rounds begin, or go on: from here on there is something to save."""
        self.has_begun = True

    def run_round(self, trainer: Any) -> None:
        """One round; if it fails the module has the weights of before."""
        assert self._rounds is not None
        assert self._module is not None
        assert self._state is not None
        round, before = trainer.current_epoch + 1, weights.read(self._module)
        self._before = before
        self._state.begin_round()
        if self._is_ours and self._undecided:
            self._decide_together(trainer, before)
        evaluates = self._evaluates(trainer, round)
        try:
            result = self._rounds.run(round, before, evaluates)
        except BaseException:
            weights.load(self._module, before)
            raise
        trainer.forget_earlier(result.metrics, evaluates)
        self._new, self.metrics, self.about = result.weights, result.metrics, result.about
        # What the server draws from here on (its validation) depends on the round alone, also after a restart.
        seed_all(seed_for(self.seed, "server", round=round))

    def _look_ahead(self) -> None:
        """Before the first round: does ``configure_optimizers`` give what can work?"""
        assert self._side is not None
        before = weights.read(self._side.module)
        try:
            self._side.look_ahead(before, self.seed)
        finally:
            weights.load(self._side.module, before)

    def _decide_together(self, trainer: Trainer, before: weights.Weights) -> None:
        """Before the first round: can clients be vectorized?"""
        assert self._side is not None
        assert self._module is not None
        self._undecided = False
        stages = ["train", "evaluate"] if self._evaluates(trainer, trainer.check_val_every_n_epoch or 1) else ["train"]
        try:
            self._side.probe_vectorized(stages, self.owners.partition.num_clients, before, self.seed)
        finally:
            weights.load(self._module, before)

    def take_over(self) -> None:
        """Loads the round's new weights into the module."""
        assert self._module is not None
        assert self._new is not None
        assert self._state is not None
        weights.load(self._module, self._new)
        self._new = self._before = None
        self._state.end_round()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While a checkpoint is saved, also in the middle of a round, the module has the global weights."""
        if self._before is None or self._module is None:
            yield
            return
        present = weights.read(self._module)
        weights.load(self._module, self._before)
        try:
            yield
        finally:
            weights.load(self._module, present)

    def state_dict(self) -> dict[str, Any]:
        """What the run keeps from round to round; tensors and plain values only.

        In the middle of a round, or after one that failed: what stood when it began, for it will be run again.
        """
        return self._kept if self._state is None else self._state.save()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run is resumed: notes how the script sets it up, before callbacks load what the checkpoint holds."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._script = self._read_script(trainer)
            callbacks = checkpoint["callbacks"]
            state = callbacks.get(self.state_key, {})  # Lightning loads no state that is empty, of whatever kind
            self._found = Found(str(trainer.ckpt_path), int(checkpoint["global_step"]), set(callbacks), state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until the strategy is built."""
        if self._found is not None:
            self._found.state = state_dict

    def _read_script(self, trainer: Trainer) -> Script:
        assert self._side is not None
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return Script.of(self._side.options, self._side.module, self.owners.callbacks, callbacks)

    @property
    def _is_ours(self) -> bool:
        """Whether the clients are in this process, with their data and their state."""
        return isinstance(self._grid, LocalGrid)

    def _build_strategy(self, module: LightningModule) -> Strategy:
        strategy: Strategy | None = None
        callbacks = sorted(self.owners.callbacks, key=lambda callback: "aggregation" not in callback.decides)
        for callback in callbacks:
            strategy = callback.server_strategy(strategy)
            if strategy is None:
                raise ConfigurationError(f"{type(callback).__name__}.server_strategy() gave no strategy.")
            if isinstance(strategy, ServerOptimizer) and strategy.parameters is None:
                strategy.parameters = weights.parameter_names(module)
        assert strategy is not None  # some callback always decides the aggregation
        return strategy

    def _check_cohort(self, clients: int) -> None:
        for stage in ("train", "evaluate"):
            self.owners.cohorts.size(stage, clients)  # type: ignore[arg-type]
        cohort = self.owners.cohorts.size("train", clients)
        cohort = min(cohort, self.max_clients or cohort)
        if (needed := self.owners.failures.min_results(cohort)) > cohort:
            raise ConfigurationError(
                f"{type(self.owners.failures).__name__}(min_results={needed}) can never be met: {cohort} clients train"
                " in a round."
            )

    def _warn_of_monitors(self, trainer: Trainer, clients: int) -> None:
        """Clients that change from round to round are no measure of it."""
        evaluate = self.owners.cohorts.size("evaluate", clients)
        monitors = placement.monitors_of_a_part(trainer.callbacks, CLIENT_METRICS)  # type: ignore[attr-defined]
        if monitors and 0 < evaluate < clients:
            rank_zero_warn(
                f"{' and '.join(monitors)}: {evaluate} of {clients} clients evaluate in a round, each round others, so"
                " the metric jumps with who they are. Let all evaluate, fraction_evaluate=1.0, or monitor the server's"
                " own validation."
            )

    def _evaluates(self, trainer: Trainer, round: int) -> bool:
        every = trainer.check_val_every_n_epoch or 1
        return (
            round % every == 0
            and self.owners.partition.can_evaluate()
            and is_overridden("validation_step", self._module, LightningModule)
        )

    def _summary(self, trainer: Trainer) -> str:
        assert self._rounds is not None
        clients = self._rounds.roster.num_clients
        evaluates = self._evaluates(trainer, trainer.check_val_every_n_epoch or 1)
        return summary(
            self.owners,
            clients,
            trainer.max_epochs,
            f"{self.engine} on {trainer.strategy.root_device}, seed {self.seed}",
            evaluates,
            self._is_ours,
        )
