"""Local epochs that change from round to round: counters, schedules and limits are those of one long local fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, PartialParticipation, Partition
from lightning_fed.client.local.elapsed import Plan
from lightning_fed.engines import Processes
from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.weights import Weights, read
from tests.helpers import QUIET, class_sorted, pooled, sweep
from tests.integration.schedules.runs import (
    BATCHES,
    HANDS,
    SCHEDULERS,
    ByHand,
    Scheduled,
    federated,
    from_round,
    loader,
    long_fit,
    rates,
    warned,
    when_and_what,
)

EPOCHS = [1, 3, 2]
FEW = ("LambdaLR", "MultiplicativeLR", "OneCycleLR", "SequentialLR")


def growing(round: int) -> int:
    return EPOCHS[round - 1]


@pytest.mark.parametrize("epochs", [EPOCHS, tuple(EPOCHS), growing], ids=["list", "tuple", "function"])
def test_each_round_has_its_epochs_and_they_count_on(epochs: Any) -> None:
    seen = federated(ToyModule, 3, local_epochs=epochs)
    when = list(dict.fromkeys((round, epoch) for round, epoch, *_ in seen))
    assert when == [(1, 0), (2, 1), (2, 2), (2, 3), (3, 4), (3, 5)]
    assert [step for _, _, step, _ in seen] == list(range(6 * BATCHES))


def test_the_last_of_a_list_goes_on() -> None:
    seen = federated(ToyModule, 4, local_epochs=[1, 2])
    assert [epoch for _, epoch, *_ in seen][::BATCHES] == list(range(7))
    assert when_and_what(federated(ToyModule, 2, local_epochs=[2])) == when_and_what(
        federated(ToyModule, 2, local_epochs=2)
    )


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", sweep(SCHEDULERS, FEW))
def test_every_scheduler_stands_where_one_long_fit_would_be(name: str, interval: str) -> None:
    def build() -> Scheduled:
        return Scheduled(name, interval)

    expected = when_and_what(long_fit(build, epochs=6))
    assert when_and_what(federated(build, 3, local_epochs=EPOCHS)) == expected
    # The first round has one epoch: of a client that comes later it is counted, too.
    assert when_and_what(federated(build, 3, late=2, local_epochs=EPOCHS)) == from_round(expected, 2, BATCHES)
    assert when_and_what(federated(build, 3, local_epochs=EPOCHS, client_state="carry")) == expected


def test_accumulation_that_changes_by_epoch_counts_as_it_was_in_each() -> None:
    def build() -> Scheduled:
        return Scheduled("ExponentialLR", "step")

    def changing() -> GradientAccumulationScheduler:
        return GradientAccumulationScheduler({0: 1, 2: 2, 4: 3})

    expected = when_and_what(long_fit(build, epochs=6, callbacks=[changing()]))
    seen = federated(build, 3, late=2, local_epochs=EPOCHS, client_callbacks=[changing()])
    assert when_and_what(seen) == from_round(expected, 2, BATCHES)


def lengths(client_state: str) -> list[Any]:
    """What each round tells of the run's length: its optimizer steps and epochs."""
    told: list[Any] = []

    class Asks(ToyModule):
        def configure_optimizers(self) -> Any:
            told.append((self.trainer.estimated_stepping_batches, self.trainer.max_epochs))
            return super().configure_optimizers()

    federated(Asks, 3, local_epochs=EPOCHS, client_state=client_state)
    return told[-3:]


def test_the_run_is_as_long_as_all_rounds_together() -> None:
    assert lengths("global") == [(6 * BATCHES, 6)] * 3
    assert lengths("reset") == [(epochs * BATCHES, 6) for epochs in EPOCHS]


# Its rule is its own, and not declared: twice in the five batches of an epoch.
NOT_DECLARED = "every second batch"
DECLARED = [name for name in HANDS if name != NOT_DECLARED]


