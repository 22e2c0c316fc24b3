"""What methods keep with a client whose reply is refused."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FaultTolerance, FedDyn, FederatedCallback, Scaffold
from tests.callbacks.rounds import loaders, sgd
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network


class Breaks(L.Callback):
    """Gives clients with more than two batches NaN for weights in the first round."""

    acts_elementwise = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.current_round == 1 and trainer.num_training_batches > 2:
            pl_module.net[0].weight.grad.fill_(torch.nan)


class Counts(FederatedCallback):
    def __init__(self) -> None:
        self.failed: list[tuple[int, int]] = []

    def on_client_error(self, trainer: Any, round: int, stage: str, error: Any) -> None:
        self.failed.append((round, error.client))


@pytest.mark.parametrize("method", [FedDyn, Scaffold])
@pytest.mark.parametrize("how", [{}, {"vectorize_clients": "require"}], ids=["alone", "vectorized"])
def test_a_client_that_was_nan_once_takes_part_again(method: Any, how: dict[str, Any]) -> None:
    counts = Counts()
    callbacks = [ClientData(loaders((8, 12, 8, 12))), FaultTolerance(min_results=1), counts, method()]
    trainer = FederatedTrainer(max_rounds=2, callbacks=callbacks, client_callbacks=[Breaks()], **how, **QUIET)
    trainer.fit(Classifier(network(torch.float64), sgd))
    assert counts.failed == [(1, 1), (1, 3)]
