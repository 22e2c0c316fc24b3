"""Buffers that are not finite from the start: masks of -Inf, and what is NaN until somebody sets it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData
from lightning_fed.errors import InvalidUpdateError
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


@pytest.mark.parametrize("broken", ["net.0.weight", None])
def test_weights_that_were_not_finite_before_are_named_and_not_the_client_blamed(broken: str | None) -> None:
    class Diverges(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1 if broken else math.nan)

    module = Diverges()
    if broken:
        module.get_parameter(broken).data[0] = math.nan
    callbacks = [ClientData([DataLoader(toy_data(n), 8) for n in (5, 40, 11)])]
    with pytest.raises(InvalidUpdateError, match=r"client 0 sent 'net.* with NaN or Inf in it") as raised:
        FederatedTrainer(max_rounds=1, callbacks=callbacks, **QUIET).fit(module)
    named = f"The global {broken!r} had NaN in it before: begin with finite weights"
    assert (named in str(raised.value)) is (broken is not None)
    assert "A smaller learning rate" in str(raised.value)
