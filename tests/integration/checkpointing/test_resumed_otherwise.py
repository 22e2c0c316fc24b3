"""What a resumed run has otherwise than before is named, once."""

from __future__ import annotations

import re
import shutil

import lightning as L
import numpy as np
import pytest
import torch
from flwr_datasets.partitioner import DirichletPartitioner
from lightning.pytorch.callbacks import EarlyStopping

from lightning_fed import ConfigurationError
from lightning_fed.callbacks import (
    FedAdam,
    FederatedCallback,
    FedProx,
    History,
    PartialParticipation,
    Partition,
)
from tests.integration.checkpointing.runs import FEDERATION, Counting, fit, notes, optimizers_of, saved

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:You defined a `validation_step` but"
)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [1],
        lambda state: [],
        lambda state: 0,
        lambda state: {"strategy": 5, "clients": "x", "seed": "y"},
        lambda state: {**state, "clients": {"one": {}}},
        lambda state: {**state, "clients": {0: 5}},
        lambda state: {**state, "setup": {"FederatedTrainer": None}},
        lambda state: {**state, "arguments": 3},
        lambda state: {**state, "seed": "0"},
        lambda state: {**state, "seed": -1},
        lambda state: {**state, "num_clients": -2},
        lambda state: {**state, "num_clients": 2.0},
        lambda state: {**state, "clients": {-1: {}}},
        lambda state: {**state, "clients": {"0": {}}},
        lambda state: {**state, "method": None},
        lambda state: dict.fromkeys(state),
    ],
)
def test_a_runs_state_of_another_shape_is_named_with_the_way_out(tmp_path, federated, change):
    checkpoint = saved(federated)
    checkpoint["callbacks"][FEDERATION] = change(checkpoint["callbacks"][FEDERATION])
    path, trained = tmp_path / "changed.ckpt", Counting.trained
    torch.save(checkpoint, path)
    says = rf"{re.escape(str(path))}: what it holds as '{FEDERATION}' .*Counting\.load_from_checkpoint\("
    with pytest.raises(ConfigurationError, match=says):
        fit(tmp_path, module=Counting(), rounds=3, ckpt_path=path)
    assert Counting.trained == trained


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_fewer_rounds_than_were_done_are_refused(tmp_path, federated, rounds):
    if rounds == 1:
        with pytest.raises(ConfigurationError, match=r"has done 2 rounds, and this run is to end after 1\."):
            fit(tmp_path, rounds=rounds, ckpt_path=federated)
    else:
        _, trainer = fit(tmp_path, rounds=rounds, ckpt_path=federated)
        assert trainer.current_epoch == rounds


def test_the_same_run_goes_on_without_a_word(tmp_path, federated):
    with notes() as said:
        fit(tmp_path, rounds=3, ckpt_path=federated)
    assert said == []


def dirichlet():
    return DirichletPartitioner(num_partitions=2, partition_by="label", alpha=5.0, min_partition_size=2)


