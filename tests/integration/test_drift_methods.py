"""Methods that correct drift where a client fails; these and personal methods on Ray."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch

from lightning_fed.callbacks import (
    APFL,
    Ditto,
    FaultTolerance,
    FedBN,
    FedDyn,
    FedNova,
    FedPer,
    FedRep,
    LGFedAvg,
    Moon,
    Scaffold,
    TrainableOnly,
)
from tests import references
from tests.callbacks.rounds import SIZES, assert_close, assert_equal, batches, encoded, federated, loss, momentum, sgd
from tests.callbacks.test_personal import fit
from tests.integration.test_algorithms import network


class Fails(L.Callback):
    """Fails at the end of a fit, in the last round of client 1."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if (trainer.current_round, trainer.client_id) == (3, 1):
            raise RuntimeError("no more")


def without_it() -> list[Any]:
    rounds = batches()
    rounds[2][1] = None
    return rounds


REFERENCES: dict[str, tuple[Any, Any]] = {
    "Scaffold": (Scaffold, lambda net: references.scaffold(net, without_it(), loss, sgd)[-1]),
    "FedNova": (FedNova, lambda net: references.fednova(net, without_it(), SIZES, loss, lr=0.1)[-1]),
    "FedDyn": (lambda: FedDyn(0.3), lambda net: references.feddyn(net, without_it(), loss, sgd, alpha=0.3)[0][-1]),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("engine", ["in_process", "processes"])
def test_a_client_that_fails_is_as_one_that_was_not_asked(name: str, engine: str) -> None:
    method, reference = REFERENCES[name]
    net = network(torch.float64)
    how: Any = {"client_callbacks": [Fails()], "engine": engine}
    ours = federated(net, sgd, method(), FaultTolerance(min_results=1, on_error="ignore"), **how)
    assert_close(ours, reference(copy.deepcopy(net)))


METHODS: dict[str, tuple[Any, Any]] = {
    "Scaffold": (Scaffold, network(torch.float64, batch_norm=True)),
    "Scaffold, option I": (lambda: Scaffold(option="I"), network(torch.float64, batch_norm=True)),
    "FedNova": (FedNova, network(torch.float64, batch_norm=True)),
    "FedDyn": (FedDyn, network(torch.float64, batch_norm=True)),
    "Moon": (lambda: Moon(representation="net.encoder"), encoded(batch_norm=True)),
}


@pytest.mark.ray
@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("name", METHODS)
def test_on_ray_it_is_the_same_bit_for_bit(name: str) -> None:
    method, net = METHODS[name]
    assert_equal(federated(net, momentum, method(), engine="ray", num_workers=2), federated(net, momentum, method()))


PERSONAL: dict[str, Any] = {
    "FedPer": lambda: FedPer("net.3"),
    "LG-FedAvg": lambda: LGFedAvg("net.0", "net.1"),
    "FedBN": FedBN,
    "FedRep": lambda: FedRep("net.3"),
    "Ditto": Ditto,
    "APFL": APFL,
    "TrainableOnly": TrainableOnly,
}


@pytest.mark.ray
@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("name", PERSONAL)
def test_on_ray_clients_end_with_the_same_models_bit_for_bit(name: str) -> None:
    net = network(torch.float64, batch_norm=True)
    net[0].bias.requires_grad_(name != "TrainableOnly")
    (ray, ours), (alone, theirs) = (
        fit(net, PERSONAL[name](), **how) for how in ({"engine": "ray", "num_workers": 2}, {})
    )
    assert_equal(ours.state_dict(), theirs.state_dict())
    for client in range(len(SIZES)):
        assert_equal(ray.personal_module(client).state_dict(), alone.personal_module(client).state_dict())