@pytest.mark.parametrize(
    "name",
    sweep(
        [name for name in HANDS if name != NOT_DECLARED], ("each batch", "last batch", "every second epoch, declared")
    ),
)
def test_a_schedule_that_is_stepped_by_hand_stands_where_one_long_fit_would_be(name: str) -> None:
    expected = rates(long_fit(HANDS[name], epochs=6))
    assert rates(federated(HANDS[name], 3, local_epochs=EPOCHS)) == expected
    late = rates(federated(HANDS[name], 3, late=2, local_epochs=EPOCHS))
    assert late[-5 * BATCHES :] == from_round(expected, 2, BATCHES)


def test_a_schedule_that_is_stepped_by_a_rule_of_its_own_is_refused() -> None:
    with pytest.raises(ClientError, match=r"steps by hand, 2 times in the 5 batches of round 1.*'frequency'"):
        federated(HANDS[NOT_DECLARED], 3, local_epochs=EPOCHS)


def test_a_schedule_that_is_stepped_once_a_round_is_refused() -> None:
    def once() -> ByHand:
        return ByHand(lambda module, i: module.trainer.current_epoch in (0, 3, 5), at_epoch_end=True)

    with pytest.raises(ClientError, match="that its module steps by hand, 1 times in the 15 batches of round 2"):
        federated(once, 3, local_epochs=EPOCHS)


def stepping(noted: dict[int, int], times: Callable[[int], int]) -> ToyModule:
    """A module that steps its optimizer by hand, in some epochs more often, and notes the steps before each epoch."""

    class Steps(ToyModule):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            noted.setdefault(self.current_epoch, 0)
            noted[self.current_epoch] = max(noted[self.current_epoch], self.trainer.global_step - 2 * batch_idx)
            self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
            for _ in range(times(self.current_epoch)):
                self.optimizers().step()

    return Steps()


def test_global_step_counts_on_where_the_module_steps_by_hand() -> None:
    noted: dict[int, int] = {}
    federated(lambda: stepping(noted, lambda epoch: 2), 3, late=2, local_epochs=EPOCHS)
    assert {epoch: noted[epoch] for epoch in range(1, 6)} == {epoch: 2 * BATCHES * epoch for epoch in range(1, 6)}


def test_global_step_of_epochs_with_unequal_steps_is_refused() -> None:
    with pytest.raises(ClientError, match=r"not equally many in each epoch \(10 in the 2 of round 3\)"):
        federated(lambda: stepping({}, lambda epoch: 1 + (epoch == 2)), 3, local_epochs=EPOCHS)


def test_a_schedule_that_moves_in_the_longest_round_is_not_said_to_stand_still() -> None:
    assert warned(lambda: Scheduled("StepLR"), local_epochs=EPOCHS) == []
    assert len(warned(lambda: Scheduled("StepLR"), local_epochs=[1, 2])) == 1


# ------------------------------------------------------------------------------------------------- in a federation


def fitted(folder: Any, rounds: int = 3, resume: bool = False, **options: Any) -> Weights:
    """Weights of unequal clients, two of three in a round."""
    parts = class_sorted((24, 30, 56), classes=2)
    who = [client for client, part in enumerate(parts) for _ in range(len(part))]
    torch.manual_seed(1)
    module = Scheduled("ExponentialLR", "step")
    saving = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
    options = {"local_epochs": EPOCHS, **QUIET, "enable_checkpointing": True, "default_root_dir": folder, **options}
    callbacks = [Partition(by=who), PartialParticipation(0.67), saving]
    trainer = FederatedTrainer(max_rounds=rounds, seed=0, callbacks=callbacks, **options)
    trainer.fit(module, DataLoader(pooled(parts), batch_size=8, shuffle=True), ckpt_path="last" if resume else None)
    return read(module)


