"""A value of the wrong kind is named with its place and the way out, all of them at once, before anything runs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
from flwr.client import NumPyClient
from flwr.server.strategy import FedAvg as OldFedAvg
from flwr.serverapp.strategy import Krum
from flwr_datasets.partitioner import IidPartitioner
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    FaultTolerance,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    FlowerStrategy,
    PartialParticipation,
    Partition,
    TQDMRoundBar,
)
from lightning_fed.engines import InProcess
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET


class Client(NumPyClient):
    pass


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(toy_data(16), batch_size=4)

    def val_dataloader(self) -> Any:
        return DataLoader(toy_data(8), batch_size=4)


class OtherModule(pytorch_lightning.LightningModule):
    pass


class OtherData(pytorch_lightning.LightningDataModule):
    pass


OTHER = r"is of pytorch_lightning.*import it from lightning.pytorch.*sys.modules\[\"pytorch_lightning\"\]"


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ({"num_clients": "3"}, [r"num_clients='3' must be a whole number"]),
        ({"max_rounds": 2.0}, [r"max_rounds=2.0 must be a whole number"]),
        ({"local_epochs": True}, [r"local_epochs=True must be a whole number"]),
        ({"local_steps": "5"}, [r"local_steps='5' must be a whole number"]),
        ({"engine": "processes", "num_workers": "2"}, [r"num_workers='2' must be a whole number"]),
        ({"seed": "42"}, [r"seed='42' must be a whole number"]),
        ({"seed": 4.2}, [r"seed=4.2 must be a whole number"]),
        ({"timeout": "60"}, [r"timeout='60' must be a number of seconds above 0"]),
        ({"timeout": 0}, [r"timeout=0 must be"]),
        ({"timeout": float("nan")}, [r"timeout=nan must be"]),
        ({"compile_clients": "no"}, [r"compile_clients='no': write True or False"]),
        ({"local_validation": 1}, [r"local_validation=1: write True or False"]),
        ({"val_check_interval": 0.5}, [r"check_val_every_n_epoch=n for every n-th round"]),
        ({"val_check_interval": 3}, [r"check_val_every_n_epoch=3 for every n-th round"]),
        (
            {"accumulate_grad_batches": {0: 1, 4: 2}},
            [r"client_callbacks=\[GradientAccumulationScheduler\(\{0: 1, 4: 2\}"],
        ),
        ({"accumulate_grad_batches": 0}, [r"accumulate_grad_batches=0: write a whole number, at least 1"]),
        ({"accumulate_grad_batches": "2"}, [r"accumulate_grad_batches='2': write a whole number"]),
        ({"engine": InProcess}, [r"engine=InProcess is a class: write InProcess\(\)"]),
        ({"engine": None}, [r"engine=None is unknown: write one of"]),
        ({"callbacks": [FedAvg]}, [r"callbacks=\[FedAvg\]: is a class and not an instance: write FedAvg\(...\)"]),
        ({"callbacks": FedAvg}, [r"write FedAvg\(...\)"]),
        (
            {"callbacks": [Krum()]},
            [r"callbacks=\[Krum\(...\)\]: is a Flower strategy: write FlowerStrategy\(Krum\(...\)\)"],
        ),
        ({"callbacks": [Krum]}, [r"callbacks=\[Krum\]: is a Flower strategy: write FlowerStrategy\(Krum"]),
        ({"callbacks": [OldFedAvg()]}, ["NumPyClient's time.*flwr.serverapp.strategy"]),
        ({"callbacks": [Client()]}, [r"callbacks=\[Client\(...\)\]: is a Flower client.*ClientData"]),
        ({"callbacks": [IidPartitioner(3)]}, [r"is a partitioner: write Partition\(IidPartitioner\(...\)\)"]),
        ({"callbacks": [CSVLogger(".")]}, [r"is a logger: write logger=\[CSVLogger"]),
        ({"callbacks": [Data()]}, [r"is a datamodule: write fit\(datamodule=...\)"]),
        ({"callbacks": ["FedAvg"]}, [r"callbacks=\['FedAvg'\]: is a str and no Lightning callback"]),
        ({"callbacks": [None]}, [r"callbacks=\[None\]: is a NoneType and no Lightning callback"]),
        ({"callbacks": [pytorch_lightning.callbacks.EarlyStopping("x")]}, [rf"EarlyStopping\(...\)\]: {OTHER}"]),
        ({"client_callbacks": [pytorch_lightning.callbacks.Timer()]}, [rf"client_callbacks=\[Timer\(...\)\]: {OTHER}"]),
        (
            {"client_callbacks": [ModelCheckpoint()]},
            [r"client_callbacks=\[ModelCheckpoint\(...\)\]: it saves.*callbacks="],
        ),
        (
            {"client_callbacks": [RichProgressBar()]},
            [r"client_callbacks=\[RichProgressBar\(...\)\]: it shows progress"],
        ),
        ({"client_callbacks": [ModelCheckpoint]}, [r"client_callbacks=\[ModelCheckpoint\]: is a class"]),
        (
            {"strategy": Krum()},
            [r"strategy=Krum\(...\) is a Flower strategy.*callbacks=\[FlowerStrategy\(Krum\(...\)\)\]"],
        ),
        ({"min_steps": 10}, [r"min_steps=10 is not for a FederatedTrainer.*min_epochs=10"]),
    ],
)
def test_arguments_of_the_wrong_kind_are_named_with_the_way_out(arguments: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        FederatedTrainer(**{"max_rounds": 1, "num_clients": 2, **QUIET, **arguments})
    for text in texts:
        with pytest.raises(ConfigurationError, match=text):
            raise caught.value
    assert str(caught.value).count("\n  - ") == 1


def test_all_faults_are_said_at_once():
    with pytest.raises(ConfigurationError) as caught:
        FederatedTrainer(
            max_rounds="10",
            num_clients="3",
            local_epochs=0,
            seed="a",
            timeout=-1,
            engine="warp",
            client_state="keep",
            callbacks=[FedAvg, Krum()],
            client_callbacks=[ModelCheckpoint(), FedAvg()],
            **QUIET,
        )
    assert str(caught.value).count("\n  - ") == 11


def test_numbers_of_numpy_are_numbers():
    trainer = FederatedTrainer(max_rounds=np.int64(1), num_clients=np.int32(2), seed=np.int64(7), timeout=3600, **QUIET)
    trainer.fit(ToyModule(), DataLoader(toy_data(16), batch_size=4))
    assert trainer.global_step == 1


@pytest.mark.parametrize("steps", [None, 0])
def test_min_steps_that_ask_for_nothing_are_not_refused(steps):
    assert FederatedTrainer(max_rounds=1, num_clients=2, min_steps=steps, min_epochs=1, **QUIET).min_epochs == 1


def test_a_tuple_of_callbacks_is_a_list():
    assert FederatedTrainer(max_rounds=1, callbacks=(Partition(2),), **QUIET).owners.partition.num_clients == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((ToyModule,), r"fit\(model=ToyModule\): is a class and not an instance: write ToyModule\(...\)"),
        ((torch.nn.Linear(1, 1),), r"fit\(model=Linear\(...\)\): is a torch module without training_step"),
        ((OtherModule(),), rf"fit\(model=OtherModule\(...\)\): {OTHER}"),
        ((Client(),), r"fit\(model=Client\(...\)\): is a Flower client"),
        (("toy",), r"fit\(model='toy'\): is no LightningModule"),
        ((ToyModule(), Data), r"fit\(train_dataloaders=Data\): is a class and not an instance: write Data\(...\)"),
        ((ToyModule(), OtherData()), rf"fit\(train_dataloaders=OtherData\(...\)\): {OTHER}"),
        ((ToyModule(), None, None, OtherData()), rf"fit\(datamodule=OtherData\(...\)\): {OTHER}"),
        (
            (ToyModule(), DataLoader(toy_data(30)), None, Data()),
            r"fit\(train_dataloaders=DataLoader\(...\), datamodule=Data",
        ),
        ((ToyModule(), Data(), None, Data()), r"fit\(train_dataloaders=Data\(...\), datamodule=Data\(...\)\): which"),
        ((ToyModule(), None, None, [1]), r"fit\(datamodule=list\(...\)\): is no LightningDataModule"),
    ],
)
def test_what_fit_is_given_is_named_before_anything_runs(arguments, text):
    with pytest.raises(ConfigurationError, match=text):
        FederatedTrainer(max_rounds=1, num_clients=2, **QUIET).fit(*arguments)


class Stream(IterableDataset[Any]):
    """Gives batches, as WebDataset's loaders do."""

    def __iter__(self) -> Any:
        yield from DataLoader(toy_data(8), batch_size=4)


