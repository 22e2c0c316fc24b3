"""Fits that save checkpoints, and what a resumed run says."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

FEDERATION = "lightning_fed.Federation"


class Toy(ToyModule):
    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class Counting(Toy):
    """Counts how often it trains."""

    trained = 0

    def training_step(self, batch, batch_idx):
        type(self).trained += 1
        return super().training_step(batch, batch_idx)


class OneTensor(L.LightningModule):
    """With one parameter, a plain optimizer's state is of the server's shape."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(8))

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.w - batch[1]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([self.w], lr=0.1)


def loader(seed=0):
    return DataLoader(toy_data(32, seed), batch_size=8)


def trainer_of(directory, *callbacks, rounds=4, **options):
    """A trainer that saves ``last.ckpt`` in a directory."""
    saving = ModelCheckpoint(directory, save_last=True, enable_version_counter=False)
    arguments = {**QUIET, "enable_checkpointing": True, "default_root_dir": directory, "seed": 0, **options}
    if not any("partition" in getattr(callback, "decides", ()) for callback in callbacks):
        arguments.setdefault("num_clients", 2)
    return FederatedTrainer(max_rounds=rounds, callbacks=[*callbacks, saving], **arguments)


def fit(directory, *callbacks, module=None, ckpt_path=None, **options):
    torch.manual_seed(1)
    module = ToyModule() if module is None else module
    trainer = trainer_of(directory, *callbacks, **options)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module, trainer


def saved(path):
    return torch.load(path, weights_only=True)


def save_central(module, path, **how):
    trainer = L.Trainer(max_epochs=2, **QUIET)
    trainer.fit(module, loader())
    trainer.save_checkpoint(path, **how)


@contextmanager
def notes():
    """The warning in which a resumed run says what it has otherwise; a list of its lines, empty if there is none."""
    lines = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
    said = [str(warning.message) for warning in caught if "otherwise than before" in str(warning.message)]
    assert len(said) <= 1
    lines += [line.removeprefix("- ") for text in said for line in text.splitlines()[1:]]


def optimizers_of(make):
    class Module(ToyModule):
        def configure_optimizers(self):
            return make(self)

    return Module
