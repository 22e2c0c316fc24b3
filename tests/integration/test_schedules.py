"""A client's schedules stand where one long local fit of a plain Trainer would be, in every round it takes part in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import ClientData, FaultTolerance, History, Partition
from lightning_fed.callbacks.base import CohortOwner
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

BATCHES = 5
PLAIN = {**QUIET, "limit_val_batches": 0}

# All of torch's that a schedule of its own moves; each over a horizon that the tests cross or not.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda n: 1 / (1 + n)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda n: 0.9 + 0.01 * (n % 3)),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3, 3, 8], gamma=0.3),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.3, total_iters=3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.2, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.7),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=7, power=1.5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=4, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=2, T_mult=2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.5, step_size_up=3, mode="triangular2"),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.5, total_steps=200),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(opt, T_max=20)],
        milestones=[2],
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)], optimizer=opt
    ),
}


class Scheduled(ToyModule):
    """Two groups with options of their own, and one schedule."""

    def __init__(self, scheduler: str, interval: str = "epoch", frequency: int = 1) -> None:
        super().__init__()
        self.scheduler, self.interval, self.frequency = scheduler, interval, frequency

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.2}, {"params": self.net[2].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[self.scheduler](optimizer)
        config = {"scheduler": scheduler, "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Seen(Callback):
    """Notes at each batch when it is, and all options of all optimizers."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        options = [
            {key: value for key, value in group.items() if key != "params"}
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]
        when = getattr(trainer, "current_round", 1), trainer.current_epoch
        # What is asked for has to be known: where the module steps by hand that takes a second fit.
        step = trainer.global_step if pl_module.automatic_optimization else None
        self.seen.append((*when, step, options))

    def __deepcopy__(self, memo: Any) -> Seen:
        return self  # also the clients' copies note it here


class FromRound(CohortOwner):
    """Client 0 trains until a round, and client 1 from it on."""

    def __init__(self, round: int) -> None:
        super().__init__()
        self.round = round

    def sample(self, stage: Any, round: int, num_clients: int, seed: int) -> list[int]:
        return [int(round >= self.round)]


def loader(batches: int = BATCHES) -> DataLoader:
    return DataLoader(toy_data(8 * batches), 8)


