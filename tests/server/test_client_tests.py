"""Each client's own model on its own data: what comes out beside plain code, and what is as before afterwards."""

from __future__ import annotations

import copy
import csv
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score
from torchmetrics.functional.classification import multiclass_f1_score

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import ClientData, Ditto, FedBN, FedPer, History, Partition, Personal
from lightning_fed.server.client_results import ClientResults
from tests.callbacks.rounds import COHORTS, EPOCHS, ROUNDS, SIZES, Chosen, loaders, loss, momentum
from tests.helpers import QUIET, SuperLinkLike
from tests.integration.test_algorithms import Classifier, network

TESTS = (5, 3, 17, 8)  # examples that each client is tested on


class Tested(Classifier):
    """Logs a metric by state, a mean, and a number of the whole epoch; validates as it tests."""

    __test__ = False

    def __init__(self, net: nn.Module, optimizer: Any = momentum) -> None:
        super().__init__(net, optimizer)
        self.test_f1 = MulticlassF1Score(3, average="macro")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.test_f1(self.net(batch[0]), batch[1])
        self.log("test_f1", self.test_f1)
        self.log("test_loss", loss(self.net, batch))

    def on_test_epoch_end(self) -> None:
        self.log("test_client", float(self.trainer.client_id))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss(self.net, batch))


def test_loaders() -> list[DataLoader[Any]]:
    """Each client's test data: other examples than it trains on."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for client, size in enumerate(TESTS):
        x = torch.randn(size, 6, generator=generator).double() + client
        y = (torch.randint(0, 3, (size,), generator=generator) + client) % 3
        made.append(DataLoader(TensorDataset(x, y), batch_size=4))
    return made


test_loaders.__test__ = False  # type: ignore[attr-defined]


class OwnData(L.LightningDataModule):
    """A client's own."""

    def __init__(self, client: int) -> None:
        super().__init__()
        self.client = client

    def setup(self, stage: str) -> None:
        self.stages = [*getattr(self, "stages", []), stage]

    def train_dataloader(self) -> Any:
        return loaders()[self.client]

    def test_dataloader(self) -> Any:
        assert self.stages[-1] == "test"
        return test_loaders()[self.client]


# How clients come to their test data: what ClientData is given, and whether it is that of ``test_loaders``.
DATA: dict[str, Any] = {
    "pairs": lambda: ClientData(list(zip(loaders(), test_loaders(), strict=True))),
    "datamodules": lambda: ClientData([OwnData(client) for client in range(len(SIZES))]),
    "datamodules of a function": lambda: ClientData(OwnData, num_clients=len(SIZES)),
}
METHODS: dict[str, Any] = {
    "none": lambda: [],
    "Personal": lambda: [Personal("*.bias", modules=nn.BatchNorm1d)],
    "FedBN": lambda: [FedBN()],
    "FedPer": lambda: [FedPer("net.3")],
    "Ditto": lambda: [Ditto(lam=0.5)],
}


def fit(*callbacks: Any, data: Any = DATA["pairs"], kind: Any = Tested, **how: Any) -> tuple[FederatedTrainer, Any]:
    module, ckpt_path = kind(network(torch.float64, batch_norm=True)), how.pop("ckpt_path", None)
    how = {"max_rounds": ROUNDS, "local_epochs": EPOCHS, **QUIET, **how}
    trainer = FederatedTrainer(callbacks=[data(), Chosen(), *callbacks], **how)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module


def by_hand(trainer: FederatedTrainer, data: Any = test_loaders) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """What each client's module gives on its data, and what all of them give on all data pooled."""
    rows, logits, labels = [], [], []
    for client, loader in enumerate(data()):
        net = trainer.personal_module(client).net.eval()
        x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        with torch.no_grad():
            own = net(x)
        rows.append({"client": client, "num_examples": len(y), **_measured(own, y), "test_client": float(client)})
        logits, labels = [*logits, own], [*labels, y]
    weighted = sum(row["num_examples"] * row["client"] for row in rows) / sum(row["num_examples"] for row in rows)
    return rows, {**_measured(torch.cat(logits), torch.cat(labels)), "test_client": weighted}


