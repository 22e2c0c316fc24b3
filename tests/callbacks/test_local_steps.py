"""What methods that follow a client's optimizer have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_fed.callbacks import APFL, Ditto, FedDyn, FedNova, FedProx, Scaffold
from lightning_fed.errors import FederationError
from tests.callbacks.rounds import assert_equal, federated, loss, sgd
from tests.integration.test_algorithms import Classifier, network

METHODS = [Scaffold(), Scaffold(option="I"), Scaffold(option="II"), FedDyn(), FedNova(), FedProx(0.5), Ditto(), APFL()]


class ByHand(Classifier):
    """Steps an optimizer itself: Lightning's, or the one within it."""

    def __init__(self, net: nn.Module, optimizer: Any, is_lightnings: bool = False) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization, self.is_lightnings = False, is_lightnings

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=self.is_lightnings)
        optimizer.zero_grad()
        self.manual_backward(loss(self.net, batch))
        optimizer.step()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_steps_of_which_lightning_calls_no_hook_are_said(method: Any) -> None:
    net, name = network(torch.float64), type(method).__name__
    said = f"steps an optimizer past Lightning, so {name} hears of no step.*use_pl_optimizer=False"
    with pytest.raises(FederationError, match=said):
        federated(net, sgd, method, kind=ByHand)


def by_hand(net: nn.Module, optimizer: Any) -> ByHand:
    return ByHand(net, optimizer, is_lightnings=True)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_steps_of_lightnings_own_are_as_automatic_ones(method: Any) -> None:
    net = network(torch.float64)
    assert_equal(federated(net, sgd, method, kind=by_hand), federated(net, sgd, method))


class Idle(ByHand):
    """Steps nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, FedNova)], ids=lambda m: type(m).__name__)
def test_a_fit_that_changes_nothing_that_trains_is_no_fault(method: Any) -> None:
    net = network(torch.float64)
    assert_equal(federated(net, sgd, method, kind=Idle), net.state_dict())
