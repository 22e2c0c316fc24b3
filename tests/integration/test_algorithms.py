"""Each algorithm through FederatedTrainer equals a plain torch loop written from its paper, on the same batches."""

from __future__ import annotations

import copy
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
)
from tests.helpers import QUIET, sweep
from tests.integration import plain

SIZES = (6, 12, 22)
ROUNDS, EPOCHS = 3, 2

sgd = partial(torch.optim.SGD, lr=0.1)
momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
adam = partial(torch.optim.Adam, lr=0.01)


class Classifier(L.LightningModule):
    def __init__(self, net, optimizer=sgd):
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def network(dtype=torch.float32, batch_norm=False):
    torch.manual_seed(3)
    norm = [nn.BatchNorm1d(7)] if batch_norm else []
    return nn.Sequential(nn.Linear(6, 7), *norm, nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def loaders(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(11)
    made = []
    for client, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=generator).to(dtype) + client
        y = (torch.randint(0, 3, (size,), generator=generator) + client) % 3
        made.append(DataLoader(TensorDataset(x, y), batch_size=4, shuffle=False))
    return made


def federated(net, callbacks, *, data=None, optimizer=sgd, rounds=ROUNDS, **arguments):
    """The weights that FederatedTrainer gives."""
    module = Classifier(copy.deepcopy(net), optimizer)
    data = loaders(next(net.parameters()).dtype) if data is None else data
    if "local_steps" not in arguments:
        arguments["local_epochs"] = EPOCHS
    callbacks = [ClientData(data), *callbacks]
    FederatedTrainer(max_rounds=rounds, callbacks=callbacks, **arguments, **QUIET).fit(module)
    return module.net.state_dict()


def by_the_paper(net, **how):
    """The weights of the plain loop."""
    data = [list(loader) for loader in loaders(next(net.parameters()).dtype)]
    how = {"rounds": ROUNDS, "epochs": EPOCHS, "optimizer": sgd, "server": plain.TakeMean(), **how}
    return plain.federate(net, data, **how)


def assert_equal_weights(ours, theirs, rtol, atol):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=atol, msg=lambda text, name=name: name + text)


def distance(a, b):
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


# Method: (what the user writes, what the plain loop is given). The hyperparameters are far from the defaults, and such
# that no two methods come near each other.
METHODS = {
    "FedAvg": (lambda: [FedAvg()], dict),
    "FedAvg by default": (list, dict),
    "FedAvg uniform": (lambda: [FedAvg(weighting="uniform")], lambda: {"uniform": True}),
    "FedProx": (lambda: [FedProx(mu=2.0)], lambda: {"mu": 2.0}),
    "FedAvgM": (
        lambda: [FedAvgM(learning_rate=0.7, momentum=0.6)],
        lambda: {"server": plain.Momentum(0.7, 0.6)},
    ),
    "FedAvgM uniform": (
        lambda: [FedAvgM(learning_rate=0.7, momentum=0.6, weighting="uniform")],
        lambda: {"server": plain.Momentum(0.7, 0.6), "uniform": True},
    ),
    "FedAvgM by round": (
        lambda: [FedAvgM(learning_rate=[0.7, 0.2], momentum=0.6)],
        lambda: {"server": plain.ByRound(plain.Momentum(0.7, 0.6), [0.7, 0.2, 0.2])},
    ),
    "FedAdam by round": (
        lambda: [FedAdam(learning_rate=lambda round: 0.3 / round, beta_1=0.8, beta_2=0.6, tau=0.05)],
        lambda: {"server": plain.ByRound(plain.Adaptive("adam", 0.3, 0.8, 0.6, 0.05), [0.3, 0.15, 0.1])},
    ),
    "FedAdagrad": (
        lambda: [FedAdagrad(learning_rate=0.1, beta_1=0.3, tau=0.05)],
        lambda: {"server": plain.Adaptive("adagrad", 0.1, 0.3, 0.0, 0.05)},
    ),
    "FedAdam": (
        lambda: [FedAdam(learning_rate=0.1, beta_1=0.8, beta_2=0.6, tau=0.05)],
        lambda: {"server": plain.Adaptive("adam", 0.1, 0.8, 0.6, 0.05)},
    ),
    "FedYogi": (
        lambda: [FedYogi(learning_rate=0.1, beta_1=0.8, beta_2=0.6, tau=0.05)],
        lambda: {"server": plain.Adaptive("yogi", 0.1, 0.8, 0.6, 0.05)},
    ),
    "FedProx with FedAdam": (
        lambda: [FedAdam(learning_rate=0.1, beta_1=0.8, beta_2=0.6, tau=0.05), FedProx(mu=2.0)],
        lambda: {"server": plain.Adaptive("adam", 0.1, 0.8, 0.6, 0.05), "mu": 2.0},
    ),
}


