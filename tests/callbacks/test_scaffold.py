"""SCAFFOLD against the paper's equations, with unequal clients, part of whom take part in a round."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FedAdam, FedDyn, FederatedCallback, FedProx, Scaffold
from lightning_fed.errors import ConfigurationError, FederationError
from tests import references
from tests.callbacks.rounds import (
    HOOKS,
    WAYS,
    UnfreezesLate,
    adam,
    assert_close,
    assert_equal,
    assert_resumes,
    batches,
    federated,
    loaders,
    loss,
    momentum,
    sgd,
)
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

OPTIMIZERS = {"SGD": sgd, "momentum": momentum, "Adam": adam}


def by_the_paper(net: nn.Module, optimizer: Any, **how: Any) -> references.Weights:
    return references.scaffold(copy.deepcopy(net), batches(), loss, optimizer, **how)[-1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_running_mean_of_gradients_with_any_optimizer(name: str) -> None:
    net = network(torch.float64, batch_norm=name != "Adam")  # which makes steps of the noise of a bias before a norm
    ours = federated(net, OPTIMIZERS[name], Scaffold())
    assert_close(ours, by_the_paper(net, OPTIMIZERS[name]))


@pytest.mark.parametrize("option", ["running", "II"])
def test_for_plain_sgd_both_options_are_the_papers_option_ii(option: Any) -> None:
    net = network(torch.float64)
    assert_close(federated(net, sgd, Scaffold(option=option)), by_the_paper(net, sgd, option_ii=0.1))


def test_the_servers_learning_rate() -> None:
    net = network(torch.float64)
    assert_close(federated(net, sgd, Scaffold(server_learning_rate=0.3)), by_the_paper(net, sgd, server_lr=0.3))


@pytest.mark.parametrize("way", WAYS)
def test_engines_and_vectorized_clients_give_the_same(way: str) -> None:
    net = network(torch.float64, batch_norm=True)
    alone = federated(net, OPTIMIZERS["momentum"], Scaffold())
    other = federated(net, OPTIMIZERS["momentum"], Scaffold(), **WAYS[way])
    if "vectorize_clients" in WAYS[way]:
        assert_close(other, alone)
    else:
        assert_equal(other, alone)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("way", ["in process", "vectorized", "processes"])
def test_a_run_that_is_stopped_in_a_round_goes_on_bit_for_bit(way: str, hook: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, hook, OPTIMIZERS["momentum"], Scaffold, **WAYS.get(way, {}))


def test_with_fedprox_and_fedadam_it_is_the_composed_method() -> None:
    """Its gradients are those of the objective with the proximal term; the server steps with all clients' mean."""
    net, mu = network(torch.float64), 0.5
    ours = federated(net, sgd, FedProx(mu), FedAdam(learning_rate=0.05, weighting="uniform"), Scaffold())
    anchor: dict[str, torch.Tensor] = {}

    def objective(net: nn.Module, batch: Any) -> torch.Tensor:
        term = sum(((p - anchor[name]) ** 2).sum() for name, p in net.named_parameters())
        return loss(net, batch) + mu / 2 * term

    def begin(parameters: Any) -> torch.optim.Optimizer:
        anchor.update({name: p.detach().clone() for name, p in theirs.named_parameters()})
        return sgd(parameters)

    theirs, x = copy.deepcopy(net), {}
    step, moments = references.fedadam(0.05, 0.9, 0.99, 1e-3), [{}]

    def server(x: references.Weights, mean: references.Weights) -> references.Weights:
        x, moments[0] = step(x, mean, moments[0])
        return x

    x = references.scaffold(theirs, batches(), objective, begin, server=server)[-1]
    assert_close(ours, x)


@pytest.mark.parametrize("term", [FedProx(0.5), FedDyn(0.3)], ids=lambda term: type(term).__name__)
def test_terms_of_the_objective_are_in_its_gradients_whatever_the_order(term: Any) -> None:
    net = network(torch.float64)
    ours = federated(net, sgd, Scaffold(), term)
    assert_equal(ours, federated(net, sgd, term, Scaffold()))
    assert_close(ours, federated(net, sgd, term, Scaffold(option="II")))


