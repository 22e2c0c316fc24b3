"""A run's seed fixes it, and ``fit(ckpt_path="last")`` goes on as if the run had never been interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint
from torch import Tensor

from tests.helpers import sweep
from tests.integration.checkpointing import resume_script
from tests.integration.checkpointing.resume_script import ROUNDS, STOP_ROUND, StopAt, run, stopped_run

FEDERATION = "lightning_fed.Federation"

SAVING: dict[str, dict[str, Any]] = {
    "at the end of a round": {"checkpoint": {"save_on_train_epoch_end": True}},
    "at the end of validation": {"checkpoint": {"save_on_train_epoch_end": False}},
    "every 2 rounds": {"checkpoint": {"every_n_epochs": 2}},
    "validation every 2 rounds": {"check_val_every_n_epoch": 2},
    "validation every 2 rounds, saved at the end of a round": {
        "check_val_every_n_epoch": 2,
        "checkpoint": {"save_on_train_epoch_end": True, "monitor": "train_loss"},
    },
}


def without_paths(name: str, state: Any) -> Any:
    """A callback's state; of a ModelCheckpoint's paths only the file names."""
    if not name.startswith("ModelCheckpoint"):
        return state
    best = {Path(path).name: score for path, score in state["best_k_models"].items()}
    paths = {key: Path(state[key]).name for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
    return {**state, **paths, "best_k_models": best, "dirpath": None}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested structures differ in anything but paths, bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} items"]
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{where}/{i}")]
    return [] if one == other else [f"{where}: {one!r} and {other!r}"]


def saved(directory: Path) -> dict[str, Any]:
    """The last checkpoint, and it holds tensors and plain values only."""
    checkpoint = torch.load(directory / "last.ckpt", weights_only=True)
    callbacks = checkpoint["callbacks"].items()
    checkpoint["callbacks"] = {name.split("{")[0]: without_paths(name, state) for name, state in callbacks}
    return checkpoint


def stays(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """All of a checkpoint that a user can see; loop counters within a round may differ."""
    return {name: value for name, value in checkpoint.items() if name != "loops"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that is never interrupted leaves behind, by how it saves; each is run once."""
    runs: dict[str, tuple[Any, ...]] = {}

    def get(saving: str) -> tuple[Any, ...]:
        if saving not in runs:
            directory = tmp_path_factory.mktemp("whole")
            module, history, _ = run(directory, **SAVING[saving])
            runs[saving] = module, history, saved(directory)
        return runs[saving]

    return get


def assert_same_end(resumed, directory: Path, uninterrupted) -> None:
    """Weights, history, server optimizer, clients' optimizers, best checkpoints, progress: all bits the same."""
    module, history, trainer = resumed
    expected_module, expected_history, expected = uninterrupted
    assert differences(module.state_dict(), expected_module.state_dict()) == []
    assert differences(history.rows, expected_history.rows) == []
    assert differences(history.clients, expected_history.clients) == []
    assert expected["callbacks"][FEDERATION]["strategy"]["moments"].keys() == {"m", "v"}
    assert expected["callbacks"][FEDERATION]["clients"].keys() == {0, 1, 2, 3}
    assert differences(stays(saved(directory)), stays(expected)) == []
    assert (trainer.current_epoch, trainer.global_step) == (ROUNDS, ROUNDS)


def test_the_same_run_twice_is_bitwise_equal(tmp_path, whole):
    module, history, trainer = run(tmp_path / "again")
    assert_same_end((module, history, trainer), tmp_path / "again", whole("at the end of a round"))


def test_another_seed_is_another_run(tmp_path, whole):
    module, _, _ = run(tmp_path, seed=4)
    expected_module, _, _ = whole("at the end of a round")
    assert differences(module.state_dict(), expected_module.state_dict()) != []


def test_a_run_killed_in_the_middle_of_a_round_goes_on_as_if_never_interrupted(tmp_path, whole):
    directory = tmp_path / "killed"
    script = [sys.executable, resume_script.__file__, str(directory)]
    killed = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert saved(directory)["epoch"] == STOP_ROUND - 2  # counted from 0: round 3 is the last that was saved
    resumed = run(directory, ckpt_path="last")
    assert_same_end(resumed, directory, whole("at the end of a round"))


CASES = [
    *[(saving, "client trained") for saving in SAVING],
    *[("at the end of a round", moment) for moment in StopAt.MOMENTS if moment != "client trained"],
    *[
        ("at the end of validation", moment)
        for moment in ("client evaluated", "validation batch", "round done, not saved")
    ],
    ("validation every 2 rounds", "round done, not saved"),
]


# Each way to save, and each kind of moment.
FEW = [
    ("at the end of a round", "client trained"),
    ("at the end of a round", "validation batch"),
    ("at the end of validation", "client evaluated"),
    ("every 2 rounds", "client trained"),
    ("validation every 2 rounds", "round done, not saved"),
]


