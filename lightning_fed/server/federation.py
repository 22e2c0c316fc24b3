"""The federation among a trainer's callbacks: hands what Lightning tells of a fit on to the session of that fit."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flwr.serverapp import Grid
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_fed._compat.known_lightning import is_known, why_slower
from lightning_fed._compat.lightning import set_train_source, trainer_of
from lightning_fed.client.side import ClientSide, own_in
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import random_states_kept
from lightning_fed.server.alone import alone
from lightning_fed.server.checkpoint import Found, RunState
from lightning_fed.server.deal import Deal
from lightning_fed.server.exchange import About
from lightning_fed.server.inputs import FitInputs, Fitted, Resumed, Settings
from lightning_fed.server.owners import Owners
from lightning_fed.server.session import Session
from lightning_fed.server.view import RoundLoader
from lightning_fed.values import weights
from lightning_fed.values.data import ClientLoaders
from lightning_fed.views import View, uncompile, user_class, viewed_as
from lightning_fed.wire.checkpoint_file import FEDERATION
from lightning_fed.wire.messages import memory_in
from lightning_fed.wire.personal_folder import write_personal

_WITH_THE_SITES = (
    "A site's own tensors stay on its disk; the shared model is in the checkpoints, and trainer.save_checkpoint(path)"
    " saves it."
)


class Saves(Protocol):
    """What tells the federation's state in a checkpoint."""

    def save(self) -> dict[str, Any]: ...

    def saved_at(self, path: str) -> None: ...


@dataclass
class Saved:
    """The state of a fit that is over, where only a copy of its trainer is left, or of none."""

    state: dict[str, Any]

    def save(self) -> dict[str, Any]:
        """Do as ``RunState.save``."""
        return self.state

    def saved_at(self, path: str) -> None:
        """Do nothing: its clients are not there."""