OTHERWISE = {
    "seed": (
        {},
        {"seed": 5},
        r"The checkpoint is of a run with seed 0, this one has seed 5: .*FederatedTrainer\(seed=0\)",
    ),
    "more clients": (
        {},
        {"num_clients": 3},
        [
            r"The run had 2 clients, this one has 3: they have other data than before\.",
            r"Partition\(partitioner=IidPartitioner\(num_partitions=3\)\) holds, the run had partitioner=Iid",
        ],
    ),
    "fewer clients": (
        {"num_clients": 4, "client_state": "carry"},
        {"num_clients": 2, "client_state": "carry"},
        [
            r"The run had 4 clients, this one has 2: they",
            r"What clients 2, 3 kept is dropped\.",
            r"Partition\(partitioner=IidPartitioner\(num_partitions=2\)\) holds",
        ],
    ),
    "local epochs": (
        {},
        {"local_epochs": 2},
        r"FederatedTrainer\(local_epochs=2\) holds, the run had local_epochs=1\.",
    ),
    "local steps": ({}, {"local_steps": 1}, r"FederatedTrainer\(local_steps=1\) holds, the run had local_steps=None\."),
    "client_state": (
        {"client_state": "reset"},
        {"client_state": "carry"},
        [
            r"FederatedTrainer\(client_state='carry'\) holds, the run had client_state='reset'\.",
            r"The checkpoint has nothing that clients kept: their optimizers begin anew\.",
        ],
    ),
    "partitioner": (
        {"partition": Partition(2)},
        {"partition": Partition(dirichlet())},
        r"Partition\(partitioner=DirichletPartitioner\(.*\)\) holds, the run had partitioner=IidPartitioner\(num_",
    ),
    "val_fraction": (
        {"partition": Partition(2)},
        {"partition": Partition(2, val_fraction=0.5)},
        r"Partition\(val_fraction=0\.5\) holds, the run had val_fraction=0\.0\.",
    ),
    "participation": (
        {"cohort": PartialParticipation(1.0)},
        {"cohort": PartialParticipation(0.5)},
        r"PartialParticipation\(fraction_train=0\.5\) holds, the run had fraction_train=1\.0\.",
    ),
    "mu": ({"prox": FedProx(0.1)}, {"prox": FedProx(0.2)}, r"FedProx\(mu=0\.2\) holds, the run had mu=0\.1\."),
    "no FedProx": ({"prox": FedProx(0.1)}, {}, r"FedProx\(mu=0\.1\) was part of the run, and is none of this one\."),
    "new FedProx": ({}, {"prox": FedProx(0.1)}, r"FedProx\(mu=0\.1\) was no part of the run\."),
    "learning rate": (
        {"method": FedAdam(learning_rate=0.1)},
        {"method": FedAdam(learning_rate=0.2)},
        r"FedAdam\(learning_rate=0\.2\) holds, the run had learning_rate=0\.1\.",
    ),
    "new history": ({}, {"history": History()}, r"History has nothing in the checkpoint: it begins in this round\."),
}


def test_a_module_s_hparams_that_a_script_sets_anew_are_named(tmp_path):
    adam = optimizers_of(lambda self: torch.optim.Adam(self.parameters(), lr=self.hparams["lr"]))
    how = {"client_state": "carry"}
    fit(tmp_path, module=adam(lr=0.1), rounds=1, **how)
    with notes() as said:
        fit(tmp_path, module=adam(lr=0.2), rounds=2, ckpt_path="last", **how)
    assert said == [
        "What clients' optimizers kept goes on, learning rates included (client_state='carry').",
        "Module(lr=0.2) holds, the run had lr=0.1.",
    ]
    with notes() as said:
        fit(tmp_path, module=adam(lr=0.2), rounds=3, ckpt_path="last", **how)
    assert said == []


def split_options(options):
    callbacks = [value for value in options.values() if isinstance(value, L.Callback)]
    return callbacks, {name: value for name, value in options.items() if not isinstance(value, L.Callback)}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_a_resumed_run_has_otherwise_is_named_once(tmp_path, what):
    before, after, expected = OTHERWISE[what]
    callbacks, options = split_options(before)
    fit(tmp_path, *callbacks, rounds=2, **options)
    callbacks, options = split_options(after)
    with notes() as said:
        _, trainer = fit(tmp_path, *callbacks, rounds=3, ckpt_path="last", **options)
    assert trainer.current_epoch == 3
    expected = [expected] if isinstance(expected, str) else expected
    for pattern in expected:
        assert sum(bool(re.match(pattern, line)) for line in said) == 1, said
    assert len(said) == len(expected)


def test_a_history_that_is_not_there_any_more_is_named_by_lightning(tmp_path):
    fit(tmp_path, History(), rounds=2)
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \['History'\]"):
        fit(tmp_path, rounds=3, ckpt_path="last")


def test_a_new_history_has_the_rounds_from_here_on(tmp_path, federated):
    history = History()
    fit(tmp_path, history, rounds=4, ckpt_path=federated)
    assert [row["round"] for row in history.rows] == [3, 4]


