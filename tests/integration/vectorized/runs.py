"""Modules, data and fits that tests of vectorized clients share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    History,
)
from lightning_fed.client.vectorized import dispatch
from tests.helpers import QUIET

ROUNDS = 2
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


def run(build: Callable[[], L.LightningModule], *callbacks: Any, **options: Any) -> tuple[dict[str, Tensor], Any, Any]:
    """Weights, history and each client's report after rounds of two epochs."""
    torch.manual_seed(0)
    module, history = build(), History(per_client=True)
    dtype = options.pop("dtype", torch.float32)
    loaders = options.pop("loaders", None) or data(dtype)
    options = {"max_rounds": ROUNDS, "local_epochs": 2, **QUIET, **options}
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
