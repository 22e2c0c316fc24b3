"""A client's schedules stand where one long local fit of a plain Trainer would be, in every round it takes part in."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import lr_scheduler

from lightning_fed.testing import ToyModule
from tests.helpers import sweep
from tests.integration.schedules.runs import (
    BATCHES,
    SCHEDULERS,
    Scheduled,
    federated,
    from_round,
    loader,
    long_fit,
    when_and_what,
)

# In closed form, by what was before, with a count of its own, within another.
FEW = ("LambdaLR", "MultiplicativeLR", "CosineAnnealingWarmRestarts", "OneCycleLR", "SequentialLR")


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", sweep(SCHEDULERS, FEW))
def test_every_scheduler_stands_where_one_long_fit_would_be(name: str, interval: str) -> None:
    def build() -> Scheduled:
        return Scheduled(name, interval)

    expected = when_and_what(long_fit(build, epochs=6))
    assert when_and_what(federated(build, 3, local_epochs=2)) == expected
    assert when_and_what(federated(build, 6, late=4)) == from_round(expected, 4, BATCHES)


@pytest.mark.parametrize("name", sweep(SCHEDULERS, FEW))
def test_every_scheduler_is_carried_on_with_the_client(name: str) -> None:
    def build() -> Scheduled:
        return Scheduled(name, "step")

    expected = when_and_what(long_fit(build, epochs=4))
    assert when_and_what(federated(build, 2, local_epochs=2, client_state="carry")) == expected


@pytest.mark.parametrize("frequency", sweep([2, 3, 7], [3]))
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ["StepLR", "LambdaLR"])
def test_a_frequency_is_lightnings(name: str, interval: str, frequency: int) -> None:
    def build() -> Scheduled:
        return Scheduled(name, interval, frequency)

    expected = when_and_what(long_fit(build, epochs=9))
    assert when_and_what(federated(build, 9, late=4)) == from_round(expected, 4, BATCHES)
    assert when_and_what(federated(build, 3, late=2, local_epochs=3)) == from_round(expected, 4, BATCHES)


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("every", sweep([2, 3], [2]))
@pytest.mark.parametrize("name", ["ExponentialLR", "OneCycleLR"])
def test_accumulated_batches_are_one_step(name: str, every: int, frequency: int) -> None:
    def build() -> Scheduled:
        return Scheduled(name, "step", frequency)

    expected = when_and_what(long_fit(build, epochs=4, accumulate_grad_batches=every))
    seen = federated(build, 4, late=3, accumulate_grad_batches=every)
    assert when_and_what(seen) == from_round(expected, 3, BATCHES)


def test_accumulation_that_changes_by_epoch_counts_as_it_was_in_each() -> None:
    def build() -> Scheduled:
        return Scheduled("ExponentialLR", "step")

    by_epoch = {0: 1, 1: 3, 3: 2}
    expected = when_and_what(long_fit(build, epochs=5, callbacks=[GradientAccumulationScheduler(by_epoch)]))
    seen = federated(build, 5, late=3, client_callbacks=[GradientAccumulationScheduler(by_epoch)])
    assert when_and_what(seen) == from_round(expected, 3, BATCHES)


class TwoOnOne(ToyModule):
    """Two schedules that change the same learning rate: their order is seen."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
        return [optimizer], [
            {"scheduler": cosine, "interval": "step", "frequency": 2},
            {"scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "epoch", "frequency": 2},
        ]


def test_two_schedules_of_one_optimizer_take_their_turns() -> None:
    expected = when_and_what(long_fit(TwoOnOne, epochs=6))
    assert when_and_what(federated(TwoOnOne, 6, late=4)) == from_round(expected, 4, BATCHES)


class Several(ToyModule):
    """Any schedules, all of one optimizer."""

    def __init__(self, schedules: list[tuple[str, str, int]]) -> None:
        super().__init__()
        self.schedules = schedules

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [
            {"scheduler": SCHEDULERS[name](optimizer), "interval": interval, "frequency": frequency}
            for name, interval, frequency in self.schedules
        ]


# Two of these would quarrel over what they call the first learning rate.
TOGETHER = sorted(SCHEDULERS.keys() - {"OneCycleLR", "CyclicLR"})


@settings(max_examples=15)
@given(
    schedules=st.lists(
        st.tuples(st.sampled_from(TOGETHER), st.sampled_from(["epoch", "step"]), st.integers(1, 3)),
        min_size=1,
        max_size=2,
    ),
    batches=st.sampled_from([1, 2, 5, 7]),
    every=st.sampled_from([1, 2, 3]),
    epochs=st.integers(1, 3),
    late=st.sampled_from([None, 2, 3]),
    by_steps=st.booleans(),
)
def test_any_schedules_stand_where_one_long_fit_would_be(
    schedules: Any, batches: int, every: int, epochs: int, late: int | None, by_steps: bool
) -> None:
    def build() -> Several:
        return Several(schedules)

    rounds, options = 3, {"accumulate_grad_batches": every}
    expected = when_and_what(long_fit(build, epochs=rounds * epochs, data=loader(batches), **options))
    local = {"local_steps": epochs * -(-batches // every)} if by_steps else {"local_epochs": epochs}
    seen = when_and_what(federated(build, rounds, data=loader(batches), late=late, **options, **local))
    assert seen == from_round(expected, late or 1, batches * epochs)


class Own(ToyModule):
    """A schedule whose step is the user's, who asks when it is."""

    only_by_epoch = False

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        by_epoch, by_step = (lr_scheduler.LambdaLR(optimizer, lambda n: 1.0) for _ in range(2))
        return [optimizer], [by_epoch] if self.only_by_epoch else [by_epoch, {"scheduler": by_step, "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        (group,) = self.optimizers().param_groups
        group["lr"] = group["lr"] * 0.9 + 0.01 * self.current_epoch + 0.001 * self.global_step


class OwnByEpoch(Own):
    only_by_epoch = True


@pytest.mark.parametrize("build", [Own, OwnByEpoch])
def test_a_schedule_whose_step_is_the_users_is_stepped_at_its_epoch_and_step(build: Any) -> None:
    expected = when_and_what(long_fit(build, epochs=4))
    assert when_and_what(federated(build, 4, late=3)) == from_round(expected, 3, BATCHES)


def test_the_default_begins_with_new_optimizers() -> None:
    seen: list[int] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(sum(len(optimizer.state) for optimizer in trainer.optimizers))

    federated(lambda: Scheduled("StepLR"), 3, client_callbacks=[Looks()])
    assert seen == [0, 0, 0]


def test_where_nothing_is_scheduled_nothing_is_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*args: Any) -> None:
        raise AssertionError("a schedule is looked for")

    monkeypatch.setattr("lightning_fed.client.local.schedules.Replay.__init__", no)
    federated(ToyModule, 3)


class Warns(Scheduled):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        warnings.warn("a word of the user's own", stacklevel=1)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("late", [None, 3])
@pytest.mark.parametrize("name", sweep(["StepLR", "MultiplicativeLR", "SequentialLR"], ["SequentialLR"]))
def test_a_warning_that_is_given_once_is_given_once_with_schedules_too(name: str, late: int | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        federated(lambda: Warns(name, "step"), 5, late=late)
    said = [str(warning.message) for warning in caught]
    assert said.count("a word of the user's own") == 1
    assert not [what for what in said if "lr_scheduler.step" in what]
