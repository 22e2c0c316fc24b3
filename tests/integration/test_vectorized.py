"""Vectorized clients get the weights and metrics of clients trained one after the other."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
import torchvision
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    FaultTolerance,
    FedAdam,
    FederatedCallback,
    FedProx,
    FlowerStrategy,
    History,
    Partition,
)
from lightning_fed.client.vectorized import compiled_step, dispatch
from lightning_fed.errors import ClientError, ConfigurationError, FederationError
from tests.helpers import QUIET

SIZES = (24, 21, 16, 24, 37, 22, 24)  # batches of 8: three, three (the last smaller), two, three, five, three, three
TOLERANCES = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-4, "atol": 1e-6}}

momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Lit(L.LightningModule):
    """Classifies into 3 classes, logs in three ways."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., Any] = momentum) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"hits": (logits.argmax(-1) == y).float().sum()}, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("largest", logits.max(), on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(-1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class TwoGroups(Lit):
    """AdamW that does not decay what has one dimension, with a schedule."""

    interval = "step"

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 0.002}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.02, total_steps=int(self.trainer.estimated_stepping_batches) + 1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


class TwoGroupsByEpoch(TwoGroups):
    interval = "epoch"


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )


class Encoder(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.embed, self.encoder = nn.Linear(2, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.view(len(x), 3, 2))).mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight = self.one.weight
        self.two.bias.requires_grad_(False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Statistics(nn.Module):
    """Buffers of its own: one written in place, one put in place of the old, one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
            self.steps += 1
            self.mean = self.mean + 0.1 * (x.detach().mean(0) - self.mean) / self.steps
        return self.head(x - self.mean)


def data(dtype: torch.dtype = torch.float32, sizes: Any = SIZES, shape: tuple[int, ...] = (6,)) -> list[Any]:
    """Loaders of unequal clients, each with a held-out part."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for client, size in enumerate(sizes):
        x = torch.randn(size + 5, *shape, generator=generator).to(dtype) + 0.1 * client
        y = torch.randint(0, 3, (size + 5,), generator=generator)
        train, val = TensorDataset(x[:size], y[:size]), TensorDataset(x[size:], y[size:])
        made.append((DataLoader(train, batch_size=8, shuffle=True), DataLoader(val, batch_size=3)))
    return made


class Counter:
    """How many clients were vectorized, or evaluated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.train = self.evaluate = 0
        for stage in ("fit", "evaluate"):
            monkeypatch.setattr(
                dispatch, f"vectorized_{stage}", partial(self._count, stage, getattr(dispatch, f"vectorized_{stage}"))
            )

    def _count(self, stage: str, function: Any, works: Any, *args: Any) -> Any:
        name = "train" if stage == "fit" else stage
        setattr(self, name, getattr(self, name) + len(works))
        return function(works, *args)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def run(build: Callable[[], L.LightningModule], *callbacks: Any, **options: Any) -> tuple[dict[str, Tensor], Any, Any]:
    """Weights, history and each client's report after three rounds of two epochs."""
    torch.manual_seed(0)
    module, history = build(), History(per_client=True)
    dtype = options.pop("dtype", torch.float32)
    loaders = options.pop("loaders", None) or data(dtype)
    options = {"max_rounds": 3, "local_epochs": 2, **QUIET, **options}
    trainer = FederatedTrainer(callbacks=[ClientData(loaders), *callbacks, history], **options)
    trainer.fit(module.to(dtype))
    return {name: value.clone() for name, value in module.state_dict().items()}, history.rows, history.clients


def assert_close(one: Any, other: Any, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(one[0], other[0], **TOLERANCES[dtype])
    for mine, theirs in ((one[1], other[1]), (one[2], other[2])):
        assert len(mine) == len(theirs)
        for row, expected in zip(mine, theirs, strict=True):
            assert row.keys() == expected.keys()
            for name, value in expected.items():
                if isinstance(value, str):
                    assert row[name] == value
                elif name != "seconds":
                    assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


CASES: dict[str, Any] = {
    "MLP": lambda: Lit(mlp()),
    "CNN with BatchNorm": lambda: Lit(cnn()),
    "transformer": lambda: Lit(Encoder()),
    "AdamW, two groups, schedule by step": lambda: TwoGroups(mlp()),
    "AdamW, two groups, schedule by epoch": lambda: TwoGroupsByEpoch(mlp()),
    "tied, frozen and unused weights": lambda: Lit(Tied(), partial(momentum, weight_decay=0.1)),
    "buffers": lambda: Lit(Statistics()),
    "dropout": lambda: Lit(nn.Sequential(nn.Dropout(0.2), *mlp(), nn.Dropout(0.1))),
    **{
        name: lambda name=name: Lit(mlp(), partial(getattr(torch.optim, name), lr=0.01))
        for name in ("Adam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_clients_trained_as_one_get_what_each_gets_alone(name: str, counter: Counter) -> None:
    alone = run(CASES[name], dtype=torch.float64)
    assert counter.train == 0
    as_one = run(CASES[name], dtype=torch.float64, vectorize_clients="require")
    assert counter.train == 3 * 5  # the two whose numbers of batches nobody shares train alone
    assert counter.evaluate == 3 * 7
    assert_close(as_one, alone, torch.float64)


OPTIONS: dict[str, dict[str, Any]] = {
    "clipping by norm": {"gradient_clip_val": 0.2},
    "clipping by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "accumulation": {"accumulate_grad_batches": 2},
    "steps": {"local_epochs": None, "local_steps": 4},
    "few batches": {"limit_train_batches": 2},
    "global schedule": {"client_state": "global"},
    "three at once": {"vectorize_clients": 3},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "processes": {"engine": "processes", "num_workers": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_local_fits(name: str, counter: Counter) -> None:
    options = OPTIONS[name]
    plain = {key: value for key, value in options.items() if key not in ("vectorize_clients", "engine", "num_workers")}
    build = (lambda: TwoGroupsByEpoch(mlp())) if name == "global schedule" else CASES["MLP"]
    dtype = torch.float32 if name == "bf16-mixed" else torch.float64
    alone = run(build, dtype=dtype, **plain)
    as_one = run(build, dtype=dtype, **{"vectorize_clients": "require", **options})
    assert name == "processes" or counter.train > 0
    if name == "bf16-mixed":
        torch.testing.assert_close(as_one[0], alone[0], rtol=0.02, atol=0.002)
    else:
        assert_close(as_one, alone, dtype)


@pytest.mark.parametrize("name", ["MLP", "CNN with BatchNorm", "transformer", "AdamW, two groups, schedule by step"])
def test_in_single_precision(name: str) -> None:
    assert_close(run(CASES[name], vectorize_clients="require"), run(CASES[name]))


def resnet(dtype: torch.dtype, rounds: int, **options: Any) -> Any:
    loaders = data(dtype, sizes=(16, 13, 16), shape=(3, 32, 32))
    net = partial(torchvision.models.resnet18, num_classes=3)
    return run(
        lambda: Lit(net(), partial(momentum, lr=0.01)), dtype=dtype, loaders=loaders, max_rounds=rounds, **options
    )


def test_a_resnet(counter: Counter) -> None:
    as_one = resnet(torch.float64, 3, vectorize_clients="require")
    assert counter.train == 9
    assert_close(as_one, resnet(torch.float64, 3), torch.float64)


def test_a_resnet_in_single_precision_is_as_near_to_the_truth_as_one_trained_alone() -> None:
    """With few examples BatchNorm amplifies rounding far beyond 1e-4, whoever rounds."""
    truth = resnet(torch.float64, 1)[0]

    def error(**options: Any) -> float:
        found = resnet(torch.float32, 1, **options)[0]
        return float(sum((found[n].double() - truth[n]).square().sum() for n in truth if truth[n].is_floating_point()))

    assert error(vectorize_clients="require") < 2 * error()


@pytest.mark.parametrize(
    "method",
    [lambda: FedProx(mu=0.5), lambda: FedAdam(learning_rate=0.1), lambda: FlowerStrategy(_krum())],
    ids=["FedProx", "FedAdam", "Krum"],
)
def test_methods(method: Callable[[], Any], counter: Counter) -> None:
    alone = run(CASES["MLP"], method(), dtype=torch.float64)
    as_one = run(CASES["MLP"], method(), dtype=torch.float64, vectorize_clients="require")
    assert counter.train == 15
    assert_close(as_one, alone, torch.float64)


def _krum() -> Any:
    from flwr.serverapp.strategy import Krum

    return Krum(num_malicious_nodes=1)


@pytest.mark.parametrize("engine", [{}, {"engine": "processes", "num_workers": 2}], ids=["in process", "processes"])
@pytest.mark.parametrize("name", ["CNN with BatchNorm", "dropout"])
def test_the_same_run_twice_gives_the_same_bits(name: str, engine: dict[str, Any]) -> None:
    one, other = (run(CASES[name], vectorize_clients="require", **engine) for _ in range(2))
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert repr([{k: v for k, v in row.items() if k != "seconds"} for row in one[1]]) == repr(
        [{k: v for k, v in row.items() if k != "seconds"} for row in other[1]]
    )


@pytest.mark.parametrize("build", [CASES["dropout"], lambda: Lit(Encoder(dropout=0.2))], ids=["MLP", "transformer"])
def test_a_clients_dropout_does_not_depend_on_who_else_is_there(build: Callable[[], L.LightningModule]) -> None:
    many = run(build, dtype=torch.float64, vectorize_clients="require", max_rounds=1)
    loaders = data(torch.float64)
    few = run(
        build,
        dtype=torch.float64,
        vectorize_clients="require",
        max_rounds=1,
        loaders=[*loaders[:2], loaders[3]],
    )
    for client in (0, 1):
        mine, theirs = ([row for row in clients if row["client"] == client] for clients in (many[2], few[2]))
        assert mine[0]["train_loss"] == pytest.approx(theirs[0]["train_loss"], rel=1e-12)


class Augmented(Dataset[Any]):
    """Noise from all three generators in each example."""

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, 6, generator=torch.Generator().manual_seed(size)).double()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        import random

        import numpy as np

        noise = torch.randn(6).double() + random.random() + np.random.rand()
        return {"x": self.x[index] + 0.1 * noise, "y": torch.tensor(index % 3), "name": "same for all"}


class OfDicts(Lit):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return {"loss": super().training_step((batch["x"], batch["y"]), 0), "more": batch["name"]}


def test_examples_that_draw_and_batches_of_dicts(counter: Counter) -> None:
    loaders = [DataLoader(Augmented(size), batch_size=8, shuffle=True) for size in SIZES]
    options: dict[str, Any] = {"dtype": torch.float64, "loaders": loaders}
    as_one = run(lambda: OfDicts(mlp()), vectorize_clients="require", **options)
    assert counter.train == 15
    assert_close(as_one, run(lambda: OfDicts(mlp()), **options), torch.float64)


def test_a_partition_of_one_data_set(counter: Counter) -> None:
    def trained(**options: Any) -> Any:
        torch.manual_seed(0)
        module = Lit(mlp())
        generator = torch.Generator().manual_seed(1)
        whole = TensorDataset(
            torch.randn(120, 6, generator=generator), torch.randint(0, 3, (120,), generator=generator)
        )
        trainer = FederatedTrainer(max_rounds=2, callbacks=[Partition(5, val_fraction=0.2)], **QUIET, **options)
        trainer.fit(module, DataLoader(whole, batch_size=8, shuffle=True))
        return {name: value.clone() for name, value in module.state_dict().items()}

    as_one = trained(vectorize_clients="require")
    assert counter.train == 10
    torch.testing.assert_close(as_one, trained(), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ what does not qualify


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


class Branching(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if loss > 0.5:
            loss = 2 * loss
        return loss


class Measured(Lit):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        return nn.functional.cross_entropy(logits, batch[1])


class Item(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.last = loss.item()
        return loss


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(len(x), 3, 2))[0][:, -1])


class Hooked(Lit):
    def on_train_epoch_end(self) -> None:
        self.log("epoch", 1.0)


class Own(torch.optim.SGD):
    """An optimizer of the user's own."""


class ByNorm(Callback):
    """Scales by the norm of all gradients, which are those of all clients."""

    acts_elementwise = True  # which is not so

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        norm = torch.stack([p.grad.norm() for p in pl_module.parameters()]).norm()
        for p in pl_module.parameters():
            p.grad /= norm


class Noise(Callback):
    """Draws outside of the step."""

    acts_elementwise = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for p in pl_module.parameters():
            p.grad += 1e-6 * torch.randn_like(p)


class Clips(Callback):
    """Harmless in a trial whose gradients are small."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(pl_module.parameters(), 2.0)


class Counting(Lit):
    steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, batch_idx) * min(1.0, self.steps / 12)


class Mixup(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        share, order = np.random.beta(1, 1), torch.randperm(len(batch[0]))
        return super().training_step((share * batch[0] + (1 - share) * batch[0][order], batch[1]), batch_idx)


class Keeps(Lit):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.matrices = [p for p in self.parameters() if p.ndim > 1]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 1e-3 * sum(p.square().sum() for p in self.matrices)


class Anchored(Lit):
    def on_train_start(self) -> None:
        self.anchors = [p.detach().clone() for p in self.parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        pairs = zip(self.parameters(), self.anchors, strict=True)
        return super().training_step(batch, batch_idx) + 0.05 * sum((p - a).square().sum() for p, a in pairs)


class DeclaredAnchored(Anchored):
    acts_elementwise = True  # which is not so: the step sees all clients' anchors


class BySize(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + 1 / len(self.trainer.train_dataloader.dataset))


class Plateau(Lit):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}


class WhoAmI(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + self.trainer.client_id)


class Folded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, 6).mean(1)


REFUSED: dict[str, tuple[Callable[[], L.LightningModule], dict[str, Any], str]] = {
    "manual optimization": (Manual, {}, "Manual optimizes manually"),
    "control flow": (
        lambda: Branching(mlp()),
        {},
        r"depends on the data \(test_vectorized.py, line \d+: `if loss > 0.5:`\)",
    ),
    "metric object": (Measured, {}, r"test_vectorized.py, line \d+: `self.(accuracy|log)\("),
    "item": (lambda: Item(mlp()), {}, r"calls `.item\(\)` on a per-client value.*`self.last = loss.item\(\)`"),
    "LSTM": (lambda: Lit(Recurrent()), {}, "nn.LSTM keeps its weights where they cannot be stacked"),
    "hook": (lambda: Hooked(mlp()), {}, "Hooked writes on_train_epoch_end"),
    "own optimizer": (lambda: Lit(mlp(), partial(Own, lr=0.1)), {}, "Own is not known to act element by element"),
    "LBFGS": (lambda: Lit(mlp(), torch.optim.LBFGS), {}, "LBFGS is not known"),
    "callback that mixes clients": (
        CASES["MLP"],
        {"client_callbacks": [ByNorm()]},
        "vectorized clients would get another 'net",
    ),
    "callback that draws": (CASES["MLP"], {"client_callbacks": [Noise()]}, "drawn outside of its step"),
    "undeclared callback": (
        CASES["MLP"],
        {"client_callbacks": [Clips()]},
        "client callback Clips writes on_before_optimizer_step, and does not say acts_elementwise = True",
    ),
    "counting steps": (lambda: Counting(mlp()), {}, "its step changes module.steps"),
    "mixup": (lambda: Mixup(mlp()), {}, "draws from Python's or NumPy's generator"),
    "kept parameters": (Keeps, {}, "parameters that are kept in an attribute"),
    "anchors": (lambda: Anchored(mlp()), {}, "Anchored writes on_train_start, and does not say"),
    "anchors, declared": (lambda: DeclaredAnchored(mlp()), {}, ""),
    "by size of the data": (lambda: BySize(mlp()), {}, "reads trainer.train_dataloader"),
    "plateau": (
        lambda: Plateau(mlp()),
        {"client_state": "reset"},
        "ReduceLROnPlateau follows each client's own metric",
    ),
    "carried optimizers": (CASES["MLP"], {"client_state": "carry"}, "client_state='carry'"),
    "local validation": (CASES["MLP"], {"local_validation": True}, "local_validation=True"),
    "client id": (lambda: WhoAmI(mlp()), {}, r"reads trainer.client_id \(test_vectorized.py"),
    "examples of other shapes": (
        lambda: Lit(nn.Sequential(Folded(), mlp())),
        {"loaders": [DataLoader(TensorDataset(torch.randn(8, n), torch.zeros(8).long()), 4) for n in (6, 12)]},
        "clients' examples have different shapes",
    ),
    "loader workers": (
        CASES["MLP"],
        {"loaders": [DataLoader(TensorDataset(torch.randn(8, 6), torch.zeros(8).long()), num_workers=1)] * 2},
        "num_workers=1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_qualify_trains_one_by_one_and_says_why(name: str, counter: Counter) -> None:
    build, options, reason = REFUSED[name]
    options = {"max_rounds": 1, **options}
    alone = run(build, **copy.deepcopy(options))
    with pytest.warns(UserWarning, match=f"clients train one after the other: .*{reason}"):
        tried = run(build, vectorize_clients=True, **copy.deepcopy(options))
    assert counter.train == 0
    torch.testing.assert_close(tried[0], alone[0], rtol=0, atol=0)


class Wide(nn.Module):
    """Takes long in the memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 100_000).tanh().view(len(x), -1, 3).mean(1)


SLOWER: dict[str, tuple[Callable[[], L.LightningModule], str]] = {
    "large activations": (
        lambda: Lit(nn.Sequential(nn.Linear(6, 3), Wide())),
        r"with \d+\.\d MiB of activations a client",
    ),
    "large weights": (
        lambda: Lit(nn.Sequential(nn.Linear(6, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 3))),
        r"with 3\.9 MiB of weights a client",
    ),
}


@pytest.mark.parametrize("name", SLOWER)
def test_what_would_be_slower_is_done_only_where_a_number_says_so(name: str, counter: Counter) -> None:
    build, reason = SLOWER[name]
    slower = f"clients train one after the other: {reason} they would be slower vectorized on a CPU"
    with pytest.warns(UserWarning, match=slower):
        run(build, vectorize_clients=True, max_rounds=1)
    assert (counter.train, counter.evaluate > 0) == (0, True)
    run(build, vectorize_clients=4, max_rounds=1)
    assert counter.train > 0


def test_how_many_at_once_follows_from_memory(monkeypatch: pytest.MonkeyPatch, counter: Counter) -> None:
    sizes: list[int] = []
    fit = dispatch.vectorized_fit
    monkeypatch.setattr(dispatch, "vectorized_fit", lambda *args: sizes.append(len(args[0])) or fit(*args))
    loaders = [train for train, _ in data(sizes=[16] * 9)]
    run(CASES["MLP"], vectorize_clients=True, max_rounds=1, loaders=loaders)
    assert sizes == [9]
    sizes.clear()
    each = 4 * 4 * sum(p.numel() for p in mlp().parameters())
    monkeypatch.setattr(dispatch, "_memory", lambda device: 6 * each)
    run(CASES["MLP"], vectorize_clients=True, max_rounds=1, loaders=loaders)
    assert len(sizes) > 1
    assert max(sizes) <= 6


def test_what_does_not_qualify_is_an_error_where_it_is_required() -> None:
    with pytest.raises(ConfigurationError, match=r"vectorize_clients='require'.*Manual optimizes manually"):
        run(Manual, vectorize_clients="require")


class MeasuredInValidation(Lit):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)


def test_training_and_evaluation_qualify_apart(counter: Counter) -> None:
    with pytest.warns(UserWarning, match="clients evaluate one after the other: .*accuracy"):
        as_one = run(MeasuredInValidation, vectorize_clients="require")
    assert (counter.train, counter.evaluate) == (15, 0)
    assert_close(as_one, run(MeasuredInValidation))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vectorize_clients": 0}, "write True, 'require', or how many at once"),
        ({"vectorize_clients": "yes"}, "write True, 'require', or how many at once"),
        ({"vectorize_clients": True, "engine": "ray"}, "for engine='in_process' and engine='processes'"),
        ({"compile_clients": True}, "write vectorize_clients=True, too"),
    ],
)
def test_arguments_that_contradict(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        FederatedTrainer(max_rounds=1, num_clients=2, **options)


# ------------------------------------------------------------------------------------------------------ failing clients


class Failing(TensorDataset):
    """Data that cannot be read while it is broken."""

    broken = False

    def __getitem__(self, index: Any) -> Any:
        if self.broken:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


class Breaks(FederatedCallback):
    """Breaks a data set in round 2."""

    def __init__(self, data: Failing) -> None:
        self.data = data

    def on_round_start(self, trainer: Any, round: int, stage: Any, cohort: Any) -> None:
        self.data.broken = round == 2


def failing() -> dict[str, Any]:
    loaders = [train for train, _ in data(sizes=(16, 16, 16))]
    broken = Failing(*loaders[1].dataset.tensors)
    return {"loaders": [loaders[0], DataLoader(broken, batch_size=8, shuffle=True), loaders[2]], "broken": broken}


def test_a_client_that_fails_is_named_and_the_others_go_on() -> None:
    case = failing()
    with pytest.raises(ClientError, match=r"(?s)Round 2, train: client 1 raised OSError: the disk is gone"):
        run(CASES["MLP"], Breaks(case["broken"]), vectorize_clients="require", loaders=case["loaders"])
    case = failing()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        own = FaultTolerance(min_results=2), Breaks(case["broken"])
        as_one = run(CASES["MLP"], *own, vectorize_clients="require", loaders=case["loaders"])
    assert any(re.search("in round 2 clients train one after the other: OSError", str(w.message)) for w in said)
    assert all(torch.isfinite(value).all() for value in as_one[0].values())


def test_data_that_cannot_be_opened_for_the_trial_is_the_clients_own_failure() -> None:
    loaders = [train for train, _ in data(sizes=(16, 16, 16))]

    def client(number: int) -> Any:
        if number == 0:
            raise OSError("no disk")
        return loaders[number]

    history = History()
    callbacks = [ClientData(client, num_clients=3), FaultTolerance(min_results=2), history]
    with pytest.warns(UserWarning, match="one after the other: OSError: no disk"):
        FederatedTrainer(max_rounds=1, vectorize_clients=True, callbacks=callbacks, **QUIET).fit(Lit(mlp()))
    assert len(history.rows) == 1


def test_a_client_whose_numbers_explode_spoils_nobody_else(counter: Counter) -> None:
    def loaders() -> list[Any]:
        made = [train for train, _ in data(sizes=(16, 16, 16))]
        made[1].dataset.tensors[0].mul_(1e30)
        return made

    def options() -> dict[str, Any]:
        return {"loaders": loaders(), "max_rounds": 1}

    as_one = run(CASES["MLP"], FaultTolerance(min_results=2), vectorize_clients="require", **options())
    assert_close(as_one, run(CASES["MLP"], FaultTolerance(min_results=2), **options()))


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.fixture
def compiled_without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """``torch.compile`` with all but its slow last part; tells of each step that ran whether SGD was in it."""
    calls: list[bool] = []
    monkeypatch.setattr(compiled_step.CompiledStep.__init__, "__defaults__", ("aot_eager",))
    run = compiled_step.CompiledStep.run

    def counting(self: Any, stack: Any, step: Any, batch: Any, batch_idx: int, update: Any = None) -> Any:
        ran = run(self, stack, step, batch, batch_idx, update)
        calls.extend([] if ran is None else [update is not None])
        return ran

    monkeypatch.setattr(compiled_step.CompiledStep, "run", counting)
    torch._dynamo.reset()
    yield calls
    torch._dynamo.reset()


class ByEpoch(Lit):
    """A loss that depends on the epoch and on an attribute that a hook changes."""

    acts_elementwise = True
    factor = 1.0

    def on_train_epoch_start(self) -> None:
        self.factor = 1.0 + 0.5 * self.current_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (2.0 if self.current_epoch == 1 else 1.0) * self.factor


class TwoGroupsOfSgd(Lit):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "momentum": 0.9, "nesterov": True}, self.net[2].parameters()]
        groups[1] = {"params": groups[1], "weight_decay": 0.1, "maximize": True, "lr": 0.01}
        return torch.optim.SGD(groups, lr=0.05)


class ByRound(Lit):
    """Its learning rate decays from round to round."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1 * 0.5**self.current_epoch)


class ByEpochOfSgd(Lit):
    """Its learning rate is halved in the middle of the second round."""

    acts_elementwise = True

    def on_train_epoch_start(self) -> None:
        self.optimizers().param_groups[0]["lr"] = 0.05 / (1 + self.current_epoch // 3)


class Looks(Lit):
    """Notes what is to be seen between epochs and at the end: steps, gradients, momentum."""

    acts_elementwise = True

    def on_train_epoch_start(self) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        momenta = [state["momentum_buffer"] for state in self.optimizers().state.values()]
        SEEN.append([self.trainer.global_step, *(tensor.sum().item() for tensor in (*gradients, *momenta))])

    on_train_end = on_train_epoch_start


class Decays(Lit):
    """Changes gradients between backward pass and step."""

    acts_elementwise = True

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(0.5)


class Temperature(Lit):
    """Logs a weight, and keeps weights of the step before in a buffer."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("before", torch.zeros(3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) / self.temperature
        self.log("temperature", self.temperature, on_step=False, on_epoch=True)
        self.log("bias", self.net[2].bias[0], on_step=False, on_epoch=True)
        loss = loss + (self.net[2].bias - self.before).square().sum()
        self.before = self.net[2].bias.detach().clone()
        return loss


class SharedGradients(Decays):
    """Two weights that have one gradient."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.shared, self.personal = nn.Parameter(torch.zeros(3, 6)), nn.Parameter(torch.ones(3, 6))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = nn.functional.linear(batch[0], self.shared + self.personal)
        return super().training_step(batch, batch_idx) + logits.square().mean()


class Masks(Lit):
    """Trains only half of its first layer."""

    acts_elementwise = True

    def on_train_start(self) -> None:
        weight = self.net[0].weight
        weight.register_hook(lambda gradient: gradient * (torch.arange(6) % 2))


def _twice_as_far(parameters: Any) -> Any:
    """Steps twice as far."""
    optimizer = SGD(parameters)
    step = optimizer.step

    def twice(closure: Any = None) -> Any:
        loss = step(closure)
        step()
        return loss

    optimizer.step = twice
    return optimizer


SEEN: list[Any] = []
SGD = partial(torch.optim.SGD, lr=0.05)

# With whether SGD is compiled, too: always, for some steps, never.
COMPILED: dict[str, tuple[Callable[[], L.LightningModule], dict[str, Any], set[bool]]] = {
    "MLP": (CASES["MLP"], {}, {True}),
    "CNN with BatchNorm": (CASES["CNN with BatchNorm"], {}, {True}),
    "buffers": (CASES["buffers"], {}, {True}),
    "by epoch": (lambda: ByEpoch(mlp()), {}, {True}),
    "SGD without momentum": (lambda: Lit(mlp(), partial(SGD, weight_decay=0.1)), {}, {True}),
    "two groups of SGD": (lambda: TwoGroupsOfSgd(mlp()), {}, {True}),
    "looks": (lambda: Looks(mlp()), {}, {True}),
    "learning rate by round": (lambda: ByRound(mlp()), {}, {True, False}),
    "learning rate by epoch": (lambda: ByEpochOfSgd(mlp()), {}, {True, False}),
    "tied, frozen and unused weights": (CASES["tied, frozen and unused weights"], {}, {False}),
    "other parameters and names by epoch": (
        lambda: Thawing(mlp(), partial(momentum, weight_decay=0.1)),
        {},
        {False},
    ),
    "weights in log and buffer": (Temperature, {}, {True}),
    "gradients in the same memory": (SharedGradients, {}, {False}),
    "hook on a weight": (lambda: Masks(mlp()), {}, {False}),
    "hook on a weight, Adam": (lambda: Masks(mlp(), CASES["Adam"]().optimizer), {}, {False}),
    "step put in place of another": (lambda: Lit(mlp(), _twice_as_far), {}, {False}),
    "dampening": (lambda: Lit(mlp(), partial(momentum, dampening=0.5)), {}, {False}),
    "Adam": (CASES["Adam"], {}, {False}),
    "AdamW, two groups, schedule by step": (CASES["AdamW, two groups, schedule by step"], {}, {False}),
    "changes gradients": (lambda: Decays(mlp()), {}, {False}),
    "clipping by norm": (CASES["MLP"], {"gradient_clip_val": 0.2}, {False}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_steps_give_the_same(name: str, compiled_without_inductor: list[bool]) -> None:
    build, options, is_updated = COMPILED[name]
    SEEN.clear()
    as_one = run(build, dtype=torch.float64, vectorize_clients="require", compile_clients=True, **options)
    assert set(compiled_without_inductor) == is_updated
    seen = list(SEEN)
    assert_close(as_one, run(build, dtype=torch.float64, **options), torch.float64)
    SEEN.clear()
    run(build, dtype=torch.float64, vectorize_clients="require", **options)
    assert len(seen) == len(SEEN)
    for mine, theirs in zip(seen, SEEN, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)


def test_an_error_in_a_compiled_update_is_the_clients_own(compiled_without_inductor: list[bool]) -> None:
    loaders = [DataLoader(train.dataset, batch_size=8) for train, _ in data(sizes=[48] * 3)]
    for loader in loaders:
        loader.dataset.tensors[1][40] = 7  # of 3 classes; in the last batch
    with pytest.raises(FederationError, match=r"(?s)Round 1.*out of bounds"):
        run(CASES["MLP"], vectorize_clients="require", compile_clients=True, loaders=loaders)


def test_steps_that_draw_are_not_compiled(compiled_without_inductor: list[bool]) -> None:
    with pytest.warns(
        UserWarning, match="compile_clients: clients train uncompiled, for their steps draw random numbers"
    ):
        run(CASES["dropout"], vectorize_clients="require", compile_clients=True, max_rounds=1)
    assert not compiled_without_inductor


def test_without_a_compiler_clients_train_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: g++")

    monkeypatch.setattr(compiled_step.CompiledStep, "_of", lambda self, *args: fails)
    with pytest.warns(UserWarning, match=r"clients train uncompiled: no C\+\+ compiler was found \(install g\+\+"):
        as_one = run(CASES["MLP"], vectorize_clients="require", compile_clients=True)
    assert_close(as_one, run(CASES["MLP"]))


class Thawing(Lit):
    """Its first layer is trained from the second epoch of a round on, and logged then."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = torch.tanh(self.net[0](batch[0]))
        if self.current_epoch % 2:
            self.log("thawed", hidden.mean(), on_step=False, on_epoch=True)
        else:
            hidden = hidden.detach()
        return nn.functional.cross_entropy(self.net[2](hidden), batch[1])


class EverNew(ByEpoch):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + 0.01 * batch_idx * (self.current_epoch + 1))


def test_a_step_that_would_be_compiled_for_ever_runs_uncompiled(compiled_without_inductor: list[bool]) -> None:
    loaders = [train for train, _ in data(torch.float64, sizes=[48] * 3)]
    options: dict[str, Any] = {"dtype": torch.float64, "loaders": loaders}
    with pytest.warns(UserWarning, match="clients train uncompiled: the step was compiled too often"):
        as_one = run(lambda: EverNew(mlp()), vectorize_clients="require", compile_clients=True, **options)
    assert_close(as_one, run(lambda: EverNew(mlp()), **options), torch.float64)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    as_one = run(CASES["CNN with BatchNorm"], dtype=torch.float64, vectorize_clients="require", compile_clients=True)
    assert_close(as_one, run(CASES["CNN with BatchNorm"], dtype=torch.float64), torch.float64)