def table() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"x": [1, 2]})


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (toy_data(8), "is a TensorDataset, which would be trained on example by example: write DataLoader"),
        (table(), "is a Dataset, which would be trained on example by example: write DataLoader"),
        (torch.zeros(3, 8), "is a Tensor, which would be trained on example by example"),
        ((DataLoader(toy_data(8)), toy_data(8)), "is a TensorDataset, which would be"),
        (Data, r"is a class and not an instance: write Data\(...\)"),
        (OtherData(), OTHER),
        (Client(), "is a Flower client"),
        (3, "is 3: write a train loader, a pair of a train and a val loader, or a LightningDataModule"),
        (None, "is None: write a train loader"),
        ("data/", "is 'data/': write a train loader"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_loader_is_refused_by_client_data(entry, text):
    good = DataLoader(toy_data(8), batch_size=4)
    with pytest.raises(ConfigurationError, match=rf"ClientData:\n  - clients\[1\] {text}"):
        ClientData([good, entry])
    data = ClientData(lambda client: [good, entry][client], num_clients=2)
    trainer = FederatedTrainer(max_rounds=1, callbacks=[data], **QUIET)
    with pytest.raises(ClientError, match=rf"Round 1, train: client 1 is given data by ClientData that {text}"):
        trainer.fit(ToyModule())


def test_all_entries_that_are_no_loaders_are_named_at_once():
    with pytest.raises(ConfigurationError, match=r"(?s)clients\[0\] is 1: .*clients\[2\] is a TensorDataset"):
        ClientData([1, DataLoader(toy_data(8)), toy_data(8)])


@pytest.mark.parametrize("good", [Stream(), DataLoader(toy_data(8), 4), Data()])
def test_what_gives_batches_is_a_loader(good):
    FederatedTrainer(max_rounds=1, callbacks=[ClientData([good])], **QUIET).fit(ToyModule())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Partition("iid"), r"Partition\('iid'\): write a number of clients, or a partitioner"),
        (lambda: Partition("3"), r"Partition\('3'\): write a number"),
        (lambda: Partition(True), r"Partition\(True\): write a number"),
        (
            lambda: Partition(IidPartitioner),
            r"Partition\(IidPartitioner\): write .*IidPartitioner\(num_partitions=10\)",
        ),
        (lambda: Partition(2, val_fraction="0.2"), r"Partition\(val_fraction='0.2'\) must be in \[0, 1\)"),
        (lambda: ClientData(3), r"ClientData\(3\): write a list with one entry a client, or a function"),
        (lambda: ClientData(lambda k: k, num_clients="3"), r"ClientData: num_clients='3' must be a whole number"),
        (lambda: FaultTolerance("all"), r"FaultTolerance\(min_results='all'\): write a number of clients"),
        (lambda: PartialParticipation("0.5"), r"fraction_train='0.5' must be in \(0, 1\]"),
        (lambda: PartialParticipation(min_train_clients="2"), "min_train_clients='2' must be at least 1"),
        (lambda: FlowerStrategy(Client()), r"FlowerStrategy\(Client\(...\)\) wants an instance.*is a Flower client"),
        (lambda: FlowerStrategy(Krum), r"FlowerStrategy\(Krum\) wants an instance of flwr.serverapp.strategy.Strategy"),
        (lambda: FlowerStrategy(OldFedAvg()), "NumPyClient's time"),
        (lambda: FlowerStrategy(FedAvg()), r"FlowerStrategy\(FedAvg\(...\)\) wants an instance"),
        (lambda: FlowerStrategy(Krum(), mods=print), r"mods=.*write a list of client mods"),
        (
            lambda: FlowerStrategy(Krum(), mods=["clip"]),
            r"FlowerStrategy\(mods=\['clip'\]\): write a list of client mods",
        ),
    ],
)
def test_arguments_of_callbacks_are_looked_at_where_they_are_given(make, text):
    with pytest.raises(ConfigurationError, match=text):
        make()