def test_weights_are_the_same_in_workers_and_after_a_resume(tmp_path: Any, recwarn: Any) -> None:
    expected = fitted(tmp_path)
    forked = fitted(tmp_path, engine=Processes(2, start_method="fork"))
    torch.testing.assert_close(forked, expected, rtol=0, atol=0)
    for epochs in (EPOCHS, growing):
        fitted(tmp_path, rounds=1, local_epochs=epochs)
        resumed = fitted(tmp_path, resume=True, local_epochs=epochs)
        torch.testing.assert_close(resumed, expected, rtol=0, atol=0)
    assert not [one for one in recwarn if "local_epochs" in str(one.message)]


@pytest.mark.filterwarnings("error:vectorize_clients")
def test_clients_are_vectorized_all_the_same() -> None:
    def weights(**options: Any) -> Weights:
        torch.manual_seed(1)
        module = ToyModule()
        clients = [DataLoader(toy_data(size, size), 8) for size in (24, 22, 17)]
        FederatedTrainer(
            max_rounds=3, local_epochs=EPOCHS, callbacks=[ClientData(clients)], seed=0, **QUIET, **options
        ).fit(module)
        return read(module)

    torch.testing.assert_close(weights(vectorize_clients=True), weights(), rtol=1e-4, atol=1e-6)


def test_an_evaluation_tells_the_time_at_the_end_of_its_round() -> None:
    noted: list[int] = []

    class Evaluates(ToyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            noted.append(self.trainer.current_epoch)

    clients = [(loader(), loader(1))]
    FederatedTrainer(max_rounds=3, local_epochs=EPOCHS, callbacks=[ClientData(clients)], **QUIET).fit(Evaluates())
    assert noted == [0, 3, 5]


def test_data_is_opened_anew_by_the_clients_epochs() -> None:
    opened: list[int] = []

    class Opens(ToyModule):
        def train_dataloader(self) -> DataLoader:
            opened.append(1)
            return loader()

    counts = []
    for rounds in (1, 2, 3, 4):
        opened.clear()
        trainer = FederatedTrainer(
            max_rounds=rounds, num_clients=1, local_epochs=EPOCHS, reload_dataloaders_every_n_epochs=4, **QUIET
        )
        trainer.fit(Opens())
        counts.append(len(opened))
    assert counts == [1, 1, 2, 2]  # at epochs 0 and 4; the fourth round's begins at epoch 6


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_epochs": []}, r"local_epochs=\[\] has no round"),
        ({"local_epochs": [1, 0]}, r"local_epochs=\[1, 0\] must be a whole number, at least 1"),
        ({"local_epochs": [1, 1.5]}, r"local_epochs=\[1, 1\.5\] must be a whole number"),
        ({"local_epochs": [1, 2], "local_steps": 3}, r"local_epochs= and local_steps= contradict each other"),
        ({"local_epochs": growing, "max_rounds": -1, "max_time": "00:00:01:00"}, r"local_epochs= is a function of the"),
        (
            {"local_epochs": lambda round: 0 if round == 2 else 1},
            r"gave 0 for round 2: it must be a whole number",
        ),
        ({"local_epochs": lambda round: "1"}, r"gave '1' for round 1: it must be a whole number"),
        ({"local_epochs": "many"}, r"local_epochs="),
    ],
)
def test_what_are_no_epochs_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FederatedTrainer(**{"max_rounds": 3, "num_clients": 2, **options})


def test_a_quick_run_has_one_epoch_in_each_round() -> None:
    seen = federated(ToyModule, 9, local_epochs=[3, 4], fast_dev_run=2)
    assert [(round, epoch) for round, epoch, *_ in seen] == [(1, 0), (1, 0), (2, 1), (2, 1)]


def test_epochs_of_a_plan() -> None:
    plan = Plan(3, None, 5, by_round=(1, 3, 2))
    assert [plan.epochs_in(rounds) for rounds in range(6)] == [0, 1, 4, 6, 8, 10]
    assert plan.limits() == (10, -1)
    assert Plan(3, None, -1, by_round=(1, 3, 2)).limits() == (-1, -1)
    assert Plan(None, 7, 5).limits() == (-1, 35)