def built(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build()


def long_fit(
    build: Callable[[], Any], epochs: int = -1, steps: int = -1, data: Any = None, **options: Any
) -> list[Any]:
    """What a plain Trainer sees at each batch: (1, epoch, global step, options)."""
    seen = Seen()
    callbacks = [seen, *options.pop("callbacks", ())]
    trainer = L.Trainer(max_epochs=epochs, max_steps=steps, callbacks=callbacks, **{**PLAIN, **options})
    trainer.fit(built(build), loader() if data is None else data)
    return seen.seen


def federated(
    build: Callable[[], Any],
    rounds: int,
    data: Any = None,
    late: int | None = None,
    callbacks: Any = (),
    **options: Any,
) -> list[Any]:
    """What a client sees at each batch, of the only one, or of one that takes part from round ``late`` on."""
    seen = Seen()
    data = loader() if data is None else data
    clients, more = [data], list(callbacks)
    if late is not None:
        clients, more = [loader(2), data], [FromRound(late), *more]
    client_callbacks = [seen, *options.pop("client_callbacks", ())]
    trainer = FederatedTrainer(
        max_rounds=rounds, callbacks=[ClientData(clients), *more], client_callbacks=client_callbacks, **QUIET, **options
    )
    trainer.fit(built(build))
    return [what for what in seen.seen if late is None or what[0] >= late]


def from_round(seen: list[Any], round: int, batches: int) -> list[Any]:
    return seen[(round - 1) * batches :]


def when_and_what(seen: list[Any]) -> list[Any]:
    """Without the round's number."""
    return [what[1:] for what in seen]


# ------------------------------------------------------------------------------------------------ every scheduler


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_stands_where_one_long_fit_would_be(name: str, interval: str) -> None:
    def build() -> Scheduled:
        return Scheduled(name, interval)

    expected = when_and_what(long_fit(build, epochs=6))
    assert when_and_what(federated(build, 3, local_epochs=2)) == expected
    assert when_and_what(federated(build, 6, late=4)) == from_round(expected, 4, BATCHES)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_carried_on_with_the_client(name: str) -> None:
    def build() -> Scheduled:
        return Scheduled(name, "step")

    expected = when_and_what(long_fit(build, epochs=4))
    assert when_and_what(federated(build, 2, local_epochs=2, client_state="carry")) == expected


@pytest.mark.parametrize("frequency", [2, 3, 7])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ["StepLR", "LambdaLR"])
def test_a_frequency_is_lightnings(name: str, interval: str, frequency: int) -> None:
    def build() -> Scheduled:
        return Scheduled(name, interval, frequency)

    expected = when_and_what(long_fit(build, epochs=9))
    assert when_and_what(federated(build, 9, late=4)) == from_round(expected, 4, BATCHES)
    assert when_and_what(federated(build, 3, late=2, local_epochs=3)) == from_round(expected, 4, BATCHES)


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("every", [2, 3])
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
@pytest.mark.parametrize("name", ["StepLR", "MultiplicativeLR", "SequentialLR"])
def test_a_warning_that_is_given_once_is_given_once_with_schedules_too(name: str, late: int | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        federated(lambda: Warns(name, "step"), 5, late=late)
    said = [str(warning.message) for warning in caught]
    assert said.count("a word of the user's own") == 1
    assert not [what for what in said if "lr_scheduler.step" in what]


# ------------------------------------------------------------------------------------------------ local steps


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "LambdaLR"])
def test_whole_epochs_of_local_steps_are_those_of_one_long_fit(name: str, interval: str) -> None:
    def build() -> Scheduled:
        return Scheduled(name, interval)

    expected = when_and_what(long_fit(build, steps=6 * BATCHES))
    assert when_and_what(federated(build, 3, local_steps=2 * BATCHES)) == expected
    assert when_and_what(federated(build, 3, local_steps=2 * BATCHES, late=2)) == from_round(expected, 3, BATCHES)


@pytest.mark.parametrize("steps", [1, 3, 7, 13])
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


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(toy_data(16))


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


# ------------------------------------------------------------------------------------------------ manual optimization


class ByHand(ToyModule):
    """Manual optimization; ``when(module, batch_idx)`` says when its schedule is stepped."""

    def __init__(self, when: Callable[[Any, int], bool], at_epoch_end: bool = False, config: Any = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.when, self.at_epoch_end, self.config = when, at_epoch_end, config or {}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()
        if not self.at_epoch_end and self.when(self, batch_idx):
            self.lr_schedulers().step()

    def on_train_epoch_end(self) -> None:
        if self.at_epoch_end and self.when(self, 0):
            self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.9), **self.config}]


def rates(seen: list[Any]) -> list[float]:
    return [what[-1][0]["lr"] for what in seen]


HANDS: dict[str, Callable[[], ByHand]] = {
    "each batch": lambda: ByHand(lambda module, i: True),
    "each batch, declared": lambda: ByHand(lambda module, i: True, config={"interval": "step"}),
    "every second batch": lambda: ByHand(lambda module, i: i % 2 == 1),
    "every second batch, declared": lambda: ByHand(
        lambda module, i: i % 2 == 1, config={"interval": "step", "frequency": 2}
    ),
    "last batch": lambda: ByHand(lambda module, i: module.trainer.is_last_batch),
    "each epoch": lambda: ByHand(lambda module, i: True, at_epoch_end=True),
    "every second epoch, declared": lambda: ByHand(
        lambda module, i: module.current_epoch % 2 == 1, at_epoch_end=True, config={"frequency": 2}
    ),
    "each batch, in a word of its own": lambda: ByHand(lambda module, i: True, config={"interval": "batch"}),
    "each batch, but declared otherwise": lambda: ByHand(
        lambda module, i: True, config={"interval": "step", "frequency": 5}
    ),
}


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