def _measured(logits: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    f1 = multiclass_f1_score(logits, y, num_classes=3, average="macro")
    return {"test_f1": float(f1), "test_loss": float(nn.functional.cross_entropy(logits, y))}


def assert_is(results: ClientResults, expected: tuple[list[dict[str, Any]], dict[str, float]]) -> None:
    rows, merged = expected
    assert len(results.rows) == len(rows)
    for ours, theirs in zip(results.rows, rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert results.merged == pytest.approx(merged, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*cannot be merged:UserWarning")
@pytest.mark.parametrize(
    ("method", "data", "how"),
    [
        *((method, "pairs", {}) for method in METHODS),
        *(("FedPer", data, {}) for data in DATA if data != "pairs"),
        *((method, "pairs", {"engine": "processes", "num_workers": 2}) for method in ("none", "FedBN")),
        ("FedBN", "datamodules", {"engine": "processes", "num_workers": 2}),
        ("Ditto", "pairs", {"client_storage": "folder"}),
        ("FedPer", "datamodules", {"client_storage": "folder"}),
        ("FedPer", "pairs", {"vectorize_clients": True}),
    ],
)
def test_each_client_and_all_pooled_are_as_by_hand(method: str, data: str, how: Any, tmp_path: Path) -> None:
    how = {**how, **({"client_storage": tmp_path} if "client_storage" in how else {})}
    trainer, _ = fit(*METHODS[method](), data=DATA[data], **how)
    assert_is(trainer.test_clients(), by_hand(trainer))


@pytest.mark.filterwarnings("ignore:.*cannot be merged:UserWarning")
def test_clients_with_models_of_their_own_give_what_one_model_for_all_does_not() -> None:
    shared, own = fit()[0].test_clients(), fit(FedPer("net.3"))[0].test_clients()
    assert shared["test_loss"] != own["test_loss"]


@pytest.mark.filterwarnings("ignore:.*cannot be merged:UserWarning")
@pytest.mark.parametrize("storage", ["memory", "folder"])
def test_a_finished_run_that_is_resumed_tests_the_same(storage: str, tmp_path: Path) -> None:
    how = {"enable_checkpointing": True} | ({} if storage == "memory" else {"client_storage": tmp_path / "kept"})
    first, _ = fit(FedBN(), ModelCheckpoint(tmp_path, save_last=True), **how)
    again, _ = fit(FedBN(), ModelCheckpoint(tmp_path, save_last=True), ckpt_path=str(tmp_path / "last.ckpt"), **how)
    assert again.global_step == ROUNDS
    expected, found = first.test_clients(), again.test_clients()
    assert found.rows == expected.rows
    assert found.merged == expected.merged


@pytest.mark.filterwarnings("ignore:.*cannot be merged:UserWarning")
@pytest.mark.parametrize("is_module", [False, True])
def test_the_held_out_part_is_that_of_the_rounds_evaluation(is_module: bool) -> None:
    """With a transform, a datamodule that changes batches, and a test step that is the validation step."""

    class Halved(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            generator = torch.Generator().manual_seed(3)
            x, y = torch.randn(60, 6, generator=generator).double(), torch.randint(0, 3, (60,), generator=generator)
            return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)

        def teardown(self, stage: str) -> None:
            self.train_dataloader = None  # type: ignore[assignment,method-assign]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] / 2, batch[1]

    class Same(Tested):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    def noisy(client: int) -> Any:
        return lambda example: (example[0] + client * torch.randn_like(example[0]), example[1])

    history, data = History(per_client=True), Halved()
    partition = Partition(3, val_fraction=0.3, transform=noisy)
    trainer = FederatedTrainer(
        max_rounds=2, callbacks=[partition, FedPer("net.2"), history], limit_val_batches=3, **{**QUIET}
    )
    given = {"datamodule": data} if is_module else {"train_dataloaders": data.train_dataloader()}
    trainer.fit(Same(network(torch.float64)), **given)
    results = trainer.test_clients()
    last = [row for row in history.clients if row["round"] == 2 and row["stage"] == "evaluate"]
    assert [(row["client"], row["num_examples"], row["val_loss"]) for row in last] == [
        (row["client"], row["num_examples"], row["val_loss"]) for row in results.rows
    ]
    assert results.merged["val_loss"] == history.rows[-1]["clients/val_loss"]


class Changing(Tested):
    """Draws, counts what it saw, trains on, and holds a function of a layer of its own."""

    def __init__(self, net: nn.Module, optimizer: Any = momentum) -> None:
        super().__init__(net, optimizer)
        self.seen, self.last = [], None
        self.read = lambda x: self.net(x)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def setup(self, stage: str) -> None:
        if stage == "test":
            self.offset = torch.rand(())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.trainer.client_id)
        self.count += 1
        with torch.no_grad():
            self.net[0].weight += 0.1 * torch.rand(())
        self.log("read", self.read(batch[0]).sum() + self.count + len(self.seen))
        self.log("drawn", torch.rand(()) + random.random() + np.random.rand() + self.offset)
        self.extra = nn.Linear(1, 1)

    def on_test_epoch_end(self) -> None:
        self.net.train()


@pytest.mark.filterwarnings("ignore:.*grew in a client's fit:UserWarning")
def test_a_client_depends_on_no_other_and_the_module_is_as_before() -> None:
    trainer, module = fit(FedPer("net.3"), kind=Changing)
    module.net[1].weight.grad = torch.ones_like(module.net[1].weight)
    before, kept = copy.deepcopy(module.state_dict()), {**vars(module)}
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    everybody = trainer.test_clients()
    alone = [trainer.test_clients(client).rows[0] for client in (3, 1, 0, 2)]
    assert sorted(alone, key=lambda row: row["client"]) == everybody.rows
    assert [row["client"] for row in trainer.test_clients([2, 0, 2]).rows] == [0, 2]
    assert len(set(everybody["drawn"])) == len(SIZES)
    assert vars(module).keys() == kept.keys()
    assert module.training
    assert module.seen == []
    assert module.count == 0
    assert type(module) is Changing
    assert module._trainer is kept["_trainer"]
    assert not hasattr(module, "extra")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(module.net[1].weight.grad, torch.ones(7, dtype=torch.float64))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()


@pytest.mark.filterwarnings("ignore:.*cannot be merged:UserWarning")
def test_other_data_and_limits() -> None:
    trainer, _ = fit(FedBN())
    shuffled = [test_loaders()[client] for client in (3, 2, 1, 0)]
    assert_is(trainer.test_clients(dataloaders=shuffled), by_hand(trainer, lambda: shuffled))
    assert_is(trainer.test_clients(dataloaders=shuffled.__getitem__), by_hand(trainer, lambda: shuffled))
    found = trainer.test_clients(dataloaders=lambda client: OwnData(3 - client))
    assert found.rows == trainer.test_clients(dataloaders=shuffled).rows
    with pytest.warns(UserWarning, match=r"test_clients\(\) leaves clients 0, 2 out, which have no data to test on"):
        some = trainer.test_clients(dataloaders=lambda client: shuffled[client] if client % 2 else None)
    assert some.left_out == [0, 2]
    assert [row["num_examples"] for row in some.rows] == [17, 5]
    trainer.limit_test_batches = 1
    assert [row["num_examples"] for row in trainer.test_clients().rows] == [4, 3, 4, 4]
    twice = trainer.test_clients(1, dataloaders=lambda client: [shuffled[0], shuffled[1]])
    assert twice.rows[0]["num_examples"] == 8
    assert "test_f1/dataloader_idx_1" in twice.names


class Remembers(L.Callback):
    """On clients: counts the fits of its client, and logs their number in a test."""

    fits = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.fits += 1

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("fits", float(self.fits))

    def state_dict(self) -> dict[str, Any]:
        return {"fits": self.fits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fits = state_dict["fits"]


@pytest.mark.filterwarnings("ignore:.*cannot be merged:UserWarning")
@pytest.mark.parametrize("engine", ["in_process", "processes"])
def test_client_callbacks_hear_of_it_with_what_they_remember(engine: str) -> None:
    trainer, _ = fit(client_callbacks=[Remembers()], engine=engine)
    assert trainer.test_clients()["fits"] == [sum(client in cohort for cohort in COHORTS) for client in range(4)]


class Untested(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"test_clients\(\): there has been no fit"):
        FederatedTrainer(max_rounds=1, num_clients=2, **QUIET).test_clients()
    with pytest.raises(ConfigurationError, match="Classifier has no test_step: write one"):
        fit(kind=Classifier, max_rounds=1)[0].test_clients()
    with pytest.raises(ConfigurationError, match=r"no test_step, but a validation_step. .* Untested.test_step call it"):
        fit(kind=Untested, max_rounds=1)[0].test_clients()
    trainer, _ = fit(data=lambda: ClientData(loaders()), max_rounds=1)
    with pytest.raises(
        ConfigurationError, match=r"clients 0, 1, 2, 3 have no data to test on. Write Partition\(..., v"
    ):
        trainer.test_clients()
    with pytest.raises(ConfigurationError, match=r"client 3 has no data to test on. dataloaders= gives none"):
        trainer.test_clients(3, [None] * 4)
    with pytest.raises(ConfigurationError, match=r"test_clients\(\): there is no client 4, there are clients 0 to 3"):
        trainer.test_clients([0, 4])
    with pytest.raises(ConfigurationError, match=r"clients='all'\): write numbers of clients"):
        trainer.test_clients("all")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="name at least one client"):
        trainer.test_clients([])
    with pytest.raises(ConfigurationError, match=r"has 2 entries for 4 clients"):
        trainer.test_clients(dataloaders=test_loaders()[:2])
    with pytest.raises(ConfigurationError, match=r"write a list with one entry a client, or a function"):
        trainer.test_clients(dataloaders=test_loaders()[0])  # type: ignore[arg-type]
    with pytest.raises(
        ConfigurationError, match=r"client 0 is given is a TensorDataset, which would be tested example"
    ):
        trainer.test_clients(dataloaders=lambda client: test_loaders()[client].dataset)


def test_what_the_users_code_raises_is_raised_with_the_client() -> None:
    class Raises(Tested):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            next(iter([])) if self.trainer.client_id == 2 else None

    trainer, module = fit(kind=Raises, max_rounds=1)
    with pytest.raises(RuntimeError, match="StopIteration") as raised:
        trainer.test_clients()
    assert "This was client 2 in test_clients()." in raised.value.__notes__
    assert type(module) is Raises


def test_clients_that_are_elsewhere_are_refused() -> None:
    trainer = FederatedTrainer(max_rounds=1, callbacks=[DATA["pairs"]()], **QUIET)
    module = Tested(network(torch.float64))
    client_app = FederatedTrainer(max_rounds=1, callbacks=[DATA["pairs"]()], **QUIET).client_app(
        Tested(network(torch.float64))
    )
    from flwr.app import Context, RecordDict

    from tests.helpers import in_flower

    grid = SuperLinkLike(client_app, {10 + i: {"partition-id": i, "num-partitions": 4} for i in range(4)})
    in_flower(lambda: trainer.server_app(module)(grid, Context(1, 0, {}, RecordDict(), {})))
    with pytest.raises(ConfigurationError, match=r"not on this machine. .*History\(per_client=True\)"):
        trainer.test_clients()


# ------------------------------------------------------------------------------------------------------------ results


def results(count: int) -> ClientResults:
    rows = [{"client": i, "num_examples": 1 + i, "acc": i / count, "loss_step": 1.0} for i in range(count)]
    rows[0]["acc"] = float("nan")
    return ClientResults(rows, {"acc": 0.5})


def test_spread_is_numpys_and_counts_each_client_once() -> None:
    spread = results(30).spread("acc")
    values = [i / 30 for i in range(1, 30)]
    assert (spread.minimum, spread.maximum) == (values[0], values[-1])
    assert spread.deciles == pytest.approx([np.quantile(values, i / 10) for i in range(1, 10)])
    with pytest.raises(KeyError, match=r"No client has 'f1'; there are \['acc', 'loss_step'\]"):
        results(3).spread("f1")
    assert np.isnan(results(1).spread("acc").minimum)
    assert "acc" in str(results(1))


def test_many_clients_have_no_line_each() -> None:
    text = str(results(10_000))
    assert len(text.splitlines()) < 10
    assert text.startswith("10,000 clients, 50,005,000 test examples")
    assert len(str(results(5)).splitlines()) == 12


def test_a_table_and_a_picture_are_written(tmp_path: Path) -> None:
    found = results(7)
    found.to_csv(tmp_path / "clients.csv")
    with (tmp_path / "clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["client"] for row in rows] == list("0123456")
    assert float(rows[3]["acc"]) == 3 / 7
    figure = found.plot(tmp_path / "clients.png")
    assert (tmp_path / "clients.png").stat().st_size > 1000
    (axes,) = figure.axes
    assert [one.get_ylabel() for one in found.plot(names="acc").axes] == [axes.get_ylabel()] == ["acc"]
    assert list(axes.lines[0].get_ydata()) == [i / 7 for i in range(1, 7)]
    assert list(axes.lines[1].get_ydata()) == pytest.approx(found.spread("acc").deciles)