@pytest.mark.parametrize("method", sweep(METHODS, ["FedAvg", "FedAdam"]))
def test_a_method_equals_its_paper(method):
    callbacks, reference = METHODS[method]
    net = network()
    assert_equal_weights(federated(net, callbacks()), by_the_paper(net, **reference()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_equals_its_paper_to_many_digits_in_float64(method):
    callbacks, reference = METHODS[method]
    net = network(torch.float64)
    assert_equal_weights(federated(net, callbacks()), by_the_paper(net, **reference()), rtol=1e-10, atol=1e-13)


def test_no_two_methods_are_near_enough_to_be_mistaken_for_each_other():
    net = network(torch.float64)
    results = {name: by_the_paper(net, **reference()) for name, (_, reference) in METHODS.items()}
    del results["FedAvg by default"]
    names = list(results)
    near = [(a, b) for a in names for b in names if a < b and distance(results[a], results[b]) < 1e-3]
    assert not near


@pytest.mark.parametrize("optimizer", [momentum, adam], ids=["momentum", "adam"])
def test_fedprox_equals_its_paper_with_any_local_optimizer(optimizer):
    net = network(torch.float64)
    reference = by_the_paper(net, mu=2.0, optimizer=optimizer)
    assert_equal_weights(federated(net, [FedProx(mu=2.0)], optimizer=optimizer), reference, rtol=1e-9, atol=1e-12)
    assert distance(reference, by_the_paper(net, optimizer=optimizer)) > 1e-3


@pytest.mark.parametrize("optimizer", [momentum, adam], ids=["momentum", "adam"])
def test_the_local_optimizer_starts_anew_each_round(optimizer):
    net = network()
    assert_equal_weights(
        federated(net, [], optimizer=optimizer), by_the_paper(net, optimizer=optimizer), rtol=1e-5, atol=1e-6
    )


def test_fedprox_with_mu_zero_is_bitwise_fedavg():
    net = network()
    assert distance(federated(net, [FedProx(mu=0.0)]), federated(net, [])) == 0


@pytest.mark.parametrize("method", ["FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedProx"])
def test_server_optimizers_step_parameters_and_batchnorm_statistics_take_the_mean(method):
    callbacks, reference = METHODS[method]
    net = network(torch.float64, batch_norm=True)
    ours, theirs = federated(net, callbacks()), by_the_paper(net, **reference())
    assert_equal_weights(ours, theirs, rtol=1e-9, atol=1e-12)
    counter = ours["1.num_batches_tracked"]
    # A client of 6, 12 or 22 examples makes 2 * 2, 2 * 3 or 2 * 6 steps a round: 9 on average, weighted by examples.
    assert counter.dtype == torch.int64
    assert counter == 27


def test_uniform_weighting_holds_for_batchnorm_statistics():
    net = network(torch.float64, batch_norm=True)
    ours = federated(net, [FedAvg(weighting="uniform")])
    theirs = by_the_paper(net, uniform=True)
    assert_equal_weights(ours, theirs, rtol=1e-9, atol=1e-12)
    assert ours["1.num_batches_tracked"] == 3 * 7  # (4 + 6 + 12) / 3 = 7.33 a round, rounded


@pytest.mark.parametrize("steps", [1, 7])
def test_local_steps_counts_optimizer_steps_across_epochs(steps):
    net = network(torch.float64)
    ours = federated(net, [FedProx(mu=2.0)], local_steps=steps)
    assert_equal_weights(ours, by_the_paper(net, mu=2.0, steps=steps), rtol=1e-10, atol=1e-13)


LOCAL_ARGUMENTS = {
    "clip by norm": {"gradient_clip_val": 0.05},
    "clip by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 2},
    "clip and accumulate": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 4},
    "limit batches": {"limit_train_batches": 2},
}


@pytest.mark.parametrize("arguments", LOCAL_ARGUMENTS.values(), ids=LOCAL_ARGUMENTS)
def test_training_arguments_act_on_clients_as_in_a_plain_trainer(arguments):
    net = network()
    ours = federated(net, [], **arguments)
    theirs = averaged_plain_trainers(net, arguments)
    assert_equal_weights(ours, theirs, rtol=1e-5, atol=1e-7)
    assert distance(theirs, averaged_plain_trainers(net, {})) > 1e-3


def averaged_plain_trainers(net, arguments):
    """A plain ``lightning.Trainer`` for each client and round, averaged by hand."""
    net = copy.deepcopy(net)
    sizes = [min(size, 4 * arguments.get("limit_train_batches", 100)) for size in SIZES]  # of an epoch
    for _ in range(ROUNDS):
        states = []
        for loader in loaders():
            module = Classifier(copy.deepcopy(net))
            L.Trainer(max_epochs=EPOCHS, **arguments, **QUIET).fit(module, loader)
            states.append(module.net.state_dict())
        net.load_state_dict(plain.mean_of(states, sizes))
    return net.state_dict()


def test_fedprox_adds_its_gradient_before_clipping():
    # One full-batch step from the round's weights has no proximal gradient; the second one is clipped with it.
    net, clip, mu = network(torch.float64), 0.05, 3.0
    data = [DataLoader(loader.dataset, batch_size=64) for loader in loaders(torch.float64, sizes=(9,))]
    ours = federated(net, [FedProx(mu)], data=data, rounds=1, gradient_clip_val=clip)

    theirs = copy.deepcopy(net)
    start = [p.detach().clone() for p in theirs.parameters()]
    x, y = next(iter(data[0]))
    for _ in range(EPOCHS):
        theirs.zero_grad()
        proximal = mu / 2 * sum(((p - s) ** 2).sum() for p, s in zip(theirs.parameters(), start, strict=True))
        (nn.functional.cross_entropy(theirs(x), y) + proximal).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        with torch.no_grad():
            for p in theirs.parameters():
                p -= 0.1 * p.grad
    assert_equal_weights(ours, theirs.state_dict(), rtol=1e-9, atol=1e-12)
