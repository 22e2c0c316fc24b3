"""A run as users of other projects make it: their module and data as they are, all of Lightning's defaults on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FederatedCallback, History
from lightning_fed.engines import Engine, Processes
from lightning_fed.seeding import seed_all, seed_for

ROUNDS, STOP_ROUND, CLIENTS = 3, 2, 3
# A module, and what else ``fit`` gets.
Build = Callable[[], tuple[LightningModule, dict[str, Any]]]

ENGINES: dict[str, Callable[[], str | Engine]] = {
    "in process again": lambda: "in_process",
    "processes": lambda: "processes",
    "clean processes": lambda: Processes(num_workers=2, start_method="forkserver"),
    "ray": lambda: "ray",
}


class Stopped(Exception):
    """What ends a run in the middle of a round."""


class StopInRound(FederatedCallback):
    """Ends a run when the second client of a round is done."""

    def on_client_end(self, trainer: Any, round: int, stage: Any, report: Any) -> None:
        if round == STOP_ROUND and report.client >= 1:
            raise Stopped


@dataclass
class Outcome:
    """What came of a run: the module's whole state, and the rows of its history."""

    state: dict[str, Tensor]
    rows: list[dict[str, float]]


def whole_state(module: LightningModule) -> dict[str, Tensor]:
    """All parameters and buffers, whatever the module's own ``state_dict`` leaves out."""
    return {name: value.detach().clone() for name, value in [*module.named_parameters(), *module.named_buffers()]}


def run(
    build: Build,
    directory: Path,
    *callbacks: Any,
    engine: str | Engine = "in_process",
    seed: int = 0,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Outcome:
    """One run, with progress bar, logger and checkpoints as Lightning has them by default."""
    with isolate_rng():
        seed_all(0)
        module, data = build()
        history = History()
        if not any("partition" in getattr(callback, "decides", ()) for callback in callbacks):
            options["num_clients"] = CLIENTS
        trainer = FederatedTrainer(
            max_rounds=ROUNDS,
            engine=engine,
            seed=seed,
            accelerator="cpu",
            default_root_dir=directory,
            callbacks=[history, *callbacks],
            **options,
        )
        trainer.fit(module, ckpt_path=ckpt_path, **data)
    return Outcome(whole_state(module), history.rows)


def one_round_of_one_client(build: Build, directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of one client after one round of two epochs, and those of a plain Trainer after as many.

    Both without validation, which draws from the global random state.
    """
    states = []
    for federated in (True, False):
        with isolate_rng():
            seed_all(0)
            module, data = build()
            # What a plain Trainer draws here would shift what it draws in training; ours draws it apart.
            data["datamodule"].prepare_data()
            data["datamodule"].setup(TrainerFn.FITTING)
            options: dict[str, Any] = {
                "accelerator": "cpu",
                "default_root_dir": directory,
                "limit_val_batches": 0,
            }
            trainer: Trainer
            if federated:
                trainer = FederatedTrainer(max_rounds=1, num_clients=1, local_epochs=2, seed=0, **options)
            else:
                trainer = Trainer(max_epochs=2, **options)
                seed_all(seed_for(0, "train", round=1, client=0))
            trainer.fit(module, **data)
        states.append(whole_state(module))
    return states[0], states[1]


def stopped_run(build: Build, directory: Path, *callbacks: Any, **options: Any) -> Path:
    """A run that ends in the middle of a round; returns the checkpoint that Lightning saved by default."""
    try:
        run(build, directory, StopInRound(), *callbacks, **options)
    except Stopped:
        (checkpoint,) = directory.glob("lightning_logs/version_0/checkpoints/*.ckpt")
        return checkpoint
    raise AssertionError("The run went on to its end.")


def assert_same(one: Outcome, other: Outcome) -> None:
    """The same weights, buffers and metrics, to the bit."""
    torch.testing.assert_close(one.state, other.state, rtol=0, atol=0, equal_nan=True)
    assert repr(one.rows) == repr(other.rows)


def moved(outcome: Outcome, build: Build) -> set[str]:
    """The names of what a run has changed."""
    with isolate_rng():
        seed_all(0)
        module, _ = build()
    return {name for name, value in whole_state(module).items() if not torch.equal(value, outcome.state[name])}
