"""FedDyn against the paper's equations, with unequal clients, part of whom take part in a round."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FedAdam, FedDyn, FederatedCallback, FedPer, FedProx
from lightning_fed.errors import ConfigurationError
from lightning_fed.values.weights import read
from lightning_fed.wire import messages
from tests import references
from tests.callbacks.rounds import (
    HOOKS,
    WAYS,
    Chosen,
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

ALPHA = 0.3
OPTIMIZERS = {"SGD": sgd, "momentum": momentum, "Adam": adam}


def by_the_paper(net: nn.Module, optimizer: Any, **how: Any) -> tuple[list[references.Weights], ...]:
    return references.feddyn(copy.deepcopy(net), batches(), loss, optimizer, alpha=ALPHA, **how)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_rounds_are_the_papers_with_any_optimizer(name: str) -> None:
    net = network(torch.float64, batch_norm=name != "Adam")  # which makes steps of the noise of a bias before a norm
    assert_close(federated(net, OPTIMIZERS[name], FedDyn(ALPHA)), by_the_paper(net, OPTIMIZERS[name])[0][-1])


def test_with_fedprox_both_terms_count() -> None:
    net = network(torch.float64)
    assert_close(federated(net, sgd, FedProx(0.5), FedDyn(ALPHA)), by_the_paper(net, sgd, mu=0.5)[0][-1])


def test_a_personal_head_is_left_alone() -> None:
    net = network(torch.float64)
    expected = by_the_paper(net, momentum, personal=lambda name: name.startswith("2."))[0][-1]
    ours = federated(net, momentum, FedPer("net.2"), FedDyn(ALPHA))
    assert_close({name: ours[name] for name in expected}, expected)


SENT: list[tuple[str, int, references.Weights]] = []


def keep(message: Any, context: Any, call_next: Any) -> Any:
    weights = messages.unpack(messages.first(message.content, ArrayRecord))
    weights = {name.removeprefix("net."): tensor.clone() for name, tensor in weights.items()}
    SENT.append((message.metadata.message_type, messages.read_instruction(message).round, weights))
    return call_next(message, context)


class Watches(FederatedCallback):
    """Keeps what clients are sent, and what the module has after each round."""

    def __init__(self) -> None:
        self.had: list[references.Weights] = []

    def client_mods(self, stage: str) -> list[Any]:
        return [keep]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.had.append(read(pl_module.net))


class Validates(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_clients_are_sent_other_weights_to_train_than_the_round_gives_and_all_evaluate() -> None:
    net, watches = network(torch.float64), Watches()
    after, sent = by_the_paper(net, sgd)
    SENT.clear()
    callbacks = [ClientData([(loader, loader) for loader in loaders()]), Chosen(), FedDyn(ALPHA), watches]
    how: Any = {**QUIET, "max_rounds": 3, "local_epochs": 2, "callbacks": callbacks}
    FederatedTrainer(**how).fit(Validates(copy.deepcopy(net), sgd))
    assert sorted({(stage, round) for stage, round, _ in SENT}) == [
        (stage, round) for stage in ("evaluate", "train") for round in (1, 2, 3)
    ]
    for stage, round, weights in SENT:
        assert_close(weights, sent[round - 1] if stage == "train" else after[round - 1])
    for weights, expected in zip(watches.had, after, strict=True):
        assert_close(weights, expected)
    assert not torch.allclose(sent[2]["0.weight"], after[1]["0.weight"], rtol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_engines_and_vectorized_clients_give_the_same(way: str) -> None:
    net = network(torch.float64, batch_norm=True)
    alone = federated(net, momentum, FedDyn(ALPHA))
    other = federated(net, momentum, FedDyn(ALPHA), **WAYS[way])
    (assert_close if "vectorize_clients" in WAYS[way] else assert_equal)(other, alone)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("way", ["in process", "vectorized", "processes"])
def test_a_run_that_is_stopped_in_a_round_goes_on_bit_for_bit(way: str, hook: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, hook, momentum, lambda: FedDyn(ALPHA), **WAYS.get(way, {}))


def test_a_second_fit_begins_anew() -> None:
    net, dyn = network(torch.float64), FedDyn(ALPHA)
    assert_equal(federated(net, sgd, dyn), federated(net, sgd, dyn))


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="FedDyn: alpha=0 must be > 0"):
        FedDyn(0)
    with pytest.raises(ConfigurationError, match="FedAdam and FedDyn both decide the aggregation"):
        FederatedTrainer(max_rounds=1, num_clients=2, callbacks=[FedAdam(), FedDyn()])


def test_a_layer_that_is_unfrozen_at_an_epochs_start_has_the_terms() -> None:
    net = network(torch.float64)
    ours = federated(net, sgd, FedDyn(ALPHA), client_callbacks=[UnfreezesLate()])
    assert_equal(ours, federated(net, sgd, FedDyn(ALPHA)))


class Unfreezes(FederatedCallback):
    def on_round_start(self, trainer: Any, round: int, stage: str, cohort: Any) -> None:
        trainer.lightning_module.net[0].requires_grad_(round > 1)


class FrozenInTheFirstRound(L.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_round == 1:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.0


def by_layer(parameters: Any) -> torch.optim.Optimizer:
    first, second, *others = parameters
    return torch.optim.SGD([{"params": [first, second]}, {"params": others}], lr=0.1)


def test_a_parameter_that_begins_to_train_later_goes_as_one_that_did_not_move_before() -> None:
    net = network(torch.float64)
    still = federated(net, by_layer, FedDyn(ALPHA), client_callbacks=[FrozenInTheFirstRound()], client_state="reset")
    net[0].requires_grad_(False)
    assert_equal(federated(net, by_layer, FedDyn(ALPHA), Unfreezes(), client_state="reset"), still)
