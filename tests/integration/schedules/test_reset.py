"""client_state='reset': a schedule that never advances is said."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_fed.testing import ToyModule
from tests.integration.schedules.runs import BATCHES, ByHand, Scheduled, built, warned


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: Scheduled("StepLR"), {}),
        (lambda: Scheduled("ExponentialLR"), {}),
        (lambda: Scheduled("StepLR"), {"local_epochs": 2}),
        (lambda: Scheduled("StepLR", "step"), {"local_steps": 2}),
        (lambda: Scheduled("StepLR", "step", 3), {}),
        (lambda: Scheduled("ExponentialLR"), {"local_steps": BATCHES}),
    ],
)
def test_with_reset_a_schedule_that_never_advances_is_said_once_by_name(build: Any, options: Any) -> None:
    (said,) = warned(build, **options)
    assert type(built(build).configure_optimizers()["lr_scheduler"]["scheduler"]).__name__ in said
    assert "client_state='carry'" in said


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (ToyModule, {}),
        (lambda: Scheduled("ExponentialLR"), {"local_epochs": 2}),
        (lambda: Scheduled("StepLR"), {"local_epochs": 3}),
        (lambda: Scheduled("ExponentialLR", "step"), {}),
        (lambda: Scheduled("StepLR", "step"), {"local_steps": 3}),
        (lambda: Scheduled("ExponentialLR"), {"local_steps": BATCHES + 1}),
        (lambda: Scheduled("StepLR"), {"rounds": 1}),
        (lambda: Scheduled("StepLR"), {"client_state": "global"}),
        (lambda: Scheduled("StepLR"), {"client_state": "carry"}),
        (lambda: ByHand(lambda module, i: True), {}),
    ],
)
def test_nothing_is_said_of_a_schedule_that_advances(build: Any, options: Any) -> None:
    assert warned(build, **options) == []
