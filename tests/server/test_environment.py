"""Defaults from the environment, and one fit at a time in a process."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET


def loader() -> DataLoader[Any]:
    return DataLoader(toy_data(16), batch_size=4)


def given(monkeypatch: Any, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"PL_FEDERATEDTRAINER_{name}", value)


def test_variables_give_the_trainers_own_arguments_and_lightnings(monkeypatch):
    given(
        monkeypatch, MAX_ROUNDS="2", NUM_CLIENTS="3", CLIENT_STATE="carry", GRADIENT_CLIP_VAL="0.5", ACCELERATOR="cpu"
    )
    trainer = FederatedTrainer(**{k: v for k, v in QUIET.items() if k != "accelerator"})
    assert (trainer.max_epochs, trainer.owners.partition.num_clients) == (2, 3)
    assert trainer.local_options.client_state == "carry"
    assert trainer.local_options.trainer["gradient_clip_val"] == 0.5
    assert trainer.local_options.trainer["accelerator"] == "cpu"
    trainer.fit(ToyModule(), loader())
    assert trainer.global_step == 2
    assert os.environ["PL_FEDERATEDTRAINER_MAX_ROUNDS"] == "2"


def test_what_is_written_comes_before_the_environment(monkeypatch):
    given(monkeypatch, MAX_ROUNDS="2", NUM_CLIENTS="3", SEED="7")
    trainer = FederatedTrainer(max_rounds=1, seed=5, **QUIET)
    assert (trainer.max_epochs, trainer.seed, trainer.owners.partition.num_clients) == (1, 5, 3)


def test_variables_are_checked_as_arguments_are(monkeypatch):
    given(monkeypatch, MAX_EPOCHS="3", NUM_CLIENTS="many")
    with pytest.raises(ConfigurationError, match=r"(?s)max_epochs=3 is not for.*num_clients='many' must be a whole"):
        FederatedTrainer(max_rounds=1, **QUIET)


def test_a_subclass_has_variables_of_its_own_name(monkeypatch):
    class MyTrainer(FederatedTrainer):
        pass

    monkeypatch.setenv("PL_MYTRAINER_MAX_ROUNDS", "4")
    given(monkeypatch, MAX_ROUNDS="2")
    assert MyTrainer(num_clients=1, **QUIET).max_epochs == 4


class Waiting(Callback):
    """Stays in the fit until it is let go."""

    def __init__(self) -> None:
        self.there, self.go = threading.Event(), threading.Event()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.there.set()
        assert self.go.wait(60)


def federated(*callbacks: Callback) -> FederatedTrainer:
    return FederatedTrainer(max_rounds=1, num_clients=2, callbacks=list(callbacks), **QUIET)


def test_a_second_fit_in_another_thread_is_refused_and_the_first_goes_on():
    waiting = Waiting()
    first = federated(waiting)
    thread = threading.Thread(target=first.fit, args=(ToyModule(), loader()))
    thread.start()
    try:
        assert waiting.there.wait(60)
        with pytest.raises(ConfigurationError, match=r"Another FederatedTrainer is fitting in another thread"):
            federated().fit(ToyModule(), loader())
    finally:
        waiting.go.set()
        thread.join()
    assert first.global_step == 1
    second = federated()
    second.fit(ToyModule(), loader())
    assert second.global_step == 1


def test_a_fit_that_fails_lets_the_next_thread_fit():
    def failing() -> None:
        with pytest.raises(ConfigurationError):
            federated().fit(ToyModule())

    thread = threading.Thread(target=failing)
    thread.start()
    thread.join()
    federated().fit(ToyModule(), loader())


def test_a_fit_within_a_fit_of_the_same_thread_is_allowed():
    class Inner(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            federated().fit(ToyModule(), loader())

    outer = federated(Inner())
    outer.fit(ToyModule(), loader())
    assert outer.global_step == 1
