"""Schedules that the module steps by hand stand where one long fit would be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler

from lightning_fed import ClientError, FederatedTrainer
from lightning_fed.callbacks import ClientData
from lightning_fed.testing import ToyModule
from tests.helpers import QUIET
from tests.integration.schedules.runs import (
    BATCHES,
    HANDS,
    ByHand,
    Seen,
    built,
    federated,
    from_round,
    loader,
    long_fit,
    rates,
)


@pytest.mark.parametrize("name", HANDS)
def test_a_schedule_stepped_by_hand_stands_where_one_long_fit_would_be(name: str) -> None:
    expected = rates(long_fit(HANDS[name], epochs=6))
    assert rates(federated(HANDS[name], 6)) == expected
    assert rates(federated(HANDS[name], 3, local_epochs=2)) == expected
    # One that comes in late finds out in its first fit, which begins once more where that was in the wrong place.
    late = rates(federated(HANDS[name], 6, late=4))
    assert late[-3 * BATCHES :] == from_round(expected, 4, BATCHES)
    assert len(late) in (3 * BATCHES, 4 * BATCHES)


@pytest.mark.parametrize("name", ["each batch", "each epoch", "last batch"])
def test_local_steps_of_a_schedule_stepped_by_hand(name: str) -> None:
    expected = rates(long_fit(HANDS[name], epochs=6))
    assert rates(federated(HANDS[name], 3, local_steps=2 * BATCHES)) == expected


def test_a_rule_found_in_one_round_is_kept_for_the_next() -> None:
    assert len(federated(HANDS["each batch"], 6, late=2)) == 6 * BATCHES  # five rounds, and the first of them twice
    assert len(federated(HANDS["each batch, declared"], 6, late=2)) == 5 * BATCHES


def test_what_a_run_with_another_client_state_has_kept_is_no_hindrance(tmp_path: Path) -> None:
    def fit(client_state: Any, rounds: int, ckpt_path: str | None = None) -> Any:
        seen, saving = Seen(), ModelCheckpoint(tmp_path, save_last=True)
        options = {**QUIET, "enable_checkpointing": True, "client_state": client_state, "client_callbacks": [seen]}
        callbacks = [ClientData([loader()]), saving]
        trainer = FederatedTrainer(max_rounds=rounds, callbacks=callbacks, **options)
        trainer.fit(built(HANDS["each batch"]), ckpt_path=ckpt_path)
        return rates(seen.seen)

    fit("carry", 2)
    assert fit("global", 3, "last")[-BATCHES:] == from_round(rates(long_fit(HANDS["each batch"], 3)), 3, BATCHES)
    assert len(fit("carry", 4, "last")) in (BATCHES, 2 * BATCHES)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ByHand(lambda module, i: module.current_epoch % 3 == 2, at_epoch_end=True),
        lambda: ByHand(lambda module, i: module.current_epoch < 2),
        lambda: ByHand(lambda module, i: module.global_step < 7),
    ],
)
def test_steps_by_hand_of_which_no_rule_tells_are_an_error(build: Callable[[], ByHand]) -> None:
    with pytest.raises(ClientError, match=r"client 0 has a ExponentialLR that its module steps by hand, \d times in"):
        federated(build, 6)
    federated(build, 6, client_state="carry")
    federated(build, 6, client_state="reset")
    federated(build, 1, local_epochs=6)


class Gan(ToyModule):
    """Two optimizers with a schedule each: one stepped with each batch, the other, every second batch, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for i, optimizer in enumerate(self.optimizers()):
            if i == 0 or batch_idx % 2 == 0:
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()
        self.lr_schedulers()[0].step()

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers()[1].step()

    def configure_optimizers(self) -> Any:
        one, other = (torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2))
        return [one, other], [lr_scheduler.ExponentialLR(one, 0.9), lr_scheduler.CosineAnnealingLR(other, 20)]


def both_rates(seen: list[Any]) -> list[Any]:
    return [[group["lr"] for group in what[-1]] for what in seen]


def test_schedules_of_several_optimizers_are_told_apart() -> None:
    expected = both_rates(long_fit(Gan, epochs=4))
    assert both_rates(federated(Gan, 4)) == expected
    assert both_rates(federated(Gan, 4, late=3))[-2 * BATCHES :] == from_round(expected, 3, BATCHES)


@pytest.mark.parametrize("options", [{}, {"local_epochs": 2}, {"local_steps": 8}])
def test_global_steps_count_on_where_optimizers_are_stepped_by_hand(options: Any) -> None:
    asked: list[int] = []

    class Asks(Gan):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            asked.append(self.trainer.global_step)

    rounds = 4 // options.get("local_epochs", 1)
    long_fit(Asks, epochs=4)
    expected = asked.copy()
    asked.clear()
    federated(Asks, rounds, **options)
    assert asked == expected
    asked.clear()
    federated(Asks, rounds, late=2, **options)
    assert asked[-len(expected) // rounds :] == expected[-len(expected) // rounds :]


def test_the_epoch_of_local_steps_is_known_where_optimizers_are_not_stepped_alike() -> None:
    # 8 steps are 5 batches: the second optimizer is stepped with the first, third and fifth.
    seen = federated(Gan, 3, local_steps=8)
    assert [(what[0], what[1]) for what in seen] == [(round, round - 1) for round in (1, 2, 3) for _ in range(5)]
