"""Data that is already apart: every client brings a datamodule, a loader, or a pair of loaders."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, History, Partition
from lightning_fed.errors import ConfigurationError
from lightning_fed.testing import ToyModule, toy_data


def loader(examples: int, seed: int = 0) -> DataLoader:
    return DataLoader(toy_data(examples, seed), batch_size=8)


CALLS: list[tuple[int, str]] = []  # what a client notes in its datamodule is restored


class Site(LightningDataModule):
    """A site's own data, with its own validation part."""

    def __init__(self, client: int) -> None:
        super().__init__()
        self.client = client

    def setup(self, stage: str) -> None:
        CALLS.append((self.client, stage))
        self.data = toy_data(10 * (self.client + 1), seed=self.client)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=8)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*self.data[:4]), batch_size=4)


def test_list_gives_each_client_its_entry():
    loaders = [loader(10), loader(30)]
    data = ClientData(loaders)
    assert data.num_clients == 2
    own = data.client(1, round=3)
    assert torch.equal(own.train.dataset.tensors[0], loaders[1].dataset.tensors[0])
    assert (own.val, own.datamodule) == (None, None)


def test_function_is_asked_for_the_client():
    asked = []

    def build(client):
        asked.append(client)
        return loader(10 + client)

    data = ClientData(build, num_clients=5)
    assert data.num_clients == 5
    assert not asked  # nobody is built before it is needed
    assert len(data.client(3, round=1).train.dataset) == 13
    assert asked == [3]


def test_pair_is_a_train_and_a_validation_loader():
    pair = (loader(10), loader(4))
    own = ClientData([pair]).client(0, round=1)
    assert [len(own.train.dataset), len(own.val.dataset)] == [10, 4]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClientData(loader), r"ClientData\(fn\) does not tell how many clients there are: add num_clients="),
        (lambda: ClientData([]), "ClientData got 0 clients: give one entry for each client, at least one"),
        (lambda: ClientData(loader, num_clients=0), "ClientData got 0 clients"),
        (lambda: ClientData([[1], [2]], num_clients=3), "ClientData got 2 clients and num_clients=3"),
    ],
)
def test_number_of_clients_must_be_known_and_agree(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_fit_needs_no_loaders_and_weighs_clients_by_their_own_examples(quiet):
    history = History(per_client=True)
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData([loader(8), loader(40)]), history], **quiet)
    trainer.fit(ToyModule())
    assert [(row["client"], row["num_examples"]) for row in history.clients] == [(0, 8), (1, 40)]


def test_each_sites_datamodule_is_set_up_trained_on_and_evaluated_on(quiet):
    CALLS.clear()
    sites = [Site(0), Site(1)]
    history = History(per_client=True)
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(sites), history], **quiet)
    trainer.fit(ToyModule())
    rows = [(row["stage"], row["client"], row["num_examples"]) for row in history.clients]
    assert rows == [("train", 0, 10), ("train", 1, 20), ("evaluate", 0, 4), ("evaluate", 1, 4)]
    assert {(0, "fit"), (1, "fit")} <= set(CALLS)
    assert {"clients/val_loss", "clients/val_acc", "train_loss"} <= set(history.names)


def test_clients_without_validation_data_do_not_evaluate(quiet):
    history = History(per_client=True)
    data = ClientData([(loader(8), loader(4)), loader(8)])
    FederatedTrainer(max_rounds=1, callbacks=[data, history], **quiet).fit(ToyModule())
    assert [row["client"] for row in history.clients if row["stage"] == "evaluate"] == [0]


def test_stream_is_weighted_by_the_examples_it_gave(quiet):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(toy_data(21))

    history = History(per_client=True)
    data = ClientData([DataLoader(Stream(), batch_size=8), loader(8)])
    trainer = FederatedTrainer(max_rounds=2, local_epochs=2, callbacks=[data, history], **quiet)
    trainer.fit(ToyModule())
    assert [row["num_examples"] for row in history.clients] == [21, 8, 21, 8]


def test_second_owner_of_the_partition_is_refused_by_name():
    with pytest.raises(ConfigurationError, match="ClientData and Partition both decide the partition"):
        FederatedTrainer(max_rounds=1, callbacks=[ClientData([loader(8)]), Partition(2)])


def test_clients_learn_from_their_own_data(quiet):
    # Client 1's labels are the opposite of client 0's: trained alone, each learns its own.
    data = toy_data(64)
    x, y = data.tensors
    own = []
    for labels in (y, 1 - y):
        module = ToyModule(hidden=16, lr=1.0)
        train = DataLoader(TensorDataset(x, labels), batch_size=16)
        FederatedTrainer(max_rounds=10, local_epochs=5, callbacks=[ClientData([train])], **quiet).fit(module)
        own.append(float((module(x).argmax(-1) == labels).float().mean()))
    assert min(own) > 0.8
    assert torch.isfinite(module(x)).all()
