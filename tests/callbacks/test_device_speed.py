"""Virtual time: what rounds would take, by the formula; nothing of the training changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from torch.distributions import HalfNormal, LogNormal, Normal
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import APFL, ClientData, DeviceSpeed, Ditto, FaultTolerance, History, Scaffold
from lightning_fed.errors import ConfigurationError, RoundError
from lightning_fed.testing import ToyModule, toy_data
from tests.callbacks.rounds import (
    COHORTS,
    EPOCHS,
    ROUNDS,
    SIZES,
    Chosen,
    Stops,
    assert_equal,
    encoded,
    federated,
    loaders,
    sgd,
)
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier


def times(speed: DeviceSpeed, rounds: int = ROUNDS, **how: Any) -> list[float]:
    """The clock after each round of the unequal clients, part of whom take part."""
    module, history = Classifier(encoded(), sgd), History()
    callbacks = [ClientData(loaders()), Chosen(), speed, history, *how.pop("callbacks", [])]
    arguments = {"local_epochs": EPOCHS} if "local_steps" not in how else {}
    FederatedTrainer(max_rounds=rounds, callbacks=callbacks, **{**QUIET, **arguments, **how}).fit(module)
    return history["time/virtual"]


def expected(
    seconds: Sequence[float], bandwidth: Sequence[float] | None = None, examples: Any = None, passes: int = EPOCHS
) -> list[float]:
    """A round lasts as long as its slowest client, which passes three times over each example of its epochs."""
    size = sum(tensor.nbytes for tensor in encoded().state_dict().values())
    now, ends = 0.0, []
    for cohort in COHORTS:
        trained = {i: examples or SIZES[i] * passes for i in cohort}
        now += max(3 * trained[i] * seconds[i] + (2 * size / bandwidth[i] if bandwidth else 0) for i in cohort)
        ends.append(now)
    return ends


def test_a_round_lasts_as_long_as_its_slowest_client():
    seconds = [2.0, 0.5, 0.125, 1.0]
    assert times(DeviceSpeed(seconds)) == expected(seconds)
    assert times(DeviceSpeed(0.25)) == expected([0.25] * 4)


def test_what_travels_takes_its_time():
    bandwidth = [1e3, 1e4, 10.0, 1e5]
    assert times(DeviceSpeed([2.0] * 4, bandwidth)) == pytest.approx(expected([2.0] * 4, bandwidth), rel=1e-12)


def test_a_function_is_asked_by_round_and_client():
    ends = times(DeviceSpeed(lambda round, client: round * (client + 1.0)))
    lasts = [max(3 * SIZES[i] * EPOCHS * round * (i + 1.0) for i in cohort) for round, cohort in enumerate(COHORTS, 1)]
    assert ends == [sum(lasts[:round]) for round in (1, 2, 3)]


def test_local_steps_count_by_the_examples_of_a_step():
    seconds = [2.0, 0.5, 0.125, 1.0]
    assert times(DeviceSpeed(seconds, batch_size=4), local_steps=5) == expected(seconds, examples=20)
    with pytest.raises(ConfigurationError, match="batch_size="):
        times(DeviceSpeed(seconds), local_steps=5)


def test_local_epochs_may_change_from_round_to_round():
    ends = times(DeviceSpeed(1.0), local_epochs=[1, 3])
    assert ends == [3 * 22, 3 * 22 + 3 * 22 * 3, 3 * 22 + 2 * 3 * 22 * 3]


def test_what_methods_train_beside_the_round_s_weights_takes_its_time():
    seconds = [2.0, 0.5, 0.125, 1.0]
    epoch, whole = expected(seconds, passes=1), expected(seconds)

    def slow(method: Any, **how: Any) -> list[float]:
        return times(DeviceSpeed(seconds, **({"batch_size": 4} if how else {})), callbacks=[method], **how)

    # A second fit of as many epochs; a pass over the data before the fit.
    assert slow(Ditto()) == slow(APFL()) == [2 * end for end in whole]
    assert slow(Scaffold(option="I")) == [end + once for end, once in zip(whole, epoch, strict=True)]
    assert slow(Scaffold()) == whole
    steps = expected(seconds, examples=20)
    assert slow(Ditto(), local_steps=5) == [2 * end for end in steps]


def test_a_distribution_gives_each_client_its_device_from_the_seed_alone():
    speed = DeviceSpeed(HalfNormal(0.5), LogNormal(8.0, 1.0))
    first = times(speed, seed=1)
    torch.manual_seed(99)
    assert times(DeviceSpeed(HalfNormal(0.5), LogNormal(8.0, 1.0)), seed=1) == first == times(speed, seed=1)
    assert times(speed, seed=2) != first

    def lasts(every_round: bool) -> list[float]:
        history, drawn = History(), DeviceSpeed(HalfNormal(0.5), every_round=every_round)
        trainer = FederatedTrainer(max_rounds=3, num_clients=1, callbacks=[drawn, history], **QUIET)
        trainer.fit(ToyModule(), DataLoader(toy_data(8), batch_size=8))
        ends = history["time/virtual"]
        return [end - begin for begin, end in zip([0.0, *ends], ends)]

    assert len(set(map(float32, lasts(every_round=False)))) == 1
    assert len(set(map(float32, lasts(every_round=True)))) == 3


def float32(number: float) -> float:
    """Differences of sums in double precision are equal to this."""
    return float(torch.tensor(number, dtype=torch.float32))


@pytest.mark.parametrize("way", [{}, {"vectorize_clients": True}, {"engine": "processes"}])
def test_nothing_of_the_training_changes(way: dict[str, Any]):
    without = federated(encoded(), sgd, **way)
    assert_equal(federated(encoded(), sgd, DeviceSpeed(HalfNormal(0.5), every_round=True), **way), without)


def test_a_client_that_failed_is_not_waited_for():
    class Fails(Classifier):
        def on_train_start(self) -> None:
            if self.trainer.client_id == 2:
                raise ValueError("no power")

    history = History()
    callbacks = [ClientData(loaders()), DeviceSpeed([1.0, 1.0, 1e6, 1.0]), FaultTolerance(0.1), history]
    FederatedTrainer(max_rounds=1, callbacks=callbacks, **QUIET).fit(Fails(encoded(), sgd))
    assert history["time/virtual"] == [3.0 * 12]


@pytest.mark.parametrize("hook", ["on_round_start", "on_client_end", "on_round_end"])
def test_a_run_that_was_broken_off_goes_on_with_its_clock(tmp_path: Path, hook: str):
    # The exception of on_round_end comes when the clock has moved on already.
    stops = Stops(hook)
    whole = times(DeviceSpeed([2.0, 0.5, 0.125, 1.0]))
    broken = [stops, OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(RuntimeError, match="stopped"):
        times(DeviceSpeed([2.0, 0.5, 0.125, 1.0]), callbacks=broken, enable_checkpointing=True)
    module, history = Classifier(encoded(), sgd), History()
    callbacks = [ClientData(loaders()), Chosen(), DeviceSpeed([2.0, 0.5, 0.125, 1.0]), history]
    trainer = FederatedTrainer(max_rounds=ROUNDS, local_epochs=EPOCHS, callbacks=callbacks, **QUIET)
    trainer.fit(module, ckpt_path=str(tmp_path / "on_exception.ckpt"))
    assert history["time/virtual"] == whole


def test_a_second_fit_begins_at_zero():
    speed = DeviceSpeed(1.0)
    assert times(speed) == times(speed)


def test_the_run_stops_when_its_time_is_over(tmp_path: Path):
    lasts = 3.0 * 22 * EPOCHS  # the first round and the third, and the second, too: client 2 is in all
    assert len(times(DeviceSpeed(1.0, max_virtual_time=2 * lasts))) == 2
    assert len(times(DeviceSpeed(1.0, max_virtual_time=2 * lasts + 1))) == 3
    early = EarlyStopping("time/virtual", mode="max", patience=100, stopping_threshold=1.5 * lasts)
    assert len(times(DeviceSpeed(1.0), callbacks=[early])) == 2

    def steps(ckpt_path: str | None) -> int:
        last = ModelCheckpoint(tmp_path, save_last=True)
        callbacks = [ClientData(loaders()), Chosen(), DeviceSpeed(1.0, max_virtual_time=2 * lasts), last]
        arguments = {**QUIET, "enable_checkpointing": True}
        trainer = FederatedTrainer(max_rounds=ROUNDS, local_epochs=EPOCHS, callbacks=callbacks, **arguments)
        trainer.fit(Classifier(encoded(), sgd), ckpt_path=ckpt_path)
        return trainer.global_step

    assert steps(None) == steps("last") == 2


BAD = {
    "a string": ({"seconds_per_example": "slow"}, "seconds_per_example='slow' must be at least 0"),
    "negative": ({"seconds_per_example": -1}, "seconds_per_example=-1 must be"),
    "NaN in a list": ({"seconds_per_example": [1.0, float("nan")]}, "seconds_per_example="),
    "empty": ({"seconds_per_example": []}, r"seconds_per_example=\[\] must be"),
    "a switch": ({"seconds_per_example": True}, "seconds_per_example=True must be"),
    "no bandwidth": ({"seconds_per_example": 1, "bandwidth": 0}, "bandwidth=0 must be greater than 0"),
    "a vector": ({"seconds_per_example": HalfNormal(torch.ones(3))}, "of a single number"),
    "no switch": ({"seconds_per_example": 1, "every_round": "yes"}, "every_round='yes': write True or False"),
    "half a batch": ({"seconds_per_example": 1, "batch_size": 0.5}, "batch_size=0.5 must be a whole number"),
    "no time": ({"seconds_per_example": 1, "max_virtual_time": 0}, "max_virtual_time=0 must be"),
}


@pytest.mark.parametrize("given", BAD)
def test_what_cannot_be_used_is_refused(given: str):
    arguments, rule = BAD[given]
    with pytest.raises(ConfigurationError, match=rule):
        DeviceSpeed(**arguments)


LATER = {
    "a list of other clients": ([1.0, 2.0], "has 2 numbers, and there are 4 clients"),
    "a function that gives nothing": (lambda round, client: None, "is None for client 0 in round 1"),
    "a distribution below 0": (Normal(-10.0, 0.1), "for client 0 in round 1: it must be at least 0"),
}


@pytest.mark.parametrize("given", LATER)
def test_what_only_a_run_tells_is_refused_there(given: str):
    seconds, rule = LATER[given]
    with pytest.raises((ConfigurationError, RoundError), match=rule):
        times(DeviceSpeed(seconds))


def test_curves_over_virtual_time():
    history = History()
    trainer = FederatedTrainer(max_rounds=3, num_clients=2, callbacks=[DeviceSpeed(1.0), history], **QUIET)
    trainer.fit(ToyModule(), DataLoader(toy_data(16), batch_size=8))
    [axes] = history.plot(x="time/virtual").axes
    assert axes.get_xlabel() == "time/virtual"
    assert [line.get_xdata().tolist() for line in axes.get_lines()] == [history["time/virtual"]]
    with pytest.raises(KeyError, match="time/virtuel"):
        history.plot(x="time/virtuel")