# ------------------------------------------------------------------------------------------------ kept objects


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


@pytest.mark.parametrize("client_state", ["global", "carry", "reset"])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "Adagrad", "new scheduler"])
def test_optimizers_that_a_module_keeps_are_fresh_in_every_local_fit(kind: str, client_state: Any) -> None:
    kept, made = (trained(lambda cls=cls: cls(kind), client_state=client_state) for cls in (Keeps, Makes))
    torch.testing.assert_close(kept, made, rtol=0, atol=0)


def test_optimizers_that_a_module_keeps_are_the_same_on_processes() -> None:
    kept = trained(lambda: Keeps("Adam"))
    torch.testing.assert_close(trained(lambda: Keeps("Adam"), engine=Processes(2)), kept, rtol=0, atol=0)


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


# ------------------------------------------------------------------------------------------------ before round 1


class Wrong(ToyModule):
    """A module whose ``configure_optimizers`` gives ``what(optimizer)``."""

    def __init__(self, what: Callable[[Any], Any], needs_data: bool = False) -> None:
        super().__init__()
        self.what, self.needs_data = what, needs_data

    def configure_optimizers(self) -> Any:
        if self.needs_data:
            assert self.trainer.estimated_stepping_batches == 2 * 3
        return self.what(torch.optim.SGD(self.parameters(), lr=0.1))


def step_lr(optimizer: Any) -> Any:
    return lr_scheduler.StepLR(optimizer, 1)


def plateau(optimizer: Any, **options: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, **options)


FAULTS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "unknown interval": (
        lambda opt: [[opt], [{"scheduler": step_lr(opt), "interval": "batch"}]],
        MisconfigurationException,
        'must be "step" or "epoch" but is "batch"',
    ),
    "no monitor": (lambda opt: [[opt], [plateau(opt)]], MisconfigurationException, "must include a monitor"),
    "no scheduler": (
        lambda opt: {"optimizer": opt, "lr_scheduler": {"interval": "step"}},
        MisconfigurationException,
        'must have the key "scheduler"',
    ),
    "a number": (lambda opt: 3, MisconfigurationException, "Unknown configuration for model optimizers"),
    "several optimizers": (lambda opt: [opt, opt], RuntimeError, "only supported with manual optimization"),
    "the user's own": (lambda opt: opt.no_such_thing, AttributeError, "no_such_thing"),
}


@pytest.mark.parametrize("needs_data", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_configure_optimizers_are_raised_before_round_1_as_in_lightning(fault: str, needs_data: bool) -> None:
    what, error, match = FAULTS[fault]
    with pytest.raises(error, match=match) as plain:
        L.Trainer(max_epochs=1, **PLAIN).fit(Wrong(what), loader())
    history = History()
    trainer = FederatedTrainer(max_rounds=2, callbacks=[ClientData([loader(3)]), FaultTolerance(1), history], **QUIET)
    with pytest.raises(error, match=match) as ours:
        trainer.fit(Wrong(what, needs_data))
    assert type(ours.value) is type(plain.value)
    assert str(ours.value) == str(plain.value)
    assert history.rows == []
    assert trainer.global_step == 0


class NoOptimizers(L.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None: ...


class NoStep(L.LightningModule):
    def configure_optimizers(self) -> None: ...


@pytest.mark.parametrize(
    ("build", "options", "match"),
    [
        (NoOptimizers, {}, r"No `configure_optimizers\(\)` method defined"),
        (NoStep, {}, r"No `training_step\(\)` method defined"),
        (HANDS["each batch"], {"gradient_clip_val": 1.0}, "gradient clipping is not supported for manual optimization"),
        (HANDS["each batch"], {"accumulate_grad_batches": 2}, "accumulation is not supported for manual optimization"),
    ],
)
def test_what_a_plain_trainer_refuses_of_a_module_is_refused_before_round_1(
    build: Any, options: Any, match: str
) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        L.Trainer(max_epochs=1, **PLAIN, **options).fit(build(), loader())
    history = History()
    trainer = FederatedTrainer(max_rounds=2, callbacks=[ClientData([loader()]), history], **QUIET, **options)
    with pytest.raises(MisconfigurationException, match=match):
        trainer.fit(build())
    assert history.rows == []


def test_a_look_at_configure_optimizers_opens_no_data_that_it_does_not_ask_for() -> None:
    opened: list[int] = []

    def data(client: int) -> DataLoader:
        opened.append(client)
        return loader(3)

    for needs_data in (False, True):
        opened.clear()
        trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(data, 2)], engine=Processes(1), **QUIET)
        trainer.fit(Wrong(lambda opt: opt, needs_data=False))
        trainer = FederatedTrainer(max_rounds=2, callbacks=[ClientData(data, 2)], engine=Processes(1), **QUIET)
        if needs_data:
            trainer.fit(Wrong(lambda opt: opt, needs_data=True))
        assert opened == ([0] if needs_data else [])


