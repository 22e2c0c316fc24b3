"""Arguments of a Trainer that are about training act in clients' local fits."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    History,
)
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET
from tests.integration.lightning_features.fits import Each, federated, same, toy, train, val, weights


def test_client_callbacks_are_copied_for_each_local_fit():
    class Counting(Callback):
        found: list[int] = []

        def __init__(self) -> None:
            self.batches = 0

        def on_train_batch_start(self, *args: Any) -> None:
            self.batches += 1

        def on_train_end(self, *args: Any) -> None:
            self.found.append(self.batches)

    mine = Counting()
    federated(rounds=2, client_callbacks=[mine]).fit(toy(), train())
    assert Counting.found == [2] * 4
    assert mine.batches == 0


def test_training_arguments_reach_the_clients_and_not_the_server():
    def arguments(trainer: Any, module: Any) -> Any:
        names = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "limit_train_batches")
        return tuple(getattr(trainer, name) for name in names)

    on_clients, at_server = Each("on_train_start", arguments), Each("on_train_start", arguments)
    given = {
        "gradient_clip_val": 0.5,
        "gradient_clip_algorithm": "value",
        "accumulate_grad_batches": 2,
        "limit_train_batches": 1,
    }
    federated(at_server, client_callbacks=[on_clients], rounds=1, **given).fit(toy(), train())
    assert on_clients.seen == [(0.5, "value", 2, 1)] * 2
    assert at_server.seen == [(None, None, 1, 1.0)]


def test_clipping_accumulation_and_limits_do_on_a_client_what_they_do_in_a_plain_trainer():
    for given in (
        {"gradient_clip_val": 0.01},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 2},
        {"overfit_batches": 1},
    ):
        options = {"limit_val_batches": 0, **given}
        module, expected = toy(), toy()
        clients = ClientData([train()])
        federated(clients, rounds=1, local_epochs=2, **options).fit(module)
        L.Trainer(max_epochs=2, **QUIET, **options).fit(expected, train())
        assert same(weights(module), weights(expected)), given
        assert not same(weights(module), weights(toy()))


@pytest.mark.parametrize("options", [{"overfit_batches": 2}, {"local_validation": True}])
@pytest.mark.parametrize("has_val", [False, True])
def test_a_local_fit_validates_only_if_it_is_to_and_can_and_nothing_is_said_of_lists(options, has_val):
    validated = Each("on_validation_batch_start", lambda trainer, module: trainer.client_id)
    clients = [DataLoader(toy_data(n), 8) for n in (16, 40, 24)]
    if has_val:
        clients[1] = (clients[1], DataLoader(toy_data(9, seed=1), 9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = FederatedTrainer(
            max_rounds=2, callbacks=[ClientData(clients)], client_callbacks=[validated], **QUIET, **options
        )
        trainer.fit(toy())
    assert not [one for one in caught if "Total length of `list`" in str(one.message)]
    in_fits = 2 if has_val and "local_validation" in options else 0
    assert validated.seen == [1] * (in_fits + 2 * has_val)  # and the clients' evaluation of each round


PRECISIONS = {
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "64-true": (torch.float64, torch.float64),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_holds_at_the_server_and_on_clients(precision):
    stored, computed = PRECISIONS[precision]
    found = []

    class Noting(ToyModule):
        def forward(self, x):
            logits = super().forward(x)
            found.append((logits.dtype, torch.get_default_dtype(), self.net[0].weight.dtype))
            return logits

    module, history = toy(Noting), History()
    start = weights(module)
    federated(history, precision=precision, held_out=True).fit(module, train(), val())
    default = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    # 3 rounds: 2 clients train 2 batches and evaluate 1, the server validates 2.
    assert found == [(computed, default, stored)] * 3 * (2 * (2 + 1) + 2)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {stored}
    assert torch.get_default_dtype() == torch.float32
    assert not torch.allclose(start["net.0.weight"].double(), module.net[0].weight.double())
    assert all(0 < loss < 1 for loss in history["clients/val_loss"] + history["val_loss"])


def test_detect_anomaly_and_deterministic_act_on_clients():
    found: list[tuple[bool, bool]] = []

    class Noting(ToyModule):
        def training_step(self, batch, batch_idx):
            found.append((torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled()))
            return super().training_step(batch, batch_idx)

    try:
        federated(rounds=1, detect_anomaly=True, deterministic=True).fit(toy(Noting), train())
        assert found == [(True, True)] * 4
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.is_anomaly_enabled()
