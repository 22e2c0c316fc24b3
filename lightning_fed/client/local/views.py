"""The views under which a client's trainer sees the module and the datamodule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_fed._compat.lightning import WHILE_HOOKS_RUN
from lightning_fed._compat.torchmetrics import computed
from lightning_fed.client.local.elapsed import stand_after
from lightning_fed.seeding import seed_for, seeded
from lightning_fed.values import weights
from lightning_fed.views import View, users_own

if TYPE_CHECKING:
    from lightning_fed.client.local.trainer import LocalTrainer


class ClientView(View):
    """A module as a client sees it: all training hooks are the user's, set-up and checkpoints are not the client's."""

    trainer: LocalTrainer

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WHILE_HOOKS_RUN:  # Lightning sets them around every hook; torch would search the module for them
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def prepare_data(self) -> None:
        if self.trainer.sets_up:
            users_own(self, "prepare_data")()

    def setup(self, stage: str) -> None:
        # The server has set the same module up; doing it again would build new layers and read the data anew.
        if self.trainer.sets_up:
            users_own(self, "setup")(stage)

    def teardown(self, stage: str) -> None:
        pass

    def train_dataloader(self) -> Any:
        # Lightning is given the client's loader; who asks the module itself must not get everybody's data.
        own = self.trainer.loaders.train
        return users_own(self, "train_dataloader")() if own is None else own

    def configure_callbacks(self) -> list[Callback]:
        # They act at the server: a ModelCheckpoint from here would write checkpoints for every client.
        return []

    def on_train_epoch_end(self) -> None:
        users_own(self, "on_train_epoch_end")()
        # The last moment: the module has logged, and Lightning has not reset yet.
        self.trainer.keep_logged(self)  # type: ignore[arg-type]

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        is_computed = isinstance(value, Tensor) and any(value is computed(metric) for metric in trainer.module_metrics)
        if is_computed:
            trainer.computed.add(name)
        if trainer.logs_its_way:  # what a log of the user's own makes of name and value only it knows
            with trainer.naming(is_computed):
                users_own(self, "log")(name, value, *args, **kwargs)
        elif torch.compiler.is_compiling() or not trainer.log_again(self, name, value, args, kwargs):
            super().log(name, value, *args, **kwargs)  # type: ignore[misc]
            trainer.remember_log(self, name, args, kwargs)


class BuildingClientView(ClientView):
    """That of a module that builds layers in ``configure_model``: the weights can be loaded only then."""

    def configure_model(self) -> None:
        users_own(self, "configure_model")()
        weights.load(self, self.trainer.task.weights)  # type: ignore[arg-type]


class TestView(BuildingClientView):
    """That of a client's test after the fit: the module is set up for it, as for any test of Lightning's."""

    __test__ = False  # for pytest, which takes a class of this name for a test

    def setup(self, stage: str) -> None:
        # As at the server: what it draws or builds is the same for each client.
        with seeded(seed_for(self.trainer.task.seed, "setup")):
            users_own(self, "setup")(stage)

    def teardown(self, stage: str) -> None:
        users_own(self, "teardown")(stage)


def client_view(module: LightningModule) -> type[ClientView]:
    """Return the view for a module: Lightning prepares a good deal for any ``configure_model``."""
    return BuildingClientView if is_overridden("configure_model", module, LightningModule) else ClientView


class ClientDataView(View):
    """The server's datamodule as a client sees it: set up already, and with the client's loaders."""

    trainer: LocalTrainer

    def prepare_data(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        pass

    def teardown(self, stage: str) -> None:
        pass

    def train_dataloader(self) -> Any:
        return self.trainer.loaders.train

    def val_dataloader(self) -> Any:
        return [] if self.trainer.loaders.val is None else self.trainer.loaders.val

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


class OwnDataView(View):
    """A datamodule of the client's own. What it draws when it makes data is the same in each round and stage."""

    trainer: LocalTrainer

    def prepare_data(self) -> None:
        with self.trainer.task.making_data(self):
            users_own(self, "prepare_data")()

    def setup(self, stage: str) -> None:
        with self.trainer.task.making_data(self):
            users_own(self, "setup")(_as_in_a_fit(stage))
        if stage == "validate" and self.trainer.plan.steps is None:
            # Its train loader alone tells how many steps the rounds had, and may take long to make.
            self.trainer.find_steps = self._stand_after_the_round

    def _stand_after_the_round(self) -> None:
        trainer = self.trainer
        stand_after(trainer, trainer.lightning_module, trainer.task.round, self.train_dataloader())

    def teardown(self, stage: str) -> None:
        users_own(self, "teardown")(_as_in_a_fit(stage))

    def train_dataloader(self) -> Any:
        with self.trainer.task.making_data(self):
            return users_own(self, "train_dataloader")()

    def val_dataloader(self) -> Any:
        with self.trainer.task.making_data(self):
            return users_own(self, "val_dataloader")()

    def test_dataloader(self) -> Any:
        with self.trainer.task.making_data(self):
            return users_own(self, "test_dataloader")()


def _as_in_a_fit(stage: str) -> str:
    """Return the stage that a client's evaluation is to its datamodule: the validation of a fit, and none apart."""
    return "fit" if stage == "validate" else stage
