"""Modules of every kind, and a federated fit of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torchmetrics
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, History
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET


def federated(
    module: Any, *, data: Any = None, rounds: int = 2, callbacks: Any = (), **kwargs: Any
) -> FederatedTrainer:
    """Three unequal clients with a held-out part each, and server-side validation."""
    train = toy_data(50) if data is None else data
    parts = [range(0, 8), range(8, 24), range(24, 48)]
    loaders = [
        (
            DataLoader(torch.utils.data.Subset(train, list(part)[2:]), batch_size=4, shuffle=True),
            DataLoader(torch.utils.data.Subset(train, list(part)[:2]), batch_size=2),
        )
        for part in parts
    ]
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=[ClientData(loaders), *callbacks], **{**QUIET, **kwargs})
    trainer.fit(module, val_dataloaders=DataLoader(train, batch_size=16))
    return trainer


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


class GAN(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(4, 8), nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, noise = batch[0], torch.randn(len(batch[0]), 4)
        opt_g, opt_d = self.optimizers()
        bce = nn.functional.binary_cross_entropy_with_logits
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        self.toggle_optimizer(opt_d)
        loss_d = bce(self.discriminator(real), ones) + bce(self.discriminator(self.generator(noise).detach()), zeros)
        opt_d.zero_grad()
        self.manual_backward(loss_d)
        opt_d.step()
        self.untoggle_optimizer(opt_d)
        self.toggle_optimizer(opt_g)
        loss_g = bce(self.discriminator(self.generator(noise)), ones)
        opt_g.zero_grad()
        self.manual_backward(loss_g)
        opt_g.step()
        self.untoggle_optimizer(opt_g)
        self.log_dict({"loss_d": loss_d, "loss_g": loss_g}, on_epoch=True, on_step=False)

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.1),
        )


class Scheduled(ToyModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if self.kind == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            config = {"scheduler": scheduler, "monitor": "train_loss"}
        else:
            config = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": self.kind}
        return {"optimizer": optimizer, "lr_scheduler": config}


class ResNet(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Dropping(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 2))


class Tied(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
        self.net[2].weight = self.net[0].weight


class Late(ToyModule):
    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook
        self.net = None

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def setup(self, stage: str) -> None:
        if self.hook == "setup" and self.net is None:
            self.build()

    def configure_model(self) -> None:
        if self.hook == "configure_model" and self.net is None:
            self.build()


class CompiledInside(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class Closure(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        net = self.net
        self.run = lambda x: net(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


class Transfers(ToyModule):
    """Expects its batches as a dict, made from tuples on the way to the device."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert isinstance(batch, list)
        return {"x": batch[0], "y": batch[1]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch["x"] * 2, batch["y"]]


class Measured(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.train_acc = torchmetrics.Accuracy("multiclass", num_classes=2)
        self.val_acc = torchmetrics.Accuracy("multiclass", num_classes=2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self(batch[0])
        self.train_acc(logits, batch[1])
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True)
        return nn.functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_acc(self(batch[0]), batch[1])
        self.log("val_acc", self.val_acc)


def frozen() -> ToyModule:
    module = ToyModule()
    module.net[0].requires_grad_(False)
    return module


MODULES: dict[str, Callable[[], Any]] = {
    "GAN": GAN,
    "epoch schedule": lambda: Scheduled("epoch"),
    "step schedule": lambda: Scheduled("step"),
    "plateau": lambda: Scheduled("plateau"),
    "dropout": Dropping,
    "tied": Tied,
    "frozen": frozen,
    "bf16": lambda: ToyModule().to(torch.bfloat16),
    "built in setup": lambda: Late("setup"),
    "built in configure_model": lambda: Late("configure_model"),
    "compiled inside": CompiledInside,
    "compiled around": lambda: torch.compile(ToyModule(), backend="eager"),
    "closure": Closure,
    "transfer hooks": Transfers,
    "metric objects": Measured,
}


def trained(build: Callable[[], Any], *callbacks: Any, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    torch.manual_seed(0)
    module, history = build(), History(per_client=True)
    data = None
    if build is MODULES["bf16"]:
        data = TensorDataset(toy_data(50).tensors[0].bfloat16(), toy_data(50).tensors[1])
    if build is MODULES["plateau"]:  # it has no place in the global round
        options = {"client_state": "carry", **options}
    federated(module, data=data, callbacks=[history, *callbacks], **options)
    return {name: value.clone() for name, value in module.state_dict().items()}, (history.rows, history.clients)


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert repr(one[1]) == repr(other[1])