def test_numbers_of_numpy_among_the_metrics_do_not_spoil_the_checkpoint(tmp_path):
    class Adds(FederatedCallback):
        def on_round_end(self, trainer, round, metrics):
            metrics["mine"] = np.float64(0.5)

    fit(tmp_path, History(per_client=True), Adds(), rounds=1)
    assert saved(tmp_path / "last.ckpt")["callbacks"]["History"]["rows"][0]["mine"] == 0.5
    history = History(per_client=True)
    fit(tmp_path, history, Adds(), rounds=2, ckpt_path="last")
    assert history["mine"] == [0.5, 0.5]


def test_an_argument_that_a_callback_s_own_state_overwrites_is_named(tmp_path):
    """As Lightning's EarlyStopping does, whose state has the patience."""

    class Growing(FederatedCallback):
        def __init__(self, step):
            self.step, self._size = step, 0

        def state_dict(self):
            return {"step": self.step}

        def load_state_dict(self, state):
            self.step = state["step"]

    fit(tmp_path, Growing(1), EarlyStopping("train_loss", patience=7), rounds=1)
    with notes() as said:
        fit(tmp_path, Growing(2), EarlyStopping("train_loss", patience=9), rounds=2, ckpt_path="last")
    assert said == [
        "Growing(step=1) holds, as in the checkpoint; 2 is not used.",
        "EarlyStopping(patience=7) holds, as in the checkpoint; 9 is not used.",
    ]


class Adaptive(FederatedCallback):
    """Its argument is where it begins, and state from then on."""

    def __init__(self, mu, name="a"):
        self.mu, self.name = mu, name

    def local_callbacks(self):
        return []

    def on_round_end(self, trainer, round, metrics):
        self.mu *= 2

    def state_dict(self):
        return {"mu": self.mu} if self.mu > 0.3 else {}

    def load_state_dict(self, state):
        self.mu = state["mu"]


def test_an_argument_that_the_run_itself_changes_is_named_only_where_the_script_changes_it(tmp_path):
    fit(tmp_path, Adaptive(0.1), rounds=3)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "three.ckpt")
    same = Adaptive(0.1)
    with notes() as said:
        fit(tmp_path, same, rounds=4, ckpt_path=tmp_path / "three.ckpt")
    assert said == []
    assert same.mu == 1.6
    other = Adaptive(0.2)
    with notes() as said:
        fit(tmp_path, other, rounds=4, ckpt_path=tmp_path / "three.ckpt")
    assert said == ["Adaptive(mu=0.8) holds, as in the checkpoint; 0.2 is not used."]


def test_a_callback_that_had_nothing_to_save_is_not_taken_for_a_new_one(tmp_path):
    fit(tmp_path, Adaptive(0.1), rounds=1)
    with notes() as said:
        fit(tmp_path, Adaptive(0.1), rounds=2, ckpt_path="last")
    assert said == []


def test_a_learning_rate_by_round_goes_on_with_its_round(tmp_path):
    whole, _ = fit(tmp_path / "whole", FedAdam(learning_rate=[0.3, 0.2, 0.05]), rounds=3)
    fit(tmp_path / "in two", FedAdam(learning_rate=[0.3, 0.2, 0.05]), rounds=2)
    with notes() as said:
        resumed, _ = fit(tmp_path / "in two", FedAdam(learning_rate=[0.3, 0.2, 0.05]), rounds=3, ckpt_path="last")
    assert said == []
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_learning_rate_that_is_changed_on_resume_holds_and_the_moments_stay(tmp_path):
    """By hand: the moments after two rounds, and a third one with the new learning rate."""
    fit(tmp_path, FedAdam(learning_rate=0.1), rounds=2)
    start = saved(tmp_path / "last.ckpt")
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "two.ckpt")
    same, _ = fit(tmp_path, FedAdam(learning_rate=0.1), rounds=3, ckpt_path=tmp_path / "two.ckpt")
    twice, _ = fit(tmp_path, FedAdam(learning_rate=0.2), rounds=3, ckpt_path=tmp_path / "two.ckpt")
    for name, x in start["state_dict"].items():
        moved, further = same.state_dict()[name] - x, twice.state_dict()[name] - x
        torch.testing.assert_close(further, 2 * moved, rtol=1e-4, atol=1e-6)
