"""Taking a schedule to where it would be, in fewer steps than it would take."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from lightning_fed.client.local import schedules
from tests.integration.schedules.runs import SCHEDULERS


def made(name: str, lr: float = 0.1) -> tuple[Any, Any]:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": parameters[:1], "lr": 2 * lr}, {"params": parameters[1:]}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return optimizer, SCHEDULERS[name](optimizer)


def rates(optimizer: Any) -> list[Any]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "_memory", {})


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_many_steps_end_where_one_by_one_does(name: str) -> None:
    random.seed(0)
    # More steps from round to round, of several clients; some fewer than before; others that began otherwise.
    for times, lr in [(random.randrange(1, 190), random.choice([0.1, 0.2])) for _ in range(60)]:
        optimizer, schedule = made(name, lr)
        schedules._step(schedule, times)
        plain, expected = made(name, lr)
        for _ in range(times):
            expected.step()
        for _ in range(5):
            assert rates(optimizer) == rates(plain)
            assert schedule.get_last_lr() == expected.get_last_lr()
            optimizer.step()
            schedule.step()
            expected.step()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_what_was_done_for_one_client_is_not_done_again_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    original = lr_scheduler.CosineAnnealingLR.step

    def counted(self: Any) -> None:
        steps.append(1)
        original(self)

    monkeypatch.setattr(lr_scheduler.CosineAnnealingLR, "step", counted)
    schedules._step(made("CosineAnnealingLR")[1], 1000)
    schedules._step(made("CosineAnnealingLR")[1], 1000)
    schedules._step(made("CosineAnnealingLR")[1], 1100)
    assert len(steps) == 1100 + 3  # and one when each is made


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_functions_of_the_users_are_not_remembered() -> None:
    def last(factor: float) -> float:
        optimizer, _ = made("StepLR")
        inner = lr_scheduler.MultiplicativeLR(optimizer, lambda n: factor)
        schedule = lr_scheduler.SequentialLR(optimizer, [inner, lr_scheduler.ConstantLR(optimizer)], [100])
        schedules._step(schedule, 60)
        return optimizer.param_groups[0]["lr"]

    assert last(0.99) == pytest.approx(0.2 * 0.99**60)
    assert last(0.98) == pytest.approx(0.2 * 0.98**60)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_little_is_remembered() -> None:
    for lr in range(1, 2 * schedules._MANY):
        schedules._step(made("StepLR", lr / 1000)[1], 60)
    for times in range(60, 60 + 2 * schedules._MANY):
        schedules._step(made("StepLR")[1], times)
    assert len(schedules._memory) <= schedules._MANY
    assert max(len(reached) for reached in schedules._memory.values()) <= schedules._MANY