def test_a_look_at_configure_optimizers_leaves_no_trace() -> None:
    seen_before = []

    class Traces(ToyModule):
        def configure_optimizers(self) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            seen_before.append(self.calls)
            with torch.no_grad():
                self.net[0].weight.mul_(1 + 0.01 * torch.rand(()))
            return super().configure_optimizers()

    module = built(Traces)
    before = torch.get_rng_state()
    FederatedTrainer(max_rounds=1, num_clients=2, **QUIET).fit(module, loader())
    assert seen_before == [1, 1, 1]
    assert torch.equal(torch.get_rng_state(), before)
    assert not hasattr(module, "calls")

    class Alone(Traces):
        pass

    one = built(Alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_fed.client.local.look_ahead.LookAhead.look", lambda self: None)
        FederatedTrainer(max_rounds=1, num_clients=2, **QUIET).fit(one, loader())
    torch.testing.assert_close(dict(one.state_dict()), dict(module.state_dict()), rtol=0, atol=0)


class Watches(ToyModule):
    """A ReduceLROnPlateau that watches what ``logs`` logs, or does not."""

    def __init__(self, logs: str = "train_loss", strict: bool = True, interval: str = "epoch", **options: Any) -> None:
        super().__init__()
        self.logs, self.options = logs, {"patience": 0, "factor": 0.5, **options}
        self.config = {"strict": strict, "interval": interval, "monitor": "watched"}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.logs == "train" or (self.logs == "late" and batch_idx == BATCHES - 1):
            self.log("watched", 1.0)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.logs == "validation":
            self.log("watched", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, **self.options)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.config}}


def watching(logs: str, rounds: int = 2, strict: bool = True, interval: str = "epoch", **options: Any) -> Any:
    seen, history = Seen(), History()
    callbacks = [Partition(1, val_fraction=0.2), FaultTolerance(1), history]
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=callbacks, client_callbacks=[seen], **{**QUIET, **options})
    try:
        trainer.fit(built(lambda: Watches(logs, strict, interval)), DataLoader(toy_data(50), 8))
    except Exception:
        assert history.rows == []
        raise
    return rates(seen.seen)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("logs", ["train", "nothing"])
def test_a_plateau_has_no_place_in_the_global_round(logs: str, strict: bool) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"configure_optimizers gives a ReduceLROnPlateau.*no schedule.*FederatedTrainer\(client_state='carry'\)",
    ):
        watching(logs, strict=strict)


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("logs", ["nothing", "validation"])
@pytest.mark.parametrize("client_state", ["carry", "reset"])
@pytest.mark.filterwarnings("ignore:client_state='reset' begins schedules anew")
def test_a_plateau_that_cannot_see_its_metric_is_refused_before_round_1(
    logs: str, strict: bool, client_state: Any, interval: str
) -> None:
    match = r"A client has a ReduceLROnPlateau that monitors 'watched', which.*local_validation=True"
    with pytest.raises(ConfigurationError, match=match):
        watching(logs, strict=strict, client_state=client_state, interval=interval)


