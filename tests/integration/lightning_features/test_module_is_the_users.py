"""The module is the user's during and after a fit, and goes on in the next."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    FedAdam,
    History,
)
from lightning_fed.testing import ToyModule
from tests.helpers import QUIET
from tests.integration.lightning_features.fits import Each, federated, same, toy, train, val, weights


def test_the_module_is_the_users_during_and_after_fit():
    def copies(trainer: Any, module: Any) -> list[Any]:
        return [type(pickle.loads(pickle.dumps(module))), type(copy.deepcopy(module))]

    at_server, on_clients = Each("on_validation_start", copies), Each("on_train_batch_start", copies)
    module = toy(hidden=4)
    federated(at_server, rounds=1, client_callbacks=[on_clients]).fit(module, train(), val())
    assert at_server.seen == [[ToyModule, ToyModule]]
    assert on_clients.seen == [[ToyModule, ToyModule]] * 4
    assert type(module) is ToyModule
    assert not {name for name in module.__dict__ if "lightning_fed" in name}
    buffer = io.BytesIO()
    torch.save(module, buffer)
    assert same(weights(pickle.loads(pickle.dumps(module))), weights(module))


def test_a_second_fit_with_the_same_trainer_is_over_as_in_lightning_until_it_may_train_longer():
    history = History()
    trainer, module = federated(history, rounds=2), toy()
    trainer.fit(module, train(), val())
    done = weights(module)
    trainer.fit(module, train(), val())
    assert same(weights(module), done)
    assert len(history.rows) == 2

    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, train(), val())
    assert [row["round"] for row in history.rows] == [1, 2, 3, 4]
    assert trainer.global_step == 4
    four, expected = toy(), federated(rounds=4)
    expected.fit(four, train(), val())
    assert same(weights(module), weights(four))


def test_a_second_trainer_goes_on_from_the_weights_of_the_first():
    module = toy()
    federated(rounds=1).fit(module, train(), val())
    after = weights(module)
    start = Each("on_train_start", lambda trainer, module: weights(module))
    history = History()
    federated(start, history, rounds=2).fit(module, train(), val())
    assert same(start.seen[0], after)
    assert len(history.rows) == 2
    assert not same(weights(module), after)


def test_a_plain_trainer_trains_the_module_before_and_after():
    def plain(module: ToyModule) -> None:
        L.Trainer(**QUIET, max_epochs=1).fit(module, train(), val())

    module, copied = toy(), toy()
    plain(module)
    federated(rounds=1).fit(module, train(), val())
    copied.load_state_dict(module.state_dict())
    plain(module)
    plain(copied)
    assert same(weights(module), weights(copied))
    assert module.trainer.global_step == 4


def test_the_servers_optimizer_starts_anew_in_a_second_fit():
    def fit(trainer: FederatedTrainer) -> dict[str, Tensor]:
        module = toy()
        trainer.fit(module, train())
        return weights(module)

    method = FedAdam()
    assert same(fit(federated(method)), fit(federated(method)))
