"""What a trainer's arguments come to."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_fed.callbacks import RoundPrinter
from lightning_fed.engines import InProcess, Processes
from lightning_fed.errors import ConfigurationError
from lightning_fed.server.plan import Given, resolve

NOTHING: dict[str, Any] = {
    "max_rounds": 3,
    "num_clients": 2,
    "local_epochs": None,
    "local_steps": None,
    "engine": "in_process",
    "num_workers": None,
    "clients_per_device": None,
    "vectorize_clients": False,
    "compile_clients": False,
    "client_callbacks": None,
    "client_state": "global",
    "local_validation": False,
    "seed": 5,
    "timeout": 60.0,
    "max_examples": 1e9,
    "client_storage": "memory",
    "callbacks": None,
}


def given(trainer: dict[str, Any] | None = None, **changes: Any) -> Given:
    return Given(**{**NOTHING, **changes}, trainer={"accelerator": "cpu", **(trainer or {})})


def test_what_steers_training_goes_to_clients_and_the_server_counts_rounds() -> None:
    arguments = given({"gradient_clip_val": 0.5, "precision": "bf16-mixed", "max_time": "00:01:00:00"})
    plan = resolve(arguments)
    assert plan.server == {
        **{"accelerator": "cpu", "devices": 1, "precision": "bf16-mixed"},
        **{"max_time": "00:01:00:00", "max_epochs": 3},
    }
    assert plan.local.trainer == {
        **{"accelerator": "cpu", "devices": 1, "precision": "bf16-mixed"},
        **{"gradient_clip_val": 0.5},
    }
    assert (plan.local.epochs, plan.local.steps, plan.settings.seed, plan.settings.max_clients) == (1, None, 5, None)
    assert isinstance(plan.engine, InProcess)
    assert arguments.trainer["gradient_clip_val"] == 0.5  # what was given stays as it was given


def test_a_dev_run_has_two_clients_and_as_many_batches_as_rounds() -> None:
    plan = resolve(given({"fast_dev_run": 2}, max_rounds=None, local_steps=7))
    assert (plan.dev_run, plan.settings.max_clients, plan.local.epochs, plan.local.steps) == (2, 2, 1, None)
    limits = {name: plan.local.trainer[name] for name in ("limit_train_batches", "limit_val_batches")}
    assert limits == {"limit_train_batches": 2, "limit_val_batches": 2}
    assert plan.server["max_epochs"] == -1


def test_steps_take_the_place_of_epochs() -> None:
    plan = resolve(given(local_steps=7, engine="processes", num_workers=3))
    assert (plan.local.epochs, plan.local.steps) == (None, 7)
    assert isinstance(plan.engine, Processes)
    assert plan.engine.num_workers == 3


def test_a_progress_bar_is_added_unless_none_is_wanted() -> None:
    assert [type(callback) for callback in resolve(given()).callbacks] == [RoundPrinter]
    assert resolve(given({"enable_progress_bar": False})).callbacks == []


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as error:
        resolve(given({"max_epochs": 2}, max_rounds=None, seed=0.5, client_state="some", timeout=-1, max_examples=0))
    own = ("seed=0.5", "client_state='some'", "timeout=-1", "max_examples=0")
    for name in ("max_epochs=2", "Say how long to train", *own):
        assert name in str(error.value)
