"""Fits with callbacks, and a callback that notes where it was called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    Partition,
)
from lightning_fed.engines import InProcess, Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

ENGINES = [pytest.param(InProcess(), id="in process"), pytest.param(Processes(2, start_method="fork"), id="processes")]


def loader(examples: int = 48) -> DataLoader[Any]:
    return DataLoader(toy_data(examples), batch_size=8)


def federated(*callbacks: Callback, rounds: int = 2, **options: Any) -> FederatedTrainer:
    return FederatedTrainer(
        max_rounds=rounds, callbacks=[Partition(2, val_fraction=0.25), *callbacks], **{**QUIET, **options}
    )


def toy(*given: Callback, cls: type[ToyModule] = ToyModule) -> Any:
    """A module whose configure_callbacks gives these."""
    torch.manual_seed(0)
    module = cls()
    module.configure_callbacks = lambda: list(given)
    return module


class Noting(Callback):
    """Notes each hook, and on which side it was called; copies note in the same list."""

    notes: list[tuple[str, str]]

    def __init__(self) -> None:
        self.notes = []

    def __deepcopy__(self, memo: Any) -> Noting:
        copied = type(self)()
        copied.notes = self.notes
        return copied

    def note(self, trainer: Any, what: str) -> None:
        self.notes.append(("client" if hasattr(trainer, "client_id") else "server", what))


GRADIENT_HOOKS = ["on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"]
