"""SCAFFOLD against the paper's equations, with unequal clients, part of whom take part in a round."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FedAdam, FederatedCallback, FedProx, PartialParticipation, Scaffold
from lightning_fed.errors import ConfigurationError, FederationError
from tests import references
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

SIZES, ROUNDS, EPOCHS, BATCH = (6, 12, 22, 10), 3, 2, 4
COHORTS = [[0, 2, 3], [1, 2], [0, 1, 2, 3]]

sgd = partial(torch.optim.SGD, lr=0.1)
OPTIMIZERS = {
    "SGD": sgd,
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": partial(torch.optim.Adam, lr=0.01),
}


class Chosen(PartialParticipation):
    """The cohorts above."""

    def size(self, stage: str, num_clients: int) -> int:
        return 2

    def sample(self, stage: str, round: int, num_clients: int, seed: int) -> list[int]:
        return COHORTS[round - 1]


def loaders(sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float64) -> list[DataLoader[Any]]:
    generator = torch.Generator().manual_seed(11)
    made = []
    for client, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=generator).to(dtype) + client
        y = (torch.randint(0, 3, (size,), generator=generator) + client) % 3
        made.append(DataLoader(TensorDataset(x, y), batch_size=BATCH))
    return made


def loss(net: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def by_the_paper(net: nn.Module, optimizer: Any, **how: Any) -> references.Weights:
    data = [list(loader) * EPOCHS for loader in loaders()]
    rounds = [[data[i] if i in cohort else None for i in range(len(SIZES))] for cohort in COHORTS]
    return references.scaffold(copy.deepcopy(net), rounds, loss, optimizer, **how)[-1]


def federated(net: nn.Module, optimizer: Any, *methods: Any, **arguments: Any) -> references.Weights:
    module = Classifier(copy.deepcopy(net), optimizer)
    trainer = FederatedTrainer(
        max_rounds=ROUNDS,
        local_epochs=EPOCHS,
        callbacks=[ClientData(loaders()), Chosen(), *methods],
        **arguments,
        **QUIET,
    )
    trainer.fit(module)
    return module.net.state_dict()


def assert_close(ours: references.Weights, theirs: references.Weights, rtol: float = 1e-9) -> None:
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=1e-12, msg=lambda text: f"{name}: {text}")


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


WAYS: dict[str, dict[str, Any]] = {
    "vectorized": {"vectorize_clients": "require"},
    "processes": {"engine": "processes"},
    "vectorized on processes": {"engine": "processes", "vectorize_clients": "require"},
}


@pytest.mark.parametrize("way", WAYS)
def test_engines_and_vectorized_clients_give_the_same(way: str) -> None:
    net = network(torch.float64, batch_norm=True)
    alone = federated(net, OPTIMIZERS["momentum"], Scaffold())
    other = federated(net, OPTIMIZERS["momentum"], Scaffold(), **WAYS[way])
    if "vectorize_clients" in WAYS[way]:
        assert_close(other, alone)
    else:
        assert all(torch.equal(other[name], tensor) for name, tensor in alone.items())


class Stops(FederatedCallback):
    """Raises once, when a hook is called in a round."""

    def __init__(self, hook: str, round: int = 3) -> None:
        setattr(self, hook, self._stop)
        self.round, self.is_over = round, False

    def _stop(self, trainer: Any, round: int, *rest: Any) -> None:
        if round == self.round and not self.is_over:
            self.is_over = True
            raise RuntimeError("stopped")


@pytest.mark.parametrize("hook", ["on_round_start", "on_client_end", "on_round_end"])
@pytest.mark.parametrize("way", ["in process", "vectorized", "processes"])
def test_a_run_that_is_stopped_in_a_round_goes_on_bit_for_bit(way: str, hook: str, tmp_path: Path) -> None:
    net, arguments = network(torch.float64), WAYS.get(way, {})
    whole = federated(net, OPTIMIZERS["momentum"], Scaffold(), **arguments)
    stops = Stops(hook)

    def fit(module: Classifier, ckpt_path: str | None = None) -> None:
        callbacks = [ClientData(loaders()), Chosen(), Scaffold(), stops, OnExceptionCheckpoint(tmp_path)]
        arguments_ = {**QUIET, **arguments, "enable_checkpointing": True}
        trainer = FederatedTrainer(max_rounds=ROUNDS, local_epochs=EPOCHS, callbacks=callbacks, **arguments_)
        trainer.fit(module, ckpt_path=ckpt_path)

    with pytest.raises(RuntimeError, match="stopped"):
        fit(Classifier(copy.deepcopy(net), OPTIMIZERS["momentum"]))
    module = Classifier(network(torch.float64), OPTIMIZERS["momentum"])
    fit(module, str(tmp_path / "on_exception.ckpt"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in module.net.state_dict().items())


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

    theirs, x, data = copy.deepcopy(net), {}, [list(loader) * EPOCHS for loader in loaders()]
    step, moments = references.fedadam(0.05, 0.9, 0.99, 1e-3), [{}]

    def server(x: references.Weights, mean: references.Weights) -> references.Weights:
        x, moments[0] = step(x, mean, moments[0])
        return x

    rounds = [[data[i] if i in cohort else None for i in range(len(SIZES))] for cohort in COHORTS]
    x = references.scaffold(theirs, rounds, objective, begin, server=server)[-1]
    assert_close(ours, x)


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


class Unfreezes(FederatedCallback):
    def on_round_start(self, trainer: Any, round: int, stage: str, cohort: Any) -> None:
        trainer.lightning_module.net[0].requires_grad_(round > 1)


def test_a_parameter_that_begins_to_train_later_has_no_control_and_that_is_said() -> None:
    net = network(torch.float64)
    net[0].requires_grad_(False)
    with pytest.raises(FederationError, match=r"trains 'net.0.bias', of which Scaffold has no control"):
        federated(net, sgd, Scaffold(), Unfreezes())
