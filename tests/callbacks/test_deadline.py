"""Deadlines and over-selection: who is late has no part in a round, and is as before."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch.distributions import HalfNormal
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    Deadline,
    DeviceSpeed,
    Ditto,
    FaultTolerance,
    FedNova,
    History,
    OverSelection,
    Participation,
    Partition,
    Scaffold,
)
from lightning_fed.errors import ClientError, ConfigurationError, RoundError
from lightning_fed.testing import ToyModule, toy_data
from tests.callbacks.rounds import EPOCHS, SIZES, WAYS, Stops, assert_equal, encoded, loaders, momentum, sgd
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier

SECONDS = [2.0, 0.5, 0.125, 1.0]
TOOK = [3 * size * EPOCHS * seconds for size, seconds in zip(SIZES, SECONDS, strict=True)]  # 72, 36, 16.5, 60


def trained(*callbacks: Any, rounds: int = 3, kind: Any = Classifier, optimizer: Any = sgd, **how: Any) -> Any:
    """The weights after some rounds, and what was logged."""
    module, history = kind(copy.deepcopy(encoded()), optimizer), History()
    ckpt_path, arguments = how.pop("ckpt_path", None), {"local_epochs": EPOCHS, "seed": 0, **QUIET, **how}
    data = [ClientData(loaders()), history, *callbacks]
    FederatedTrainer(max_rounds=rounds, callbacks=data, **arguments).fit(module, ckpt_path=ckpt_path)
    return module.net.state_dict(), history


def only(*cohorts: list[int]) -> Participation:
    return Participation(lambda round, clients, generator: cohorts[(round - 1) % len(cohorts)])


WAYS_AND_ONE = {"one by one": {}, "processes": WAYS["processes"], "vectorized": {"vectorize_clients": True}}


@pytest.mark.parametrize("how", WAYS_AND_ONE.values(), ids=WAYS_AND_ONE)
def test_who_is_late_has_no_part_in_the_round(how: dict[str, Any]):
    late = Deadline(40)
    new, history = trained(late, DeviceSpeed(SECONDS), **how)
    assert_equal(new, trained(only([1, 2]), **how)[0])
    assert history["time/virtual"] == [40, 80, 120]
    assert history["late/clients"] == [2, 2, 2]
    assert late.late == {0: TOOK[0], 3: TOOK[3]}


def test_a_round_in_which_nobody_is_late_lasts_as_long_as_its_slowest():
    new, history = trained(DeviceSpeed(SECONDS), Deadline(72))
    assert_equal(new, trained()[0])
    assert history["time/virtual"] == [72, 144, 216]
    assert history["late/clients"] == [0, 0, 0]


def test_what_travels_counts_with_all_that_methods_send():
    size = sum(tensor.nbytes for tensor in encoded().state_dict().values())
    bandwidth = 4 * size / 10.0  # with control variates each way ten seconds more
    for method, late in (([], 0), ([Scaffold()], 1)):
        _, history = trained(DeviceSpeed(SECONDS, bandwidth), Deadline(TOOK[0] + 5.1), *method, rounds=1)
        assert history["late/clients"] == [late]


def test_who_was_late_keeps_what_it_kept():
    def fit(*callbacks: Any) -> Any:
        return trained(*callbacks, optimizer=momentum, client_state="carry", rounds=4)[0]

    in_turn = lambda round, client: 1e6 if (round + client) % 2 else 1e-3  # noqa: E731
    assert_equal(fit(DeviceSpeed(in_turn), Deadline(60)), fit(only([1, 3], [0, 2])))


def test_nobody_in_time_is_an_error_that_says_by_how_much():
    said = r"(?s)Round 1: 0 of 4 clients meet Deadline\(2\), and 1 have to\. The fastest, client 2, takes 16\.5 s, half"
    with pytest.raises(RoundError, match=said + r".*48 s or more.*partial_work=True"):
        trained(DeviceSpeed(SECONDS), Deadline(2))
    with pytest.raises(RoundError, match=r"2 of 4 clients meet .* and 3 have to"):
        trained(DeviceSpeed(SECONDS), Deadline(40, min_clients=3))


def steps_of(deadline: float, **how: Any) -> dict[int, int]:
    """The batches that each client trains on in the last round."""
    seen: dict[int, int] = {}

    class Counts(Classifier):
        def on_train_start(self) -> None:
            seen[self.trainer.client_id] = 0

        def on_train_batch_end(self, *args: Any) -> None:
            seen[self.trainer.client_id] += 1

    trained(DeviceSpeed(SECONDS), Deadline(deadline, partial_work=True), kind=Counts, **how)
    return seen


def test_partial_work_is_as_many_steps_as_there_is_time_for():
    batches = [math.ceil(size / 4) * EPOCHS for size in SIZES]
    parts = [min(1.0, 40 / took) for took in TOOK]
    assert steps_of(40) == {i: math.floor(parts[i] * batches[i]) for i in range(4)} == {0: 2, 1: 6, 2: 12, 3: 4}
    assert steps_of(1) == dict.fromkeys(range(4), 1)
    assert steps_of(1e6) == dict(enumerate(batches))


def test_partial_work_counts_optimizer_steps_with_local_steps():
    seen: dict[int, int] = {}

    class Counts(Classifier):
        def on_train_end(self) -> None:
            seen[self.trainer.client_id] = self.trainer.global_step - 8 * (self.trainer.current_round - 1)

    speed = DeviceSpeed([2.0, 0.5, 0.125, 1.0], batch_size=4, examples=[1, 1, 1, 1])
    how = {"local_steps": 8, "local_epochs": None, "accumulate_grad_batches": 2}
    trained(speed, Deadline(96, partial_work=True), kind=Counts, rounds=1, **how)
    assert seen == {0: 4, 1: 8, 2: 8, 3: 8}


def test_partial_work_leaves_accumulated_batches_together():
    assert steps_of(40, accumulate_grad_batches=2) == {0: 2, 1: 6, 2: 12, 3: 3}
    assert steps_of(55, accumulate_grad_batches=2) == {0: 2, 1: 6, 2: 12, 3: 5}


def test_fednova_makes_partial_work_right_and_a_round_lasts_as_long_as_the_deadline():
    new, history = trained(DeviceSpeed(SECONDS), Deadline(40, partial_work=True), FedNova(), rounds=2)
    assert history["time/virtual"] == [40, 80]
    assert history["late/clients"] == [0, 0]
    again = trained(DeviceSpeed(SECONDS), Deadline(40, partial_work=True), FedNova(), rounds=2, **WAYS["processes"])
    assert_equal(again[0], new)


def test_who_cannot_even_be_sent_the_weights_is_late():
    speed = DeviceSpeed(SECONDS, [1e9, 1.0, 1e9, 1e9])
    _, history = trained(speed, Deadline(40, partial_work=True), rounds=1)
    assert history["late/clients"] == [1]


def test_partial_work_on_a_loader_without_length_is_refused():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(toy_data(8))

    callbacks = [
        ClientData([DataLoader(Endless(), batch_size=2)] * 2),
        DeviceSpeed(1.0, examples=[8, 8]),
        Deadline(5, partial_work=True),
    ]
    with pytest.raises(ClientError, match="loader without length"):
        FederatedTrainer(max_rounds=1, callbacks=callbacks, **QUIET).fit(ToyModule())


@pytest.mark.parametrize("hook", ["on_round_start", "on_client_end", "on_round_end"])
@pytest.mark.parametrize("partial_work", [False, True])
def test_a_run_that_was_broken_off_goes_on_the_same(tmp_path: Path, hook: str, partial_work: bool):
    def fit(*callbacks: Any, **how: Any) -> Any:
        speed = DeviceSpeed(HalfNormal(1.0), every_round=True)
        new, history = trained(speed, Deadline(30, partial_work=partial_work), FaultTolerance(), *callbacks, **how)
        return new, history["time/virtual"], history["late/clients"]

    whole = fit()
    with pytest.raises(RuntimeError, match="stopped"):
        fit(Stops(hook), OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    again = fit(ckpt_path=str(tmp_path / "on_exception.ckpt"))
    assert_equal(again[0], whole[0])
    assert again[1:] == whole[1:]


@pytest.mark.parametrize("how", WAYS_AND_ONE.values(), ids=WAYS_AND_ONE)
def test_over_selection_takes_those_who_are_first(how: dict[str, Any]):
    over = OverSelection(fraction_train=0.5, factor=2)
    assert over.sample("train", 1, 4, 0) == [0, 1, 2, 3]
    new, history = trained(over, DeviceSpeed(SECONDS), **how)
    assert_equal(new, trained(only([1, 2]), **how)[0])
    assert history["time/virtual"] == [36, 72, 108]
    assert over.late == {0: TOOK[0], 3: TOOK[3]}


def test_over_selection_asks_a_third_more():
    over = OverSelection(fraction_train=0.1)
    assert [len(over.sample("train", round, 100, 0)) for round in (1, 2)] == [13, 13]
    assert over.sample("train", 1, 100, 0) != over.sample("train", 2, 100, 0)
    assert (over.size("train", 100), over.size("evaluate", 100), len(over.sample("evaluate", 1, 100, 0))) == (
        10,
        100,
        100,
    )
    _, history = trained(DeviceSpeed(SECONDS), OverSelection(fraction_train=0.5, factor=1.5))
    assert history["late/clients"] == [1, 1, 1]


@pytest.mark.parametrize("order", [1, -1], ids=["the deadline first", "over-selection first"])
def test_over_selection_with_a_deadline_takes_those_who_are_first_until_then(order: int):
    def logged(seconds: float, factor: float, **how: Any) -> tuple[list[float], list[float]]:
        both = [Deadline(seconds, **how), OverSelection(fraction_train=0.5, factor=factor)][::order]
        _, history = trained(*both, DeviceSpeed(SECONDS), rounds=2)
        return history["late/clients"], history["time/virtual"]

    assert logged(40, factor=2) == ([2, 2], [36, 72])  # enough are there before it
    assert logged(20, factor=2) == ([3, 3], [20, 40])
    assert logged(100, factor=2) == ([2, 2], [36, 72])
    assert logged(30, factor=2, partial_work=True) == ([2, 2], [30, 60])


def test_the_example_count_that_is_planned_with_is_said_where_it_is_not_what_came():
    plan = [DeviceSpeed(SECONDS, examples=[6, 12, 22, 11]), Deadline(500)]
    with pytest.warns(UserWarning, match="client 3 trained on 10 examples .* goes by 11"):
        trained(*plan, rounds=1)


def test_with_a_datamodule_and_lightning_s_defaults(tmp_path: Path):
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(toy_data(60), batch_size=4, shuffle=True)

        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader(toy_data(8), batch_size=4)

    speed, over = DeviceSpeed(HalfNormal(0.1), 1e4), OverSelection(0.2, min_train_clients=2)
    callbacks = [Partition(10, val_fraction=0.2), speed, over, Deadline(60, partial_work=True)]
    trainer = FederatedTrainer(max_rounds=3, callbacks=callbacks, default_root_dir=tmp_path)
    trainer.fit(ToyModule(), datamodule=Data())
    assert trainer.callback_metrics["late/clients"] >= 0
    assert 0 < trainer.callback_metrics["time/virtual"] <= 180
    assert trainer.checkpoint_callback.best_model_path


REFUSED = {
    "no time": (lambda: Deadline(0), "seconds=0 must be"),
    "nobody": (lambda: Deadline(1, min_clients=0), "min_clients=0 must be a whole number"),
    "no switch": (lambda: Deadline(1, partial_work="yes"), "partial_work='yes': write True or False"),
    "fewer than needed": (lambda: OverSelection(factor=0.5), r"OverSelection\(factor=0.5\) must be"),
    "no fraction": (lambda: OverSelection(2.0), "fraction_train=2.0"),
    "a second fit": (lambda: trained(Deadline(5, 1, True), DeviceSpeed(1), Ditto()), "clients train a second model"),
    "a pass before": (
        lambda: trained(Deadline(5, 1, True), DeviceSpeed(1), Scaffold(option="I")),
        "pass over their data before",
    ),
    "more than there are": (
        lambda: trained(Deadline(500, min_clients=5), DeviceSpeed(SECONDS)),
        r"Round 1: Deadline\(500, min_clients=5\) asks for more clients than take part: 4. Lower min_clients",
    ),
    "no plan": (lambda: DeviceSpeed(1).planned(1, 0), r"planned\(1, 0\) is known once plan\(trainer\) has been called"),
    "no clock": (lambda: trained(Deadline(5)), "Deadline goes by a virtual clock, and there is none"),
    "a list of other clients": (
        lambda: trained(Deadline(5), DeviceSpeed(1, examples=[1, 2])),
        "examples= has 2 numbers, and there are 4",
    ),
    "half an example": (lambda: trained(Deadline(5), DeviceSpeed(1, examples=lambda k: 0.5)), "is 0.5 for client 0"),
    "words": (lambda: DeviceSpeed(1, examples="many"), "examples='many' must be"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_used_is_refused(what: str):
    call, rule = REFUSED[what]
    with pytest.raises((ConfigurationError, RoundError), match=rule):
        call()
