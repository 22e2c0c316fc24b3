"""Schedules where a round is a number of steps, and on loaders without length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fed import ClientError
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import sweep
from tests.integration.schedules.runs import (
    BATCHES,
    Scheduled,
    Stream,
    federated,
    from_round,
    long_fit,
    when_and_what,
)


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", sweep(["StepLR", "CosineAnnealingLR", "LambdaLR"], ["CosineAnnealingLR"]))
def test_whole_epochs_of_local_steps_are_those_of_one_long_fit(name: str, interval: str) -> None:
    def build() -> Scheduled:
        return Scheduled(name, interval)

    expected = when_and_what(long_fit(build, steps=6 * BATCHES))
    assert when_and_what(federated(build, 3, local_steps=2 * BATCHES)) == expected
    assert when_and_what(federated(build, 3, local_steps=2 * BATCHES, late=2)) == from_round(expected, 3, BATCHES)


@pytest.mark.parametrize("steps", sweep([1, 3, 7, 13], [3, 7]))  # within an epoch, and over the end of one
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_round_of_local_steps_begins_where_one_long_fit_would_be(interval: str, every: int, steps: int) -> None:
    def build() -> Scheduled:
        return Scheduled("ExponentialLR", interval)

    options = {"accumulate_grad_batches": every}
    expected = {}
    for _, epoch, step, what in long_fit(build, steps=5 * steps, **options):
        expected.setdefault(step, (epoch, step, what))
    begins = {}
    for round, *when, what in federated(build, 5, local_steps=steps, **options):
        begins.setdefault(round, (*when, what))
    assert list(begins.values()) == [expected[round * steps] for round in range(5)]


def test_each_round_of_local_steps_draws_its_data_anew_also_within_an_epoch() -> None:
    """A sampler that draws by the epoch's number would else give the same few batches in all rounds."""
    told: list[int] = []

    class Told(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    data = toy_data(40)
    federated(ToyModule, 3, DataLoader(data, 8, sampler=Told(data)), local_steps=2)
    assert told == [0, 1, 2]


@pytest.mark.parametrize(
    ("interval", "frequency", "options", "way_out"),
    [
        ("step", 1, {}, r"steps with each batch, on a loader without length.*local_steps=.*client_state='carry'"),
        ("step", 2, {"local_steps": 2}, r"steps with each batch, on a loader without length.*client_state='carry'"),
        ("epoch", 1, {"local_steps": 2}, r"steps with each epoch, on a loader without length.*local_epochs=.*'carry'"),
    ],
)
def test_what_cannot_be_known_is_an_error(interval: str, frequency: int, options: Any, way_out: str) -> None:
    def build() -> Scheduled:
        return Scheduled("ExponentialLR", interval, frequency)

    data = DataLoader(Stream(), 8)
    with pytest.raises(ClientError, match=f"Round 1, train: client 0 has a ExponentialLR that {way_out}"):
        federated(build, 2, data, **options)
    assert federated(build, 1, data, **options)  # one round begins where it begins


@pytest.mark.parametrize(("interval", "options"), [("epoch", {}), ("step", {"local_steps": 2})])
def test_what_is_known_of_a_loader_without_length_is_used(interval: str, options: Any) -> None:
    seen = federated(lambda: Scheduled("ExponentialLR", interval), 3, DataLoader(Stream(), 8), **options)
    rates = [0.2, 0.2, 0.14, 0.14, 0.098, 0.098] if interval == "epoch" else [0.2 * 0.7**n for n in range(6)]
    assert [what[-1][0]["lr"] for what in seen] == pytest.approx(rates)
