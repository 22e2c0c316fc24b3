"""FedNova against the paper's equations, with unequal clients, part of whom take part in a round."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FedAvg, FedNova, FedPer, FedProx, FedRep, LocalMethod
from lightning_fed.errors import ConfigurationError, FederationError
from tests import references
from tests.callbacks.rounds import (
    HOOKS,
    SIZES,
    WAYS,
    adam,
    assert_close,
    assert_equal,
    assert_resumes,
    batches,
    federated,
    loss,
    momentum,
    sgd,
)
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

SOLVERS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 0.1},
    "momentum": {"lr": 0.05, "momentum": 0.9},
    "proximal": {"lr": 0.1, "mu": 0.7},
    "momentum and proximal": {"lr": 0.05, "momentum": 0.8, "mu": 0.7},
}


def by_the_paper(net: nn.Module, **how: float) -> references.Weights:
    return references.fednova(copy.deepcopy(net), batches(), SIZES, loss, **how)[-1]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_three_rounds_are_the_papers(solver: str, batch_norm: bool) -> None:
    how, net = SOLVERS[solver], network(torch.float64, batch_norm=batch_norm)
    optimizer = partial(torch.optim.SGD, lr=how["lr"], momentum=how.get("momentum", 0.0))
    prox = [FedProx(how["mu"])] if "mu" in how else []
    assert_close(federated(net, optimizer, *prox, FedNova()), by_the_paper(net, **how))


def test_in_single_precision() -> None:
    net = network(torch.float64)
    expected = by_the_paper(net, **SOLVERS["momentum"])

    class Single(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step((batch[0].float(), batch[1]), batch_idx)

    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    assert_close(federated(net.float(), optimizer, FedNova(), kind=Single), _single(expected), rtol=1e-4)


def _single(weights: references.Weights) -> references.Weights:
    return {name: tensor.float() for name, tensor in weights.items()}


class Line(L.LightningModule):
    """All gradients are 1: a client's update is minus its ``a_i`` times the learning rate, whatever the solver."""

    def __init__(self, optimizer: Any, schedule: Any = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
        self.optimizer, self.schedule = optimizer, schedule

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.w.sum()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([self.w])
        if self.schedule is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def line(optimizer: Any, *methods: Any, steps: tuple[int, ...] = (2, 5, 9), schedule: Any = None, **how: Any) -> float:
    data = [DataLoader(TensorDataset(torch.zeros(n, 1)), batch_size=1) for n in steps]
    module = Line(optimizer, schedule)
    FederatedTrainer(max_rounds=1, callbacks=[ClientData(data), *methods, FedNova()], **how, **QUIET).fit(module)
    return float(module.w.detach()) - 3


SGDS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "Nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
}


@pytest.mark.parametrize("name", SGDS)
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_where_gradients_are_one_it_goes_as_far_as_all_clients_on_average_without_the_term(
    name: str, mu: float
) -> None:
    optimizer = partial(torch.optim.SGD, lr=0.1, **SGDS[name])

    def alone(steps: int) -> float:
        w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        local = optimizer([w])
        for _ in range(steps):
            w.grad = torch.ones_like(w)
            local.step()
        return float(w)

    expected = sum(n / 16 * alone(n) for n in (2, 5, 9))
    assert line(optimizer, FedProx(mu)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_a_schedule_within_the_round_counts(rho: float) -> None:
    """From the server's side: each client's update over its ``a_i`` is the same, so it is their mean length."""
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=rho)

    def alone(steps: int) -> float:
        velocity = w = 0.0
        for step in range(steps):
            velocity = rho * velocity + 1
            w -= 0.1 / (1 + step) * velocity
        return w

    assert line(optimizer, schedule=lambda step: 1 / (1 + step)) == pytest.approx(
        sum(n / 16 * alone(n) for n in (2, 5, 9)), rel=1e-12
    )


def test_accumulated_gradients_are_one_step() -> None:
    length = line(sgd, steps=(3, 6, 9), accumulate_grad_batches=3)
    assert length == pytest.approx(-0.1 * (3 * 1 + 6 * 2 + 9 * 3) / 18)


@pytest.mark.parametrize("optimizer", [sgd, momentum])
def test_equal_numbers_of_steps_are_fedavg_bit_for_bit(optimizer: Any) -> None:
    net = network(torch.float64, batch_norm=True)
    how = {"limit_train_batches": 2}  # of which each client has at least two, of unequal sizes
    assert_equal(federated(net, optimizer, FedNova(), **how), federated(net, optimizer, FedAvg(), **how))


