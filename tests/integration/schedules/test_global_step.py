"""Steps and epochs on a client are those of the run; what follows from them does not begin anew."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, History
from lightning_fed.testing import ToyModule
from tests.helpers import QUIET
from tests.integration.schedules.runs import BATCHES, Stream, built, federated, loader, long_fit, when_and_what


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
@pytest.mark.parametrize("brings", ["loaders", "a datamodule"])
def test_an_evaluation_tells_the_time_at_its_rounds_end(options: Any, expected: Any, brings: str) -> None:
    seen: list[Any] = []

    class Looks(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append((trainer.current_epoch, trainer.global_step))

    clients = ClientData([(loader(), loader(1)) if brings == "loaders" else Own()])
    trainer = FederatedTrainer(max_rounds=3, callbacks=[clients], client_callbacks=[Looks()], **QUIET, **options)
    trainer.fit(built(ToyModule))
    if brings == "a datamodule" and "local_steps" in options:  # how many epochs these are its loader alone tells
        seen, expected = ([steps for _, steps in found] for found in (seen, expected))
    assert seen == expected


class Own(LightningDataModule):
    """The same loaders."""

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(1)


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
