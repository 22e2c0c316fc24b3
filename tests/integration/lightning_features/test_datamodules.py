"""Datamodules and loaders of a module's own act on clients and at the server."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fed.callbacks import ClientData, History
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.integration.lightning_features.fits import Each, Whole, federated, same, toy, train, val, weights

TRANSFERRED: list[tuple[str, Any]] = []  # what a client appends to a list of the datamodule's own is restored


class Data(L.LightningDataModule):
    """Notes what is called, and whose batches it transfers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append("setup " + stage)
        self.data = toy_data(32)

    def teardown(self, stage: str) -> None:
        self.calls.append("teardown " + stage)

    def train_dataloader(self) -> DataLoader:
        self.calls.append("train_dataloader")
        return DataLoader(self.data, 8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return val()

    test_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        TRANSFERRED.append(("before", getattr(self.trainer, "client_id", "server")))
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        TRANSFERRED.append(("after", getattr(self.trainer, "client_id", "server")))
        return [batch[0] * 0, batch[1]]


def test_a_datamodule_is_set_up_once_and_its_batch_hooks_act_on_clients_and_at_the_server():
    TRANSFERRED.clear()
    data = Data()
    inputs = Each("on_before_zero_grad", lambda trainer, module: module.seen)

    class Noting(ToyModule):
        def training_step(self, batch, batch_idx):
            self.seen = float(batch[0].abs().sum())
            return super().training_step(batch, batch_idx)

    trainer = federated(rounds=2, client_callbacks=[inputs])
    trainer.fit(toy(Noting), datamodule=data)
    assert data.calls == ["prepare_data", "setup fit", "train_dataloader", "teardown fit"]
    assert set(inputs.seen) == {0.0}
    # 2 rounds of 2 clients' 2 batches, then the server's 2 of validation.
    in_a_round = [(when, client) for client in (0, 1) for _ in range(2) for when in ("before", "after")]
    validating = [(when, "server") for _ in range(2) for when in ("before", "after")]
    assert (in_a_round + validating) * 2 == TRANSFERRED
    assert type(data) is Data

    trainer.test(toy(Whole), datamodule=data, verbose=False)
    assert data.calls[4:] == ["prepare_data", "setup test", "teardown test"]


class Staged(L.LightningDataModule):
    """As Lightning's documentation writes them: what a fit reads, its validation data too, is made for ``"fit"``."""

    def __init__(self, client: int) -> None:
        super().__init__()
        self.client, self.made = client, False

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.made, self.train, self.val = True, toy_data(16 + 8 * self.client), toy_data(8, seed=1 + self.client)
        if stage == "test":
            self.test = toy_data(4 + self.client, seed=7)

    def teardown(self, stage: str) -> None:
        if stage != "test":
            TORN_DOWN.append((stage, self.made))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 8)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 8)


TORN_DOWN: list[tuple[str, bool]] = []


@pytest.mark.parametrize("engine", ["in_process", Processes(2, start_method="fork")], ids=["in_process", "processes"])
def test_a_client_s_datamodule_that_makes_its_validation_data_for_the_fit_evaluates(engine):
    TORN_DOWN.clear()
    history = History(per_client=True)
    trainer = federated(ClientData(Staged, num_clients=2), history, rounds=2, engine=engine)
    trainer.fit(toy(Whole))
    evaluated = [row["num_examples"] for row in history.clients if row["stage"] == "evaluate"]
    assert evaluated == [8] * 4
    assert len(history["clients/val_loss"]) == 2
    assert set(TORN_DOWN) == ({("fit", True)} if engine == "in_process" else set())
    assert [row["num_examples"] for row in trainer.test_clients().rows] == [4, 5]


def test_a_datamodule_given_first_is_one_too():
    history = History()
    federated(history).fit(toy(), Data())
    assert len(history["val_loss"]) == 3


def test_a_module_may_bring_its_own_loaders():
    class Complete(ToyModule):
        def train_dataloader(self):
            return train()

        def val_dataloader(self):
            return val()

    def fit(module: ToyModule, *loaders: DataLoader) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        history = History()
        federated(history, held_out=True).fit(module, *loaders)
        return weights(module), history.rows

    own, own_rows = fit(toy(Complete))
    given, given_rows = fit(toy(), train(), val())
    assert same(own, given)
    assert own_rows == given_rows


@pytest.mark.parametrize(("every", "opened"), [(0, 1), (1, 3), (2, 2)])
def test_reload_dataloaders_every_n_epochs_opens_the_loaders_anew(every, opened):
    class Opened(Data):
        def val_dataloader(self) -> DataLoader:
            self.calls.append("val_dataloader")
            return super().val_dataloader()

    data = Opened()
    federated(rounds=3, reload_dataloaders_every_n_epochs=every).fit(toy(), datamodule=data)
    assert data.calls.count("train_dataloader") == opened
    assert data.calls.count("val_dataloader") == opened
