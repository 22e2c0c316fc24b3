"""Hooks that stand on an instance, are static, or wrap Lightning's own act as in a plain Trainer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, LearningRateMonitor, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

HOOKS = [
    *("prepare_data", "setup", "teardown", "configure_callbacks", "train_dataloader"),
    *("on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start"),
    *("on_train_batch_end", "on_before_zero_grad", "on_after_backward", "training_step", "validation_step"),
    *("on_validation_start", "on_validation_epoch_end", "lr_scheduler_step", "optimizer_step"),
]


def loader(examples: int = 32) -> DataLoader[Any]:
    return DataLoader(toy_data(examples), batch_size=8)


def toy(cls: type[ToyModule] = ToyModule) -> Any:
    torch.manual_seed(0)
    return cls()


def one_client(rounds: int = 1, **options: Any) -> FederatedTrainer:
    return FederatedTrainer(max_rounds=rounds, num_clients=1, **{**QUIET, **options})


def plain(**options: Any) -> L.Trainer:
    return L.Trainer(max_epochs=1, **{**QUIET, **options})


def heard_on(instance: Any, names: list[str]) -> list[str]:
    """Puts a hook of each name on an instance, as mock and LightningCLI do, and notes their calls."""
    calls: list[str] = []
    for name in names:

        def hook(*args: Any, name: str = name, own: Any = getattr(instance, name), **kwargs: Any) -> Any:
            calls.append(name)
            return own(*args, **kwargs)

        setattr(instance, name, hook)
    return calls


class WithData(ToyModule):
    def train_dataloader(self) -> Any:
        return loader()


# ------------------------------------------------------------------------------------------------- on the instance


def test_a_module_s_hooks_on_the_instance_are_called_as_often_as_by_a_plain_trainer():
    found = []
    for trainer in (plain(), one_client()):
        module = toy(WithData)
        calls = heard_on(module, HOOKS)
        trainer.fit(module, val_dataloaders=loader(16))
        found.append(Counter(calls))
    assert found[1] == found[0]
    assert found[0]["on_train_epoch_end"] == 1


class Site(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(16)


def test_the_hooks_on_the_instance_of_a_client_s_own_datamodule_are_called():
    site = Site()
    calls = heard_on(site, ["prepare_data", "setup", "train_dataloader", "val_dataloader"])
    FederatedTrainer(max_rounds=1, callbacks=[ClientData([site])], local_validation=True, **QUIET).fit(toy())
    assert set(calls) == {"prepare_data", "setup", "train_dataloader", "val_dataloader"}


@pytest.mark.parametrize(
    ("kind", "hooks"),
    [
        (ModelCheckpoint, ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"]),
        (EarlyStopping, ["on_train_epoch_end", "on_validation_end"]),
        (LearningRateMonitor, ["on_train_start"]),
    ],
)
def test_the_hooks_on_the_instance_of_lightning_s_own_callbacks_are_called(kind, hooks, tmp_path):
    options = {ModelCheckpoint: {"dirpath": tmp_path}, EarlyStopping: {"monitor": "train_loss"}}
    callback = kind(**options.get(kind, {}))
    calls = heard_on(callback, hooks)
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    one_client(callbacks=[callback], enable_checkpointing=True, logger=logger).fit(toy(), loader(), loader(16))
    assert Counter(calls) == dict.fromkeys(hooks, 1)


# ------------------------------------------------------------------------------------------------- static


def test_static_hooks_are_called_as_by_a_plain_trainer():
    class Static(ToyModule):
        @staticmethod
        def train_dataloader() -> Any:
            return loader()

        @staticmethod
        def configure_callbacks() -> Any:
            return [LambdaCallback()]

        @staticmethod
        def on_train_epoch_end() -> None:
            ended.append("epoch")

    ended: list[str] = []
    for trainer in (plain(), one_client()):
        trainer.fit(toy(Static))
    assert ended == ["epoch"] * 2


# ------------------------------------------------------------------------------------------------- a log of its own


class Named(ToyModule):
    """Puts its own name before all that it logs, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.MeanMetric()

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        super().log(f"toy/{name}", value * 2 if name == "train_loss" else value, *args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.accuracy.update(loss.detach())
        self.log_dict({"index": float(batch_idx), "again": loss.detach()}, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("computed", self.accuracy.compute())
        self.accuracy.reset()


def test_a_module_s_own_log_has_the_last_word_in_each_step():
    metrics = []
    for trainer in (plain(), one_client()):
        trainer.fit(toy(Named), loader())
        metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert metrics[1] == pytest.approx(metrics[0])
    assert {"toy/train_loss", "toy/index", "toy/again", "toy/computed"} <= metrics[0].keys()


def test_a_log_on_the_instance_has_the_last_word_in_each_step():
    metrics = []
    for trainer in (plain(), one_client()):
        module = toy()
        calls = heard_on(module, ["log"])
        trainer.fit(module, loader())
        metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        assert len(calls) >= 4
    assert metrics[1] == pytest.approx(metrics[0])


def test_what_a_module_s_own_log_renames_is_still_known_for_a_computed_metric():
    """It is averaged over clients by examples, and said to be."""
    parts = [loader(8), loader(24)]
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(parts)], **QUIET)
    with pytest.warns(UserWarning, match="toy/computed"):
        trainer.fit(toy(Named))
