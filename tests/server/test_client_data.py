"""A client's own loaders, asked for by the user: the very examples that it trains and evaluates on."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from flwr.app import Context, RecordDict
from torch.utils.data import DataLoader, random_split

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import ClientData, Partition
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET, SuperLinkLike, in_flower

SEEN: list[tuple[int, str, torch.Tensor]] = []


class Sees(ToyModule):
    """Keeps what each client trains and validates on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        SEEN.append((self.trainer.client_id, "train", batch[0].clone()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        SEEN.append((self.trainer.client_id, "val", batch[0].clone()))
        super().validation_step(batch, batch_idx)


class Data(L.LightningDataModule):
    """A client's own, which splits at random."""

    def setup(self, stage: str) -> None:
        self.parts = random_split(toy_data(30), [20, 10])

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts[0], batch_size=5)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts[1], batch_size=5)


def split(client: int) -> tuple[Any, Any]:
    parts = random_split(toy_data(21 + client, seed=client), [14, 7 + client])
    return tuple(DataLoader(part, batch_size=7) for part in parts)


def rows(batches: Any) -> list[list[float]]:
    return sorted(torch.cat(list(batches)).tolist())


@pytest.mark.parametrize("owner", [lambda: Partition(3, val_fraction=0.25), lambda: ClientData(split, num_clients=3)])
def test_they_have_what_the_client_trains_and_evaluates_on(owner: Any) -> None:
    SEEN.clear()
    trainer = FederatedTrainer(max_rounds=1, callbacks=[owner()], seed=4, **QUIET)
    train = DataLoader(toy_data(50), batch_size=7, shuffle=True) if isinstance(owner(), Partition) else None
    trainer.fit(Sees(), train)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for client in range(3):
        own = trainer.client_data(client)
        assert own.train.batch_size == 7
        for stage, loader in (("train", own.train), ("val", own.val)):
            found = rows(x for who, what, x in SEEN if (who, what) == (client, stage))
            examples = [loader.dataset[i][0] for i in range(len(loader.dataset))]
            assert found == sorted(torch.stack(examples).tolist())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_trainer_fits_them() -> None:
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, **QUIET)
    trainer.fit(ToyModule(), DataLoader(toy_data(30), batch_size=5))
    own, tuner = trainer.client_data(1), L.Trainer(max_epochs=2, **QUIET)
    tuner.fit(trainer.personal_module(1), own.train)
    assert own.val is own.datamodule is None
    assert tuner.global_step == 2 * 3


def test_a_client_s_own_datamodule_is_given_as_it_is() -> None:
    modules = [Data(), Data()]
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(modules)], **QUIET)
    trainer.fit(ToyModule())
    own = trainer.client_data(1)
    assert own.datamodule is modules[1]
    assert own.train is own.val is None


def test_without_a_fit_a_client_or_clients_here_it_says_so() -> None:
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, **QUIET)
    with pytest.raises(ConfigurationError, match=r"client_data\(0\): there has been no fit"):
        trainer.client_data(0)
    trainer.fit(ToyModule(), DataLoader(toy_data(20), batch_size=5))
    for wrong in (2, -1, "0", True):
        with pytest.raises(ConfigurationError, match=f"no client {wrong!r}: there are clients 0 to 1"):
            trainer.client_data(wrong)


def test_the_data_of_sites_is_theirs() -> None:
    def trainer() -> FederatedTrainer:
        return FederatedTrainer(max_rounds=1, callbacks=[ClientData(split, num_clients=2)], **QUIET)

    nodes = {10 + i: {"partition-id": i, "num-partitions": 2} for i in range(2)}
    grid, away = SuperLinkLike(trainer().client_app(ToyModule()), nodes), trainer()
    in_flower(lambda: away.server_app(ToyModule())(grid, Context(1, 0, {}, RecordDict(), {})))
    with pytest.raises(ConfigurationError, match=r"not on this machine\. A site's data never leaves it"):
        away.client_data(0)
