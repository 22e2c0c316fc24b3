"""Schedules whose functions ask the trainer what time it is: at each step they are told when that step would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData
from lightning_fed.client.local import schedules
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET, sweep
from tests.integration.schedules.runs import (
    BATCHES,
    Seen,
    Stream,
    federated,
    from_round,
    loader,
    long_fit,
    rates,
    when_and_what,
)


class OwnScheduler(lr_scheduler.LRScheduler):
    """Closed form, of what the trainer says."""

    def __init__(self, optimizer: Any, module: Any) -> None:
        self.module = module
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        late = self.module.trainer.global_step + self.module.trainer.current_epoch
        return [base / (1 + late) ** 0.5 for base in self.base_lrs]


# What makes a schedule that asks; of a leap only the last step counts, the second and fourth depend on each.
ASKING: dict[str, Callable[[Any, Any], Any]] = {
    "a leap": lambda opt, module: lr_scheduler.LambdaLR(
        opt, lambda n: 0.97**module.trainer.global_step * 0.9**module.current_epoch
    ),
    "each step": lambda opt, module: lr_scheduler.MultiplicativeLR(
        opt, lambda n: 1 / (1 + 0.01 * module.trainer.global_step + 0.1 * module.current_epoch)
    ),
    "its own": OwnScheduler,
    "in another": lambda opt, module: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.ConstantLR(opt, 0.5, 2), lr_scheduler.LambdaLR(opt, lambda n: 0.9**module.trainer.global_step)],
        milestones=[2],
    ),
}


class Asks(ToyModule):
    """A schedule that asks the trainer."""

    def __init__(self, kind: str, interval: str = "epoch", frequency: int = 1) -> None:
        super().__init__()
        self.kind, self.config = kind, {"interval": interval, "frequency": frequency}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = ASKING[self.kind](optimizer, self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.config}}


# Each kind once, and each interval with and without a frequency.
FEW = [("a leap", 3, "epoch"), ("each step", 1, "epoch"), ("each step", 2, "step"), ("its own", 1, "step")]
FEW += [("in another", 1, "step")]
FREQUENCIES = [*((kind, n) for kind in ASKING for n in (1, 2, 3)), ("a leap", 7)]


@pytest.mark.parametrize(
    ("kind", "frequency", "interval"), sweep([(*each, i) for each in FREQUENCIES for i in ("epoch", "step")], FEW)
)
def test_a_schedule_that_asks_is_told_when_its_step_would_be(kind: str, interval: str, frequency: int) -> None:
    def build() -> Asks:
        return Asks(kind, interval, frequency)

    expected = when_and_what(long_fit(build, epochs=9))
    assert when_and_what(federated(build, 9, late=4)) == from_round(expected, 4, BATCHES)
    assert when_and_what(federated(build, 3, late=2, local_epochs=3)) == from_round(expected, 4, BATCHES)


@pytest.mark.parametrize(
    ("kind", "interval", "frequency"),
    sweep(
        [(kind, *when) for kind in ASKING for when in (("epoch", 1), ("step", 1), ("step", 2))],
        [("a leap", "epoch", 1), ("each step", "step", 2), ("its own", "step", 1)],
    ),
)
def test_accumulated_batches_are_one_step_of_the_clock(kind: str, interval: str, frequency: int) -> None:
    def build() -> Asks:
        return Asks(kind, interval, frequency)

    expected = when_and_what(long_fit(build, epochs=4, accumulate_grad_batches=2))
    assert when_and_what(federated(build, 4, accumulate_grad_batches=2)) == expected
    changing = [GradientAccumulationScheduler({0: 1, 1: 3, 3: 2})]
    expected = when_and_what(long_fit(build, epochs=5, callbacks=changing))
    assert when_and_what(federated(build, 5, client_callbacks=changing)) == expected


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("kind", sweep(ASKING, ["each step"]))
def test_local_steps_that_end_within_an_epoch_tell_the_time(kind: str, interval: str) -> None:
    def build() -> Asks:
        return Asks(kind, interval)

    # A round begins its data anew, so that within it current_epoch is another; where it begins all is as in the fit.
    expected = rates(long_fit(build, steps=5 * 3))[2 * 3 :: 3]
    assert rates(federated(build, 5, local_steps=3))[2 * 3 :: 3] == expected


@pytest.mark.parametrize("kind", sweep(ASKING, ["each step"]))
def test_a_loader_without_length_tells_the_time_by_local_steps(kind: str) -> None:
    seen = federated(lambda: Asks(kind, "step"), 3, DataLoader(Stream(), 8), local_steps=2)
    # An epoch is two batches, but nobody knows: then current_epoch counts rounds.
    expected = rates(long_fit(lambda: Asks(kind, "step"), steps=6, data=loader(2)))
    assert rates(seen) == pytest.approx(expected)


class AsksByHand(Asks):
    """The same, stepped in manual optimization; two optimizer steps a batch."""

    def __init__(self, kind: str, at_epoch_end: bool) -> None:
        super().__init__(kind)
        self.automatic_optimization, self.at_epoch_end = False, at_epoch_end

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            self.optimizers().step()
        if not self.at_epoch_end:
            self.lr_schedulers().step()

    def on_train_epoch_end(self) -> None:
        if self.at_epoch_end:
            self.lr_schedulers().step()


@pytest.mark.parametrize("at_epoch_end", [True, False])
@pytest.mark.parametrize("kind", sweep(ASKING, ["each step"]))
def test_a_schedule_stepped_by_hand_is_told_the_time(kind: str, at_epoch_end: bool) -> None:
    def build() -> AsksByHand:
        return AsksByHand(kind, at_epoch_end)

    expected = rates(long_fit(build, epochs=6))
    assert rates(federated(build, 3, local_epochs=2)) == pytest.approx(expected)
    assert rates(federated(build, 6, late=4))[-3 * BATCHES :] == pytest.approx(from_round(expected, 4, BATCHES))


@pytest.mark.parametrize("kind", sweep(ASKING, ["each step"]))
def test_unequal_clients_are_each_told_their_own_time(kind: str) -> None:
    def build() -> Asks:
        return Asks(kind, "step")

    seen = Seen()
    clients = [loader(2), loader(7)]
    trainer = FederatedTrainer(max_rounds=3, callbacks=[ClientData(clients)], client_callbacks=[seen], **QUIET)
    trainer.fit(build())
    found = when_and_what(seen.seen)
    for client, own in enumerate(clients):
        expected = when_and_what(long_fit(build, epochs=3, data=own))
        before = sum(len(other) for other in clients[:client])
        rounds = [found[9 * round + before :][: len(own)] for round in range(3)]
        assert [what for round in rounds for what in round] == expected


def test_clients_trained_as_one_are_told_the_time() -> None:
    def weights(**options: Any) -> Any:
        torch.manual_seed(0)
        module = Asks("each step", "step")
        clients = ClientData([loader(5), DataLoader(toy_data(37), 8)])
        FederatedTrainer(max_rounds=3, callbacks=[clients], **QUIET, **options).fit(module)
        return module.state_dict()

    torch.testing.assert_close(weights(vectorize_clients="require"), weights())


def test_a_schedule_that_only_counts_still_leaps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setitem(
        ASKING, "counts", lambda opt, module: lr_scheduler.LambdaLR(opt, lambda n: asked.append(n) or 1.0)
    )
    steps = schedules._step
    times: list[int] = []
    monkeypatch.setattr(schedules, "_step", lambda schedule, n: (times.append(n), steps(schedule, n)))
    federated(lambda: Asks("counts", "step"), 6, late=6)
    assert times[-1] == 5 * BATCHES
    assert len(asked) < 8 * BATCHES