@pytest.mark.parametrize(("logs", "options"), [("train", {}), ("late", {}), ("validation", {"local_validation": True})])
@pytest.mark.parametrize("strict", [True, False])
def test_a_plateau_that_sees_its_metric_goes_on_with_the_client(logs: str, options: Any, strict: bool) -> None:
    seen = watching(logs, rounds=4, strict=strict, client_state="carry", **options)
    assert seen[-4 * BATCHES :: BATCHES] == [0.1, 0.1, 0.05, 0.025]


def test_a_metric_that_is_missing_in_a_later_round_is_an_error_of_its_client() -> None:
    class Forgets(Watches):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.logs = "train" if self.trainer.current_round == 1 else "nothing"
            return super().training_step(batch, batch_idx)

    with pytest.raises(ClientError, match=r"Round 2, train: client 0 has a ReduceLROnPlateau that monitors 'watched'"):
        federated(Forgets, 3, client_state="carry")


def test_a_plateau_fits_into_one_round() -> None:
    assert watching("train", rounds=1, local_epochs=3)[::BATCHES] == [0.1, 0.1, 0.05]
    with pytest.raises(ConfigurationError, match="monitors 'watched'"):
        watching("nothing", rounds=1, local_epochs=3)


class PlateauByHand(ByHand):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [lr_scheduler.ReduceLROnPlateau(optimizer)]


def test_a_plateau_stepped_by_hand_has_no_place_either() -> None:
    with pytest.raises(ConfigurationError, match=r"a ReduceLROnPlateau.*client_state='carry'"):
        federated(lambda: PlateauByHand(lambda module, i: False), 2)


# ------------------------------------------------------------------------------------------------ client_state="reset"


