"""Callbacks of configure_callbacks: on batches and gradients at the clients, the others at the server."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    ModelCheckpoint,
)
from torch import nn

from lightning_fed import ConfigurationError
from lightning_fed.engines import InProcess
from lightning_fed.testing import ToyModule
from tests.integration.callbacks.runs import ENGINES, GRADIENT_HOOKS, Noting, federated, loader, toy

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


class OnBatches(Noting):
    """As anomalib's: changes each batch, in training, validation and testing."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.note(trainer, "train")
        batch[0].mul_(0.0)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
        self.note(trainer, "validate")
        batch[0].mul_(0.0)

    def on_test_batch_start(self, trainer: Any, *args: Any) -> None:
        self.note(trainer, "test")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer, "epoch")


class Zeroed(ToyModule):
    """Sees only zeros, or fails."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert not batch[0].any()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not batch[0].any()
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_modules_callback_on_batches_acts_on_the_clients_and_on_the_servers_validation(engine):
    callback = OnBatches()
    trainer = federated(rounds=1, engine=engine)
    module = toy(callback, cls=Zeroed)
    trainer.fit(module, loader(), loader(8))
    trainer.test_step = None
    at_server = [what for side, what in callback.notes if side == "server"]
    assert at_server == ["validate"]
    if isinstance(engine, InProcess):
        on_clients = [what for side, what in callback.notes if side == "client"]
        # Two clients: three batches to train on, one that is held out.
        assert on_clients == [*["train"] * 3, "epoch"] * 2 + ["validate"] * 2
    assert type(callback) is OnBatches
    trainer.validate(module, loader(8), verbose=False)
    assert callback.notes[-1] == ("server", "validate")


@pytest.mark.parametrize("hook", GRADIENT_HOOKS)
def test_a_modules_callback_on_gradients_acts_on_the_clients(hook):
    class OnGradients(Noting):
        pass

    setattr(OnGradients, hook, lambda self, trainer, *args: self.note(trainer, hook))
    callback = OnGradients()
    federated(rounds=1).fit(toy(callback), loader())
    assert callback.notes == [("client", hook)] * 6


def test_a_modules_callback_is_each_clients_own():
    class Counting(Callback):
        counts: list[int] = []

        def __init__(self) -> None:
            self.batches = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches += 1

        def on_train_end(self, *args: Any) -> None:
            self.counts.append(self.batches)

    mine = Counting()
    federated(rounds=1).fit(toy(mine), loader())
    assert Counting.counts == [3, 3]
    assert mine.batches == 0


def test_a_modules_callback_takes_the_place_of_the_users_of_its_kind():
    users, modules = OnBatches(), OnBatches()
    federated(rounds=1, client_callbacks=[users]).fit(toy(modules, cls=Zeroed), loader(), loader(8))
    assert users.notes == []
    assert ("client", "train") in modules.notes


def test_lightnings_own_for_local_training_go_to_the_clients_and_the_others_stay(tmp_path):
    class Seen(Callback):
        kinds: list[list[str]] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.kinds.append(sorted(type(c).__name__ for c in trainer.callbacks))

    given = [GradientAccumulationScheduler({0: 3}), ModelCheckpoint(tmp_path), EarlyStopping("train_loss")]
    trainer = federated(rounds=1, enable_checkpointing=True, client_callbacks=[Seen()])
    trainer.fit(toy(*given), loader())
    assert "GradientAccumulationScheduler" in Seen.kinds[0]
    assert not {"ModelCheckpoint", "EarlyStopping"} & set(Seen.kinds[0])
    kinds = {type(callback).__name__ for callback in trainer.callbacks}
    assert {"ModelCheckpoint", "EarlyStopping"} <= kinds
    assert "GradientAccumulationScheduler" not in kinds


def test_a_second_fit_places_the_modules_callbacks_anew():
    callback, trainer = OnBatches(), federated(rounds=1)
    module = toy(callback, cls=Zeroed)
    trainer.fit(module, loader(), loader(8))
    trainer.fit_loop.max_epochs = 2
    first = len(callback.notes)
    trainer.fit(module, loader(), loader(8))
    assert len(callback.notes) == 2 * first


def test_a_modules_callbacks_do_not_act_on_the_next_module():
    callback, trainer = OnBatches(), federated(rounds=1)
    trainer.fit(toy(callback, cls=Zeroed), loader(), loader(8))
    first = len(callback.notes)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(toy(), loader(), loader(8))
    assert len(callback.notes) == first
    assert callback not in trainer.callbacks
    assert trainer.global_step == 2


def test_lambda_callbacks_are_looked_into():
    with pytest.raises(ConfigurationError, match="LambdaCallback writes on_after_backward"):
        federated(LambdaCallback(on_after_backward=lambda *args: None))


def test_a_copy_of_a_placed_callback_is_the_users_class():
    copies = []

    class Copying(Callback):
        def on_train_batch_start(self, *args: Any) -> None: ...

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            copies.append(type(copy.deepcopy(self)))

    federated(rounds=1).fit(toy(Copying()), loader(), loader(8))
    assert set(copies) == {Copying}


def test_a_callback_that_is_a_layer_of_the_module_acts_on_both_sides():
    class Layer(nn.Module, Callback):
        """As anomalib's pre-processor."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch[0].mul_(0.0)

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
            batch[0].mul_(0.0)

    class WithLayer(Zeroed):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def configure_callbacks(self) -> Any:
            return [self.layer]

    module = WithLayer()
    federated(rounds=2).fit(module, loader(), loader(8))
    assert type(module.layer) is Layer


def test_finetuning_of_the_modules_own_goes_to_the_clients():
    with pytest.raises(ConfigurationError, match=r"client_callbacks=\[BackboneFinetuning"):
        federated(BackboneFinetuning())