@pytest.mark.parametrize(("saving", "moment"), sweep(CASES, FEW))
def test_wherever_a_run_stops_and_however_it_saves_its_end_is_the_same(tmp_path, whole, saving, moment):
    directory = tmp_path / "stopped"
    stopped_run(directory, moment, **SAVING[saving])
    resumed = run(directory, ckpt_path="last", **SAVING[saving])
    assert_same_end(resumed, directory, whole(saving))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "saving",
    sweep(
        ["at the end of a round", "at the end of validation", "validation every 2 rounds"], ["at the end of validation"]
    ),
)
def test_resuming_a_finished_run_changes_nothing(tmp_path, saving):
    directory = tmp_path / "finished"
    module, history, _ = run(directory, **SAVING[saving])
    before, last = files(directory), saved(directory)

    again, same_history, trainer = run(directory, ckpt_path="last", **SAVING[saving])
    assert differences(again.state_dict(), module.state_dict()) == []
    assert (same_history.rows, same_history.clients) == (history.rows, history.clients)
    assert (trainer.current_epoch, trainer.global_step) == (ROUNDS, ROUNDS)
    after = files(directory)
    if saving != "at the end of a round":
        # Lightning counts the last epoch as ended only now, and says so in last.ckpt; nothing else changes.
        before.pop("last.ckpt"), after.pop("last.ckpt")
        changed = {difference.split(":")[0].rsplit("/", 1)[-1] for difference in differences(last, saved(directory))}
        assert changed <= {"epoch", "completed", "processed", "_batches_that_stepped", "current_score"}
    assert after == before

    after = files(directory)
    run(directory, ckpt_path="last", **SAVING[saving])
    assert files(directory) == after


@pytest.mark.parametrize(
    "saving", sweep(["at the end of a round", "at the end of validation"], ["at the end of a round"])
)
def test_three_rounds_and_three_more_equal_six_in_one_go(tmp_path, whole, saving):
    directory = tmp_path / "longer"
    _, history, _ = run(directory, rounds=3, **SAVING[saving])
    assert [row["round"] for row in history.rows] == [1, 2, 3]
    resumed = run(directory, ckpt_path="last", **SAVING[saving])
    assert_same_end(resumed, directory, whole(saving))


def test_a_checkpoint_holds_tensors_and_plain_values_only(tmp_path):
    run(tmp_path, rounds=1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"][FEDERATION]["seed"] == 3
    assert checkpoint["callbacks"]["History"]["rows"][0]["round"] == 1


def test_resuming_with_another_seed_warns(tmp_path):
    run(tmp_path, rounds=1)
    with pytest.warns(UserWarning, match=r"run with seed 3, this one has seed 4.*FederatedTrainer\(seed=3\)"):
        run(tmp_path, rounds=2, ckpt_path="last", seed=4)


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}], ids=["every round", "every 2 rounds"])
def test_early_stopping_counts_on_after_a_restart(tmp_path, options):
    def stopping() -> EarlyStopping:
        return EarlyStopping("clients/val_loss", patience=1, min_delta=1.0)  # never better: 1 + 1 validations

    options = {**options, "rounds": 10, "checkpoint": {"monitor": None, "save_top_k": 1}}
    _, history, _ = run(tmp_path / "whole", stopping(), **options)
    every = options.get("check_val_every_n_epoch", 1)
    assert history.rows[-1]["round"] == 2 * every

    run(tmp_path / "first", stopping(), **{**options, "rounds": every})
    _, resumed, _ = run(tmp_path / "first", stopping(), ckpt_path="last", **options)
    assert resumed.rows == history.rows


class Stop(Exception):
    """Something of the user's own goes wrong."""


# While clients train; with the round's weights taken over.
WITHIN = ("client trained", "validation batch")


@pytest.mark.parametrize("moment", sweep(StopAt.MOMENTS, WITHIN))
def test_a_run_goes_on_from_a_checkpoint_saved_on_an_exception(tmp_path, whole, moment):
    def stop() -> None:
        raise Stop

    directory = tmp_path / "stopped"
    with pytest.raises(Stop):
        run(directory, StopAt(moment, stop), OnExceptionCheckpoint(directory, "exception"))
    module, history, _ = run(directory, ckpt_path=directory / "exception.ckpt")
    expected_module, expected_history, _ = whole("at the end of a round")
    assert differences(module.state_dict(), expected_module.state_dict()) == []
    assert differences(history.clients, expected_history.clients) == []
    assert [row["round"] for row in history.rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("moment", sweep(StopAt.MOMENTS, WITHIN))
def test_a_run_goes_on_from_a_checkpoint_saved_at_any_moment(tmp_path, whole, moment):
    """In the middle of a round the module has a client's weights, and some clients have a new state."""
    directory, saved_at = tmp_path / "saving", tmp_path / "moment.ckpt"

    class Save(StopAt):
        def on_federation_start(self, trainer):
            self.stop = lambda: trainer.save_checkpoint(saved_at)

    module, _, _ = run(directory, Save(moment, lambda: None))
    expected_module, expected_history, _ = whole("at the end of a round")
    assert differences(module.state_dict(), expected_module.state_dict()) == []  # saving itself changes nothing
    module, history, _ = run(tmp_path / "resumed", ckpt_path=saved_at)
    assert differences(module.state_dict(), expected_module.state_dict()) == []
    assert differences(history.clients, expected_history.clients) == []
    assert [row["round"] for row in history.rows] == [1, 2, 3, 4, 5, 6]