def warned(build: Callable[[], Any], **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        federated(build, **{"rounds": 3, "client_state": "reset", **options})
    return [str(one.message) for one in caught if "client_state='reset'" in str(one.message)]


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


@pytest.mark.parametrize(("local_epochs", "still"), [(1, True), (3, True), (4, False)])
def test_with_reset_a_plateau_that_never_reduces_is_said(local_epochs: int, still: bool) -> None:
    said = warned(lambda: Watches("train", patience=1), local_epochs=local_epochs)
    assert len(said) == still
    seen = federated(lambda: Watches("train", patience=1), 1, client_state="reset", local_epochs=local_epochs)
    assert (len(set(rates(seen))) == 1) == still


# ------------------------------------------------------------------------------------------------ the time of a fit


def test_global_step_and_max_steps_are_those_of_the_run() -> None:
    seen: list[Any] = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((trainer.current_round, trainer.global_step, pl_module.global_step, trainer.max_steps))

    federated(ToyModule, 3, local_steps=2, client_callbacks=[Looks()])
    assert seen == [(round, step, step, 6) for step, round in enumerate((1, 1, 2, 2, 3, 3))]
    seen.clear()
    federated(ToyModule, 2, client_callbacks=[Looks()], accumulate_grad_batches=2)
    assert seen == [(1, n, n, -1) for n in (0, 0, 1, 1, 2)] + [(2, n, n, -1) for n in (3, 3, 4, 4, 5)]
    seen.clear()
    federated(ToyModule, 2, DataLoader(Stream(), 8), client_callbacks=[Looks()])  # nothing tells: within the round
    assert seen == [(round, step, step, -1) for round in (1, 2) for step in (0, 1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(0, 5), (1, 10), (2, 15)]),
        ({"local_epochs": 2}, [(1, 10), (3, 20), (5, 30)]),
        ({"local_steps": 2 * BATCHES}, [(1, 10), (3, 20), (5, 30)]),
        ({"local_steps": 3}, [(0, 3), (1, 6), (1, 9)]),
        ({"limit_train_batches": 2}, [(0, 2), (1, 4), (2, 6)]),
        ({"accumulate_grad_batches": 2}, [(0, 3), (1, 6), (2, 9)]),
    ],
)
def test_an_evaluation_tells_the_time_at_its_rounds_end(options: Any, expected: Any) -> None:
    seen: list[Any] = []

    class Looks(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append((trainer.current_epoch, trainer.global_step))

    clients = ClientData([(loader(), loader(1))])
    trainer = FederatedTrainer(max_rounds=3, callbacks=[clients], client_callbacks=[Looks()], **QUIET, **options)
    trainer.fit(built(ToyModule))
    assert seen == expected


@pytest.mark.parametrize("vectorize", [False, 2])
def test_clients_that_are_evaluated_as_one_have_no_global_step_in_common(vectorize: Any) -> None:
    class LogsStep(ToyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("step", float(self.global_step))

    history = History(per_client=True)
    clients = ClientData([(loader(batches), loader(1)) for batches in (2, 2, 3)])
    options = {"callbacks": [clients, history], "vectorize_clients": vectorize, **QUIET}
    with (
        pytest.warns(UserWarning, match="clients evaluate one after the other.*global_step")
        if vectorize
        else nullcontext()
    ):
        FederatedTrainer(max_rounds=2, **options).fit(built(LogsStep))
    assert [row["step"] for row in history.clients if row["stage"] == "evaluate"] == [2, 2, 3, 4, 4, 6]


class WarmsUp(ToyModule):
    """A warm-up over global steps, as Lightning's documentation writes it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 8:
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, (self.trainer.global_step + 1) / 8) * 0.1


@pytest.mark.parametrize("options", [{}, {"local_steps": BATCHES}, {"client_state": "carry"}])
def test_a_warm_up_over_global_steps_does_not_begin_anew(options: Any) -> None:
    expected = when_and_what(long_fit(WarmsUp, epochs=4))
    seen = when_and_what(federated(WarmsUp, 4, **options))
    # The optimizer is new in each round, so it begins with the rate that the module gives it.
    own = [i for i in range(len(seen)) if i % BATCHES] if "client_state" not in options else range(len(seen))
    assert [seen[i] for i in own] == [expected[i] for i in own]


def test_lightnings_own_loops_stop_where_they_did() -> None:
    for options, batches in (({"local_steps": 7}, 7), ({"local_epochs": 2}, 2 * BATCHES)):
        seen = federated(ToyModule, 3, **options)
        assert [sum(what[0] == round for what in seen) for round in (1, 2, 3)] == [batches] * 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"local_epochs": 2}, 6 * BATCHES),
        ({"local_epochs": 2, "client_state": "carry"}, 6 * BATCHES),
        ({"local_epochs": 2, "client_state": "reset"}, 2 * BATCHES),
        ({"local_steps": 7}, 21),
        ({"local_steps": 7, "client_state": "reset"}, 7),
    ],
)
def test_estimated_stepping_batches_are_those_that_a_schedule_runs_over(options: Any, expected: int) -> None:
    seen: list[Any] = []

    class Asks(ToyModule):
        def configure_optimizers(self) -> Any:
            seen.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    federated(Asks, 3, **options)
    assert set(seen) == {expected}


def test_an_unlimited_run_has_no_end_that_a_schedule_could_know() -> None:
    seen: list[Any] = []

    class Asks(ToyModule):
        def on_train_start(self) -> None:
            seen.append((self.trainer.estimated_stepping_batches, self.trainer.max_steps, self.trainer.max_epochs))

    class Stops(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    federated(Asks, -1, callbacks=[Stops()], local_steps=3)
    assert seen == [(math.inf, -1, -1)] * 2