@pytest.mark.parametrize("way", WAYS)
def test_engines_and_vectorized_clients_give_the_same(way: str) -> None:
    net = network(torch.float64, batch_norm=True)
    alone = federated(net, momentum, FedNova())
    other = federated(net, momentum, FedNova(), **WAYS[way])
    (assert_close if "vectorize_clients" in WAYS[way] else assert_equal)(other, alone)


def test_a_personal_head_is_left_out() -> None:
    """Equal numbers of steps are still FedAvg, of what travels."""
    net, how = network(torch.float64), {"limit_train_batches": 2}
    one, other = (federated(net, momentum, FedPer("net.2"), mean(), **how) for mean in (FedNova, FedAvg))
    assert_equal(one, other)


def test_steps_that_train_a_personal_head_alone_do_not_count() -> None:
    """All gradients are 1: of what travels each client goes as far as its steps of the second epoch."""

    class WithHead(Line):
        def __init__(self) -> None:
            super().__init__(partial(torch.optim.SGD, lr=0.1, momentum=0.9))
            self.head = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return (self.w + self.head).sum()

        def configure_optimizers(self) -> Any:
            return self.optimizer(self.parameters())

    module, steps = WithHead(), (2, 5, 9)
    data = [DataLoader(TensorDataset(torch.zeros(n, 1)), batch_size=1) for n in steps]
    callbacks = [ClientData(data), FedRep("head"), FedNova()]
    FederatedTrainer(max_rounds=1, local_epochs=2, callbacks=callbacks, **QUIET).fit(module)
    lengths = [0.1 * references.fednova_normalizer(n, 0.1, 0.9, 0.0) for n in steps]
    expected = sum(n / 16 * length for n, length in zip(steps, lengths, strict=True))
    assert 3 - float(module.w.detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("way", ["in process", "vectorized", "processes"])
def test_a_run_that_is_stopped_in_a_round_goes_on_bit_for_bit(way: str, hook: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, hook, momentum, FedNova, **WAYS.get(way, {}))


def test_a_second_fit_is_as_the_first() -> None:
    net, nova = network(torch.float64), FedNova()
    assert_equal(federated(net, momentum, nova), federated(net, momentum, nova))


class TwoGroups(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([{"params": self.net[0].parameters(), "lr": 0.2}, {"params": self.net[2].parameters()}])


class TwoOptimizers(Classifier):
    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [sgd(self.net[0].parameters()), sgd(self.net[2].parameters())]


ERRORS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "Adam": (adam, {}, r"client 0 trains with Adam; FedNova knows how far torch.optim.SGD goes.* Write that, or Scaff"),
    "groups": (sgd, {"kind": TwoGroups}, r"client 0 has parameter groups with lr=0.001 and 0.2: .* the same lr, or"),
    "optimizers": (sgd, {"kind": TwoOptimizers}, r"client 0 trains with 2 optimizers; FedNova counts the steps of one"),
    "no step": (partial(torch.optim.SGD, lr=0.0), {}, r"client 0 trained with steps that add up to 0 learning rates"),
    "carried momentum": (momentum, {"client_state": "carry"}, r"FedNova: client_state='carry' lets .* go on from"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_cannot_be_counted_is_refused(what: str) -> None:
    optimizer, how, said = ERRORS[what]
    with pytest.raises(FederationError, match=said):
        federated(network(torch.float64), optimizer, FedNova(), **how)


def test_a_proximal_term_that_turns_steps_round_is_refused() -> None:
    with pytest.raises(FederationError, match=r"add up to -.* times FedProx's mu of 25 greater than 1"):
        line(sgd, FedProx(25.0))


def test_two_aggregations_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="FedAvg and FedNova both decide the aggregation"):
        FederatedTrainer(max_rounds=1, num_clients=2, callbacks=[FedAvg(), FedNova()])


class SendsNothing(L.Callback):
    """Makes client 2 send 0; it comes after the method's own part."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.client_id == 2:
            counter = next(one for one in trainer.callbacks if isinstance(one, LocalMethod))
            counter.sent["normalizer"] = torch.zeros(())


def test_a_client_that_says_it_went_nowhere_is_named() -> None:
    with pytest.raises(
        FederationError,
        match=r"Round 1, train: client 2 sent normalizer=0 for FedNova, which divides by it; it is greater",
    ):
        federated(network(torch.float64), sgd, FedNova(), client_callbacks=[SendsNothing()])
