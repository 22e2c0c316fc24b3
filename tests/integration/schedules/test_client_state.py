"""client_state: optimizers and schedules begin anew, go on with the client, or follow the global round."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_fed import ClientError, ConfigurationError
from lightning_fed.callbacks import (
    ClientData,
)
from lightning_fed.callbacks.base import CohortOwner
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET
from tests.integration.lightning_features.fits import Each, federated, toy, train, val, weights


class WithAdam(ToyModule):
    """Adam, and its learning rate as its metric."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def plain_adam(epochs: int, new_each_epoch: bool) -> dict[str, Tensor]:
    """Adam in a bare loop, over what client 0 trains on."""
    module = toy(WithAdam)
    for epoch in range(epochs):
        if epoch == 0 or new_each_epoch:
            optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for x, y in train():
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    return weights(module)


def test_adams_moments_are_new_each_round_or_carried_on_with_the_client():
    for client_state, new_each_epoch in (("reset", True), ("carry", False)):
        module = toy(WithAdam)
        federated(ClientData([train()]), client_state=client_state).fit(module)
        expected = plain_adam(3, new_each_epoch)
        other = plain_adam(3, not new_each_epoch)
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
        assert not torch.allclose(module.net[0].weight, other["net.0.weight"], rtol=1e-3)


class Scheduled(ToyModule):
    """A tenth of the learning rate after each epoch (or batch)."""

    interval = "epoch"

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


class ScheduledByBatch(Scheduled):
    interval = "step"


class Alternating(CohortOwner):
    """Client 0 trains in round 1, client 1 in all others."""

    def sample(self, stage, round, num_clients, seed):
        return [min(round - 1, 1)]


def learning_rates(cls: type[ToyModule], *, rounds: int = 3, **options: Any) -> list[tuple[int, float]]:
    """(round, learning rate) at each batch: client 0's one in round 1, then client 1's two an epoch."""

    def now(trainer: Any, module: Any) -> Any:
        return trainer.current_round, round(trainer.optimizers[0].param_groups[0]["lr"], 12)

    seen = Each("on_train_batch_start", now)
    clients = ClientData([train(8), train(16)])
    federated(clients, Alternating(), rounds=rounds, client_callbacks=[seen], **options).fit(toy(cls))
    return seen.seen


def test_schedules_begin_anew_go_on_with_the_client_or_follow_the_global_round():
    anew = learning_rates(Scheduled, client_state="reset")
    assert anew == [(1, 1.0), (2, 1.0), (2, 1.0), (3, 1.0), (3, 1.0)]
    carried = learning_rates(Scheduled, client_state="carry")
    assert carried == [(1, 1.0), (2, 1.0), (2, 1.0), (3, 0.1), (3, 0.1)]
    by_round = learning_rates(Scheduled, client_state="global")
    assert by_round == [(1, 1.0), (2, 0.1), (2, 0.1), (3, 0.01), (3, 0.01)]


def test_schedules_follow_the_local_epochs_of_the_global_round():
    seen = learning_rates(Scheduled, client_state="global", local_epochs=2)
    round_1 = [(1, 1.0), (1, 0.1)]
    round_2 = [(2, 0.01), (2, 0.01), (2, 0.001), (2, 0.001)]
    assert seen == [*round_1, *round_2, (3, 1e-4), (3, 1e-4), (3, 1e-5), (3, 1e-5)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Client 1 has two batches an epoch: as if it had trained in all rounds before.
        ({}, [(1, 1.0), (2, 0.01), (2, 0.001), (3, 1e-4), (3, 1e-5)]),
        # One optimizer step an epoch.
        ({"accumulate_grad_batches": 2}, [(1, 1.0), (2, 0.1), (2, 0.1), (3, 0.01), (3, 0.01)]),
        ({"limit_train_batches": 1}, [(1, 1.0), (2, 0.1), (3, 0.01)]),
        ({"local_steps": 1}, [(1, 1.0), (2, 0.1), (3, 0.01)]),
        ({"local_steps": 3}, [(1, 1.0), (1, 0.1), (1, 0.01), (2, 1e-3), (2, 1e-4), (2, 1e-5)]),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step")
def test_schedules_by_step_follow_the_steps_of_all_rounds_before(options, expected):
    rounds = expected[-1][0]
    assert learning_rates(ScheduledByBatch, rounds=rounds, client_state="global", **options) == expected


def test_a_schedule_by_step_has_no_global_round_where_nobody_knows_an_epoch_s_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(toy_data(16))

    clients = ClientData([DataLoader(Stream(), batch_size=8)])
    with pytest.raises(ClientError, match=r"client 0 .*on a loader without length.*local_steps=.*client_state='carry'"):
        federated(clients, rounds=2, client_state="global").fit(toy(ScheduledByBatch))


class Cosine(ToyModule):
    """Anneals over all epochs, the usual way."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)]


class OneCycle(ToyModule):
    """One cycle over all steps, the usual way."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rates_of_a_plain_trainer(cls: type[ToyModule], epochs: int) -> list[float]:
    seen = Each("on_train_batch_start", lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    L.Trainer(max_epochs=epochs, callbacks=[seen], **{**QUIET, "limit_val_batches": 0}).fit(toy(cls), train(16))
    return seen.seen


def rates_of_a_client(cls: type[ToyModule], rounds: int, **options: Any) -> list[float]:
    seen = Each("on_train_batch_start", lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    federated(ClientData([train(16)]), rounds=rounds, client_callbacks=[seen], **options).fit(toy(cls))
    return seen.seen


@pytest.mark.parametrize("client_state", ["global", "carry"])
@pytest.mark.parametrize("cls", [Cosine, OneCycle])
def test_schedules_over_the_whole_run_are_those_of_a_plain_trainer(cls, client_state):
    expected = rates_of_a_plain_trainer(cls, epochs=6)
    assert rates_of_a_client(cls, 6, client_state=client_state) == pytest.approx(expected)
    assert rates_of_a_client(cls, 3, client_state=client_state, local_epochs=2) == pytest.approx(expected)


def test_a_schedule_that_begins_anew_is_the_same_in_each_round():
    expected = rates_of_a_plain_trainer(OneCycle, epochs=2)
    assert rates_of_a_client(OneCycle, 3, client_state="reset", local_epochs=2) == pytest.approx(expected * 3)
    rates = rates_of_a_client(Cosine, 3, client_state="reset", local_epochs=2)
    assert rates[:4] == rates[4:8] == rates[8:]


def test_epochs_count_up_to_max_epochs_over_the_whole_run():
    parts = Each("on_train_epoch_end", lambda trainer, module: (module.current_epoch + 1, trainer.max_epochs))
    federated(ClientData([train(16)]), rounds=3, local_epochs=2, client_callbacks=[parts]).fit(toy())
    assert parts.seen == [(epoch, 6) for epoch in range(1, 7)]


class Plateau(ToyModule):
    """Its validation loss never gets better; a scheduler watches it."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_reduce_on_plateau_watches_the_clients_own_validation():
    seen = Each("on_train_epoch_start", lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    options = {"rounds": 1, "local_epochs": 3, "held_out": True, "client_callbacks": [seen]}
    federated(local_validation=True, **options).fit(toy(Plateau), train(), val())
    assert seen.seen == pytest.approx([1.0, 1.0, 0.1] * 2)


def test_reduce_on_plateau_without_local_validation_says_what_to_write():
    with pytest.raises(ConfigurationError, match=r"ReduceLROnPlateau that monitors 'val_loss'.*local_validation=True"):
        federated(held_out=True, client_state="carry").fit(toy(Plateau), train(), val())