def test_the_bar_is_known_by_what_it_is():
    bar = TQDMRoundBar()
    options = {**QUIET, "enable_progress_bar": True}
    assert FederatedTrainer(max_rounds=1, num_clients=2, callbacks=bar, **options).progress_bar_callback is bar


ALIAS = """
import sys
import lightning.pytorch
sys.modules["pytorch_lightning"] = lightning.pytorch

import pytorch_lightning as pl
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.callbacks.model_checkpoint import ModelCheckpoint
import torch
from torch.utils.data import DataLoader
from lightning_fed import FederatedTrainer
from lightning_fed.testing import toy_data


class Theirs(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_callbacks(self):
        return [EarlyStopping("train_loss"), ModelCheckpoint("checkpoints")]


trainer = FederatedTrainer(max_rounds=1, num_clients=2, logger=False)
trainer.fit(Theirs(), DataLoader(toy_data(48), batch_size=8))
print("trained", trainer.global_step)
"""


@pytest.mark.landing
def test_the_way_out_for_somebody_elses_pytorch_lightning_module_works(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(ALIAS))
    command = [sys.executable, "-W", "ignore", "script.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "trained 1" in run.stdout, run.stderr


class Named(FedAdam):
    """Has a signature of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


NUMBER = "must be a finite number"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FedProx("1"), rf"^FedProx: mu='1' {NUMBER} >= 0: write mu=1\.0\.$"),
        (lambda: FedProx(None), rf"^FedProx: mu=None {NUMBER} >= 0\.$"),
        (lambda: FedProx(True), rf"^FedProx: mu=True {NUMBER} >= 0\.$"),
        (lambda: FedProx(float("inf")), rf"^FedProx: mu=inf {NUMBER} >= 0\.$"),
        (lambda: FedProx([0.1]), rf"^FedProx: mu=\[0\.1\] {NUMBER} >= 0\.$"),
        (
            lambda: FedAdam(learning_rate="1e-2"),
            rf"^FedAdam: learning_rate='1e-2' {NUMBER} > 0: write learning_rate=0\.01",
        ),
        (
            lambda: FedAdam(beta_2=None),
            rf"^FedAdam: beta_2=None {NUMBER} in \[0, 1\): leave it out for the default, 0\.99",
        ),
        (lambda: FedYogi(tau="small"), rf"^FedYogi: tau='small' {NUMBER} > 0: leave it out for the default, 0\.001\.$"),
        (lambda: FedAdagrad(float("nan")), rf"^FedAdagrad: learning_rate=nan {NUMBER} > 0"),
        (lambda: FedAdam(learning_rate=[0.1, 0]), r"^FedAdam: learning_rate=\[0\.1, 0\] must be > 0\.$"),
        (lambda: FedYogi(learning_rate=[]), r"^FedYogi: learning_rate=\[\] has no round: write a number for each"),
        (lambda: FedAvgM(momentum=False), rf"^FedAvgM: momentum=False {NUMBER} in \[0, 1\)"),
        (lambda: FedAvgM(learning_rate=FedAvgM), rf"^FedAvgM: learning_rate=<class .*> {NUMBER} > 0"),
    ],
)
def test_a_methods_number_of_the_wrong_kind_is_named_with_its_rule_and_the_way_out(make, text):
    with pytest.raises(ConfigurationError, match=text):
        make()


@pytest.mark.parametrize("number", [1, 0.5, np.float32(0.5), np.int64(1)])
def test_numbers_of_every_kind_are_taken(number):
    assert FedProx(number).mu == number
    assert FedAdam(learning_rate=number).learning_rate == number
