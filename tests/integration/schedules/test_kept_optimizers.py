"""Optimizers and schedules that a module keeps are fresh in every local fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fed import ClientError, FederatedTrainer
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET, sweep
from tests.integration.schedules.runs import SCHEDULERS, built, loader


class Keeps(ToyModule):
    """Gives the same objects at each call of ``configure_optimizers``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        optimizer = (
            torch.optim.Adam if kind == "Adam" else torch.optim.Adagrad if kind == "Adagrad" else torch.optim.SGD
        )
        self.kept = optimizer(self.parameters(), lr=0.1)
        self.schedule = None if kind == "new scheduler" else SCHEDULERS["SequentialLR"](self.kept)

    def configure_optimizers(self) -> Any:
        schedule = self.schedule or SCHEDULERS["LinearLR"](self.kept)
        return [self.kept], [{"scheduler": schedule, "interval": "step"}]


class Makes(Keeps):
    """The same, made anew at each call."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        del self.kept, self.schedule

    def configure_optimizers(self) -> Any:
        kind = self.kind
        optimizer = (
            torch.optim.Adam if kind == "Adam" else torch.optim.Adagrad if kind == "Adagrad" else torch.optim.SGD
        )
        optimizer = optimizer(self.parameters(), lr=0.1)
        schedule = SCHEDULERS["LinearLR" if kind == "new scheduler" else "SequentialLR"](optimizer)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def trained(build: Callable[[], Any], **options: Any) -> dict[str, Tensor]:
    module = built(build)
    trainer = FederatedTrainer(max_rounds=2, num_clients=3, **{**QUIET, **options})
    trainer.fit(module, DataLoader(toy_data(48), 4, shuffle=True))
    return {name: value.clone() for name, value in module.state_dict().items()}


# Adagrad has a state before its first step.
FEW = [("Adam", "global"), ("Adam", "carry"), ("Adagrad", "reset"), ("new scheduler", "global")]


@pytest.mark.parametrize(
    ("kind", "client_state"),
    sweep(itertools.product(["SGD", "Adam", "Adagrad", "new scheduler"], ["global", "carry", "reset"]), FEW),
)
def test_optimizers_that_a_module_keeps_are_fresh_in_every_local_fit(kind: str, client_state: Any) -> None:
    kept, made = (trained(lambda cls=cls: cls(kind), client_state=client_state) for cls in (Keeps, Makes))
    torch.testing.assert_close(kept, made, rtol=0, atol=0)


def test_optimizers_that_a_module_keeps_are_the_same_on_processes() -> None:
    kept = trained(lambda: Keeps("Adam"))
    torch.testing.assert_close(
        trained(lambda: Keeps("Adam"), engine=Processes(2, start_method="fork")), kept, rtol=0, atol=0
    )


def test_optimizers_that_a_module_keeps_are_fresh_where_clients_train_as_one() -> None:
    kept, made = (trained(lambda cls=cls: cls("SGD"), vectorize_clients="require") for cls in (Keeps, Makes))
    torch.testing.assert_close(kept, made, rtol=0, atol=0)


def test_after_a_fit_that_fails_too_what_a_module_keeps_is_as_it_was() -> None:
    class Fails(Keeps):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.current_round == 2:
                raise ValueError("no")

    module = built(lambda: Fails("Adam"))
    lr = module.kept.param_groups[0]["lr"]
    trainer = FederatedTrainer(max_rounds=2, num_clients=2, **QUIET)
    with pytest.raises(ClientError, match="ValueError: no"):
        trainer.fit(module, loader())
    assert module.kept.param_groups[0]["lr"] == lr
    assert not module.kept.state
    assert module.schedule.last_epoch == 0
    assert module.kept.param_groups[0]["params"][0] is module.net[0].weight