class TwoOptimizers(Classifier):
    """Two optimizers by hand, one of which steps twice as often."""

    def __init__(self, net: nn.Module, optimizer: Any = sgd) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second, first):
            optimizer.zero_grad()
            self.manual_backward(loss(self.net, batch))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer(self.net[0].parameters()), torch.optim.Adam(self.net[2].parameters(), lr=0.01)]


def test_two_optimizers_each_have_the_mean_of_their_own_steps() -> None:
    module, recorded = TwoOptimizers(network(torch.float64)), {}

    class Records(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    name = next(name for name, other in pl_module.named_parameters() if other is p)
                    recorded.setdefault(name, []).append(p.grad.clone())

    class Watches(FederatedCallback):
        def on_round_end(self, trainer: Any, round: int, metrics: dict[str, float]) -> None:
            control.append({name: sum(gradients) / len(gradients) for name, gradients in recorded.items()})

    control, scaffold = [], Scaffold()
    # The first round's correction is zero, so what a later callback sees is the gradient itself.
    callbacks = [ClientData(loaders()[:1]), scaffold, Watches()]
    FederatedTrainer(max_rounds=1, callbacks=callbacks, client_callbacks=[Records()], **QUIET).fit(module)
    assert {name: len(gradients) for name, gradients in recorded.items()} == {
        "net.0.weight": 4,
        "net.0.bias": 4,
        "net.2.weight": 2,
        "net.2.bias": 2,
    }
    assert_close(scaffold.state_dict()["control"], control[0])


def test_a_second_fit_begins_anew() -> None:
    net, scaffold = network(torch.float64), Scaffold()
    first = federated(net, sgd, scaffold)
    assert all(torch.equal(tensor, first[name]) for name, tensor in federated(net, sgd, scaffold).items())


ERRORS: dict[str, tuple[Any, Any, str]] = {
    "momentum with option II": (
        lambda: [Scaffold(option="II")],
        OPTIMIZERS["momentum"],
        r"trains with SGD\(momentum=0.9, weight_decay=0.01\); Scaffold\(option='II'\) is for plain SGD",
    ),
    "Adam with option II": (lambda: [Scaffold(option="II")], OPTIMIZERS["Adam"], r"trains with Adam\(\); Scaffold"),
    "two learning rates of the server": (
        lambda: [Scaffold(server_learning_rate=0.5), FedAdam()],
        sgd,
        r"Scaffold\(server_learning_rate=0.5\) goes with its own aggregation, and another callback decides it \(AdamM",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_cannot_be_is_refused(what: str) -> None:
    methods, optimizer, said = ERRORS[what]
    with pytest.raises(FederationError, match=said):
        federated(network(torch.float64), optimizer, *methods())


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"Scaffold\(option='III'\): write 'running' or 'II'"):
        Scaffold(option="III")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="server_learning_rate=0 must be > 0"):
        Scaffold(server_learning_rate=0)


def test_a_layer_that_is_unfrozen_at_an_epochs_start_is_corrected() -> None:
    net = network(torch.float64)
    ours = federated(net, sgd, Scaffold(), client_callbacks=[UnfreezesLate()])
    assert_equal(ours, federated(net, sgd, Scaffold()))


def test_a_layer_that_trains_in_the_second_epoch_alone_has_the_mean_of_that_ones_gradients() -> None:
    net, late = network(torch.float64), [UnfreezesLate(epoch=1)]
    ours = federated(net, sgd, Scaffold(), client_callbacks=late)
    assert_close(ours, federated(net, sgd, Scaffold(option="II"), client_callbacks=late))


class Unfreezes(FederatedCallback):
    def on_round_start(self, trainer: Any, round: int, stage: str, cohort: Any) -> None:
        trainer.lightning_module.net[0].requires_grad_(round > 1)


def test_a_parameter_that_begins_to_train_later_has_no_control_and_that_is_said() -> None:
    net = network(torch.float64)
    net[0].requires_grad_(False)
    with pytest.raises(FederationError, match=r"trains 'net.0.weight', of which Scaffold has no control"):
        federated(net, sgd, Scaffold(), Unfreezes())
