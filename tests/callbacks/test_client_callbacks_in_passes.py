"""Client callbacks in the fits that methods add: the pass before a client's fit, the fit of its own model after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, GradientAccumulationScheduler
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import APFL, ClientData, Ditto, Scaffold
from lightning_fed.errors import FederationError
from tests.callbacks.rounds import BATCH, WAYS, assert_close, assert_equal, loaders, loss, momentum, sgd
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

SIZES = (6, 12, 22, 10)


class Triples(Callback):
    """Changes the objective: batches are three times as large."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(3.0)


class Grows(Callback):
    """Makes each batch larger than the one before, over all of a client's rounds: it keeps a state."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(1 + 0.1 * self.batches)
        self.batches += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        ENDED.append((trainer.current_round, trainer.client_id, self.batches))

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


ENDED: list[tuple[int, int, int]] = []


class Configures(Classifier):
    """Has callbacks of its own."""

    def __init__(self, net: nn.Module, *callbacks: Callback, optimizer: Any = sgd) -> None:
        super().__init__(net, optimizer)
        self.own_callbacks = callbacks

    def configure_callbacks(self) -> Any:
        return list(self.own_callbacks)


class FreezesTheFirst(BaseFinetuning):
    """Until the third epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)


class EndsEarly(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = True


def fit(module: Any, *methods: Any, sizes: Any = SIZES, **how: Any) -> FederatedTrainer:
    """The trainer after the rounds, in all of which all clients train."""
    how = {"max_rounds": 1, "local_epochs": 2, **QUIET, **how}
    trainer = FederatedTrainer(callbacks=[ClientData(loaders(sizes)), *methods], **how)
    trainer.fit(module)
    return trainer


def mean_gradient(net: nn.Module, factor: float) -> dict[str, Any]:
    """Over clients, each over all its data, of which all is some times as large."""
    net, means = copy.deepcopy(net), []
    for loader in loaders():
        x, y = map(torch.cat, zip(*loader, strict=True))
        means.append(loss(net, (x * factor, y)))
    torch.stack(means).mean().backward()
    return {f"net.{name}": p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("whose", ["the user's", "the module's"])
def test_the_gradient_of_option_i_is_of_the_batches_that_train(whose: str) -> None:
    net, scaffold = network(torch.float64), Scaffold(option="I")
    if whose == "the user's":
        fit(Classifier(copy.deepcopy(net), sgd), scaffold, client_callbacks=[Triples()])
    else:
        fit(Configures(copy.deepcopy(net), Triples()), scaffold)
    assert_close(scaffold.state_dict()["control"], mean_gradient(net, 3.0))


def test_the_pass_of_option_i_leaves_callbacks_as_they_were() -> None:
    ENDED.clear()
    fit(Classifier(network(torch.float64), sgd), Scaffold(option="I"), client_callbacks=[Grows()], max_rounds=2)
    fits = {(round, client): batches for round, client, batches in ENDED}  # the pass ends before its fit
    expected = {(r, i): 2 * r * -(-size // BATCH) for r in (1, 2) for i, size in enumerate(SIZES)}
    assert fits == expected


def test_the_pass_of_option_i_does_not_accumulate() -> None:
    net, scaffold = network(torch.float64), Scaffold(option="I")
    accumulates = GradientAccumulationScheduler({0: 2})
    fit(Classifier(copy.deepcopy(net), sgd), scaffold, client_callbacks=[accumulates])
    assert_close(scaffold.state_dict()["control"], mean_gradient(net, 1.0))


def test_a_layer_that_a_callback_freezes_has_no_gradient_in_the_pass() -> None:
    """Its control is zero until it trains; it does from the second round on."""
    net, scaffold = network(torch.float64), Scaffold(option="I")
    module = Classifier(copy.deepcopy(net), lambda ps: sgd([p for p in ps if p.requires_grad]))
    fit(module, scaffold, client_callbacks=[FreezesTheFirst()])
    expected = mean_gradient(net, 1.0)
    control = scaffold.state_dict()["control"]
    for name, theirs in expected.items():
        torch.testing.assert_close(control[name], torch.zeros_like(theirs) if name.startswith("net.0.") else theirs)


def test_a_pass_that_a_callback_ends_is_refused() -> None:
    with pytest.raises(FederationError, match="ends the pass over its data before its fit too early"):
        fit(Classifier(network(torch.float64), sgd), Scaffold(option="I"), client_callbacks=[EndsEarly()])


@pytest.mark.parametrize("client_state", ["global", "carry"])
@pytest.mark.parametrize("way", ["in process", "processes"])
@pytest.mark.parametrize("method", [Ditto(0.0), APFL(1.0, adaptive=False)], ids=lambda method: type(method).__name__)
def test_the_modules_own_callbacks_are_in_the_fit_of_a_clients_own_model(
    method: Any, way: str, client_state: Any
) -> None:
    """Of one client alone both models are the same, round by round, and the state of its callbacks is."""
    module = Configures(network(torch.float64), Grows(), optimizer=momentum)
    how = {"client_state": client_state, **WAYS.get(way, {})}
    trainer = fit(module, method, sizes=(22,), max_rounds=3, **how)
    assert_close(trainer.personal_module(0).net.state_dict(), module.net.state_dict())
    alone = Configures(network(torch.float64), Grows(), optimizer=momentum)
    fit(alone, sizes=(22,), max_rounds=3, **how)
    assert_equal(module.net.state_dict(), alone.net.state_dict())


def test_client_callbacks_that_the_user_gave_are_not_in_that_fit() -> None:
    module = Classifier(net := network(torch.float64), momentum)
    plain = Classifier(copy.deepcopy(net), momentum)
    trainer = fit(module, Ditto(0.0), sizes=(22,), client_callbacks=[Triples()])
    fit(plain, sizes=(22,))
    assert_equal(trainer.personal_module(0).net.state_dict(), plain.net.state_dict())