class Federation(Callback):
    """The server's part of a fit at Lightning's hooks; one for each ``FederatedTrainer``.

    Args:
        owners: Who decides what.
        settings: What all fits of the trainer have in common.

    Attributes:
        metrics: What the clients of the last round gave.
        about: What is known of their names.
        has_begun: Whether the fit has got to its first round; ``True`` outside of a fit.
    """

    def __init__(self, owners: Owners, settings: Settings) -> None:
        self.owners, self.settings = owners, settings
        self.metrics: dict[str, float] = {}
        self.about = About()
        self.has_begun = True
        self._given: FitInputs | None = None
        self._session: Session | None = None
        self._state: Saves = Saved({})
        self._fitted: Fitted | None = None  # of the last fit
        self._loaded: str | None = None  # the checkpoint of another round that a test has loaded since

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without grid and clients; what a checkpoint needs of them is in it."""
        without = dict.fromkeys(("_given", "_session", "_fitted"))
        return {**self.__dict__, **without, "has_begun": True, "_state": Saved(self.state_dict())}

    @property
    def state_key(self) -> str:
        """The key of the federation's state in a checkpoint."""
        return FEDERATION

    @property
    def session(self) -> Session:
        """The fit that runs.

        Raises:
            RuntimeError: Outside of a fit.
        """
        if self._session is None:
            raise RuntimeError("rounds run within FederatedTrainer.fit")
        return self._session

    def begin(self, grid: Grid, deal: Deal, side: ClientSide, engine: str) -> None:
        """Take up a grid, and the name of what gave it; Lightning's fit follows."""
        self._given, self._session, self._state = FitInputs(grid, deal, side, engine), None, Saved({})
        self.has_begun, self._loaded = False, None

    def end(self) -> None:
        """Let the grid go; what a checkpoint saved after the fit, or a test of clients, needs is kept."""
        self.has_begun = True
        self._given = self._session = None

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Take the list of callbacks, which the module's own have joined."""
        if self._given is not None:  # else it is not our fit, but a validation or test
            trainer.adopt_callbacks()
            side, self._given.deal.owner = self._given.side, self.owners.partition
            side.mods, side.methods = self.owners.mods(), list(self.owners.training().values())

    def on_load_checkpoint(self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how the script sets up a run that is resumed, before callbacks load what the checkpoint holds."""
        if self._given is not None and trainer.state.fn == TrainerFn.FITTING:
            callbacks = checkpoint["callbacks"]
            state = callbacks.get(self.state_key, {})
            found = Found(str(trainer.ckpt_path), int(checkpoint["global_step"]), set(callbacks), state)
            self._given.resumed = Resumed(found, Session.script_of(self._given.side, self.owners, trainer))
        elif self._given is None:
            is_other = checkpoint["global_step"] != trainer.global_step
            self._loaded = str(trainer.ckpt_path) if is_other else None

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Deal the data out, build the strategy, load what a checkpoint holds; the module is set up."""
        if self._given is None:
            return
        if self._given.resumed is None and trainer.global_step:
            rank_zero_warn(
                f"This trainer has done {trainer.global_step} rounds and fits again without ckpt_path=: rounds are"
                " counted on, while what the strategy and clients keep begins anew. To go on, pass ckpt_path=; for"
                " another run, build another trainer."
            )
        self._given.side.options.log_dir = trainer.log_dir
        # To Lightning alone: who asks the datamodule for its train loader in a hook gets the user's own.
        set_train_source(trainer, RoundLoader())
        weights.refuse_unfit(pl_module)
        if not is_known():
            rank_zero_warn(why_slower())
        side = self._given.side
        self._fitted = Fitted(pl_module, side.datamodule, self._given.deal, side.options)
        self._session = Session(self._given, self.owners, self.settings, trainer)
        self._state, self._given.resumed = self._session.state, None
        self._session.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin rounds, or go on: from here on there is something to save."""
        self.has_begun = True

    def run_round(self) -> None:
        """Run one round; if it fails the module has the weights of before."""
        result = self.session.run_round()
        self.metrics, self.about = result.metrics, result.about

    def apply_weights(self) -> None:
        """Load the round's new weights into the module."""
        self.session.apply_weights()

    @contextmanager
    def saving(self, path: str) -> Iterator[None]:
        """Give the module the global weights while a checkpoint is saved, also in the middle of a round."""
        with nullcontext() if self._session is None else self._session.saving():
            yield
        self._state.saved_at(path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint in the middle of a round hold what methods had when it began."""
        if self._session is not None:
            checkpoint["callbacks"].update(self._session.states_before())

    def personal_module(self, client: int) -> LightningModule:
        """See ``FederatedTrainer.personal_module``."""
        fitted, state = self.last_models(f"personal_module({client!r})")
        own = own_in(memory_in(state.kept_by(client)), fitted.options)
        with viewed_as(fitted.module, View):  # which copies as the user's own class, without what is compiled
            try:
                copied = copy.deepcopy(fitted.module, {id(trainer_of(fitted.module)): None})
            except Exception as error:
                raise ConfigurationError(
                    f"personal_module({client!r}): {user_class(fitted.module).__name__} cannot be copied:"
                    f" {type(error).__name__}: {error}. Build it anew for the client's tensors:"
                    " trainer.save_personal_modules(folder), and load_personal_module(MyModule(...), folder,"
                    f" client={client!r})."
                ) from error
        uncompile(copied)
        weights.load(copied, {**self.global_weights(copied), **own})
        return copied

    def client_data(self, client: int, round: int) -> ClientLoaders:
        """See ``FederatedTrainer.client_data``."""
        call = f"client_data({client!r})"
        fitted, state = self.last_fit(call)
        state.require_here(call, "A site's data never leaves it.")
        state.require_client(client)
        with alone(), random_states_kept():
            return fitted.deal(client, round)

    def save_personal_modules(self, folder: str | os.PathLike[str]) -> None:
        """See ``FederatedTrainer.save_personal_modules``."""
        call = f"save_personal_modules({str(folder)!r})"
        fitted, state = self.last_models(call)
        state.require_here(call, _WITH_THE_SITES)
        if not isinstance(folder, str | os.PathLike) or not str(folder):
            raise ConfigurationError(f"{call}: name a folder of your own.")
        if others := [name for name, one in fitted.module.state_dict().items() if not isinstance(one, Tensor)]:
            raise ConfigurationError(
                f"{call}: {others[0]!r} of the state dict is no tensor, and would be missing in what is loaded. Save"
                " modules one by one: torch.save(trainer.personal_module(client).state_dict(), path)."
            )
        kept = ((client, memory_in(state.kept_by(client))) for client in range(state.num_clients))
        each = ((client, own_in(memory, fitted.options)) for client, memory in kept)
        name = user_class(fitted.module).__name__
        write_personal(Path(folder), name, self.global_weights(fitted.module), each)

    def last_fit(self, call: str) -> tuple[Fitted, RunState]:
        """Return what is there of the last fit, or of the one that runs, and what its clients keep.

        Args:
            call: Who asks, as the user wrote it.

        Raises:
            ConfigurationError: If there has been none.
        """
        if not isinstance(self._state, RunState) or self._fitted is None:
            ended = "its last fit ended before the first round" if self._fitted else "there has been no fit"
            raise ConfigurationError(f"{call}: {ended} with this trainer.")
        return self._fitted, self._state

    def last_models(self, call: str) -> tuple[Fitted, RunState]:
        """Do as ``last_fit`` for who combines the module's weights with clients' own, and say if rounds mix."""
        fitted, state = self.last_fit(call)
        options = fitted.options
        if self._loaded is not None and (options.staying.personal or options.second_fit is not None):
            rank_zero_warn(
                f"{call}: the module has the weights of {self._loaded}, and clients have of their own what they kept at"
                " the end of the fit: the two are of different rounds. Call it before test, validate or predict loads a"
                " checkpoint of another round."
            )
        return fitted, state

    def global_weights(self, module: LightningModule) -> weights.Weights:
        """Return those that a module of the fit has; in the middle of a round those that it began with."""
        running = None if self._session is None else self._session.weights_before()
        return running or weights.read(module)

    @property
    def is_running(self) -> bool:
        """Whether a fit runs."""
        return self._given is not None

    def state_dict(self) -> dict[str, Any]:
        """Return what the run keeps from round to round; tensors and plain values only.

        In the middle of a round, or after one that failed: what stood when it began, for it will be run again.
        """
        return self._state.save()
