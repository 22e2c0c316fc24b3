"""Buffers that are not finite from the start: masks of -Inf, and what is NaN until somebody sets it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET


class Masked(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3))
        self.register_buffer("threshold", torch.tensor(math.nan))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.threshold = torch.tensor(0.5) if batch_idx == 0 and self.trainer.current_round == 2 else self.threshold
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("vectorize", [False, True])
def test_they_train_and_are_what_clients_make_of_them(vectorize: bool) -> None:
    module = Masked()
    before = module.net[0].weight.clone()
    trainer = FederatedTrainer(max_rounds=2, num_clients=3, vectorize_clients=vectorize, **QUIET)
    trainer.fit(module, DataLoader(toy_data(24), 8))
    assert torch.equal(module.mask, Masked().mask)
    assert module.threshold == 0.5
    assert not torch.equal(module.net[0].weight, before)
