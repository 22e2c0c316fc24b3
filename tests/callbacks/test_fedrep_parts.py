"""What FedRep trains in an epoch, whoever freezes and unfreezes layers, and however a module optimizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FedRep
from lightning_fed.errors import ConfigurationError
from tests.callbacks.rounds import assert_close, loaders, loss, momentum, sgd
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier

HEAD = "net.4"


def network() -> nn.Sequential:
    """Two layers of the body, and the head."""
    torch.manual_seed(3)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()


class Unfreezes(BaseFinetuning):
    """The first layer, in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)


class OfWhatTrains(Classifier):
    def configure_optimizers(self) -> Any:
        return sgd([p for p in self.parameters() if p.requires_grad])


class UnfreezesItself(Classifier):
    """At the start of the second epoch."""

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.trainer.current_epoch >= 1)


class UnfreezesInBatches(Classifier):
    """From the second epoch on, at the start of each batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(self.trainer.current_epoch >= 1)


class Watches(Callback):
    """Notes which layers move in a client's epochs."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = copy.deepcopy(pl_module.state_dict())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        moved = {n.split(".")[1] for n, v in pl_module.state_dict().items() if not torch.equal(v, self.before[n])}
        MOVED[trainer.current_epoch, trainer.client_id] = "".join(sorted(moved))


MOVED: dict[tuple[int, int], str] = {}


def fit(module: Any, fedrep: FedRep, **how: Any) -> FederatedTrainer:
    how = {"max_rounds": 2, "local_epochs": fedrep.head_epochs + fedrep.body_epochs, **QUIET, **how}
    trainer = FederatedTrainer(callbacks=[ClientData(loaders()), fedrep], **how)
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("kind", [OfWhatTrains, UnfreezesItself, UnfreezesInBatches])
def test_what_is_unfrozen_in_an_epoch_of_the_head_waits_for_the_bodys(kind: Any) -> None:
    MOVED.clear()
    callbacks = [Unfreezes(), Watches()] if kind is OfWhatTrains else [Watches()]
    module = kind(network(), sgd)
    fit(module, FedRep(HEAD, head_epochs=2), client_callbacks=callbacks)
    for client in range(4):
        assert [MOVED[epoch, client] for epoch in range(6)] == ["4", "4", "02"] * 2


def test_what_the_user_freezes_stays_frozen_in_the_bodys_epochs() -> None:
    class FreezesItself(Classifier):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.trainer.current_epoch < 2)

    MOVED.clear()
    fit(FreezesItself(network(), momentum), FedRep(HEAD), client_callbacks=[Watches()])
    for client in range(4):
        assert [MOVED[epoch, client] for epoch in range(4)] == ["4", "02", "4", "2"]


class ByHand(Classifier):
    """Two optimizers with momentum and weight decay, in Lightning's way for several."""

    toggles, apart, clips = True, True, None

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        if not self.apart:
            return momentum(self.parameters())
        return [momentum(self.net[:4].parameters()), momentum(self.net[4].parameters())]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers if self.apart else [optimizers]:
            if self.toggles:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(self.net, batch))
            if self.clips is not None:
                self.clip_gradients(optimizer, gradient_clip_val=self.clips, gradient_clip_algorithm="norm")
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)


class Toggles(ByHand):
    pass


class DoesNotToggle(ByHand):
    toggles = False


class Clips(ByHand):
    toggles, apart, clips = False, False, 0.05


class PastLightning(ByHand):
    """Steps what Lightning does not hear of, with gradients of a plain backward."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss(self.net, batch).backward()
        for optimizer in self.optimizers(use_pl_optimizer=False):
            optimizer.step()
            optimizer.zero_grad()


class GivesGradients(ByHand):
    """Which it computes by itself."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        given = torch.autograd.grad(loss(self.net, batch), list(self.parameters()))
        for p, gradient in zip(self.parameters(), given, strict=True):
            p.grad = gradient
        for optimizer in self.optimizers():
            optimizer.step()


def by_hand(net: nn.Module, clips: float | None) -> list[dict[str, Any]]:
    """One round in plain torch: each client's weights."""
    each = []
    for loader in loaders():
        own = copy.deepcopy(net)
        for part in (own[4], own[:4]):
            optimizer = momentum(part.parameters())
            for batch in loader:
                own.zero_grad()
                loss(own, batch).backward()
                if clips is not None:
                    nn.utils.clip_grad_norm_(part.parameters(), clips)
                optimizer.step()
        each.append(copy.deepcopy(own.state_dict()))
    return each


@pytest.mark.parametrize("kind", [Toggles, DoesNotToggle, Clips, PastLightning, GivesGradients])
def test_in_manual_optimization_a_part_that_is_not_trained_does_not_move(kind: Any) -> None:
    net, ends = network(), {}

    class Ends(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            ends[trainer.client_id] = copy.deepcopy(pl_module.net.state_dict())

    module = kind(copy.deepcopy(net))
    fit(module, FedRep(HEAD), max_rounds=1, client_callbacks=[Ends()])
    for client, theirs in enumerate(by_hand(net, kind.clips)):
        assert_close(ends[client], theirs)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in module.parameters())


def test_clipping_by_norm_is_of_what_trains() -> None:
    net, fedrep = network(), FedRep(HEAD)
    trainer = fit(Classifier(copy.deepcopy(net), momentum), fedrep, max_rounds=1, gradient_clip_val=0.05)
    for client, theirs in enumerate(by_hand(net, 0.05)):
        head = {name: tensor for name, tensor in theirs.items() if name.startswith("4.")}
        assert_close(trainer.personal_module(client).net.state_dict(), head)


@pytest.mark.parametrize("epochs", [[2, 2], (2,), lambda round: 2], ids=["list", "tuple", "function"])
def test_local_epochs_may_be_given_by_round(epochs: Any) -> None:
    fit(Classifier(network(), sgd), FedRep(HEAD), local_epochs=epochs)


def test_each_round_has_the_epochs_of_both_parts() -> None:
    with pytest.raises(ConfigurationError, match=r"a round, and round 2 has local_epochs=3\. Write local_epochs=2\."):
        fit(Classifier(network(), sgd), FedRep(HEAD), local_epochs=[2, 3])
    with pytest.raises(ConfigurationError, match=r"a round, and the run has local_steps=3\. Write local_epochs=2\."):
        fit(Classifier(network(), sgd), FedRep(HEAD), local_epochs=None, local_steps=3)


def test_a_dev_run_has_an_epoch_of_the_head() -> None:
    MOVED.clear()
    fit(Classifier(network(), sgd), FedRep(HEAD), fast_dev_run=True, client_callbacks=[Watches()])
    assert set(MOVED.values()) == {"4"}
