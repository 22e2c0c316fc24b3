"""What a sweep tries, alike for Optuna and Ray Tune, and what a trial may have left behind."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flwr_datasets.partitioner import LinearPartitioner
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import PartialParticipation, Partition
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule, toy_data

T = TypeVar("T")

# The learning rates of three trials: one that is well, one that learns nothing, one that is best.
RATES = (0.1, 1e-4, 1.0)
ROUNDS = 6
# "processes" are forks where no other thread runs, as in a script, and those of a clean process where one does.
ENGINES: dict[str, Callable[[], Any]] = {
    "in_process": lambda: "in_process",
    "forks": lambda: Processes(2, start_method="fork"),
    "clean processes": lambda: Processes(2, start_method="forkserver"),
    "processes": lambda: "processes",
    "ray": lambda: "ray",
}


def trained(lr: float, engine: Any, folder: Path, *callbacks: Any, at_server: bool = True) -> FederatedTrainer:
    """A trial with Lightning's defaults: clients of three sizes, of which two train in a round, for two epochs."""
    seed_everything(0, verbose=False)
    trainer = FederatedTrainer(
        max_rounds=ROUNDS,
        local_epochs=2,
        engine=engine,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[
            Partition(LinearPartitioner(3), val_fraction=0.2),
            PartialParticipation(fraction_train=0.7),
            *callbacks,
        ],
    )
    val = DataLoader(toy_data(64, seed=1), 64) if at_server else None
    trainer.fit(ToyModule(lr=lr), DataLoader(toy_data(240), 8, shuffle=True), val)
    return trainer


def weights(trainer: FederatedTrainer) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in trainer.lightning_module.state_dict().items()}


def descendants(pid: int) -> dict[int, str]:
    """The processes below one, with their command lines; those that have ended and were not waited for are none."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended
                continue
            if state != "Z" and command:  # without a command it is ending
                parents[int(folder.name)], commands[int(folder.name)] = int(parent), command.strip()
    found, last = set[int](), {pid}
    while last:
        last = {child for child, parent in parents.items() if parent in last} - found
        found |= last
    return {child: commands[child] for child in found}


def left() -> set[str]:
    """The processes below this one, its threads, and what is in the folder of temporary files; without Ray's own."""
    processes = {f"{pid}: {command}" for pid, command in descendants(os.getpid()).items() if "ray" not in command}
    return processes | {one.name for one in threading.enumerate()} | set(os.listdir(tempfile.gettempdir()))


def actors() -> list[str]:
    """Ray's actors below this process: clients', and trials of Ray Tune."""
    return [one for one in descendants(os.getpid()).values() if one.startswith(("ray::Actor", "ray::ImplicitFunc"))]


def becomes(expected: T, what: Callable[[], T], seconds: float = 30) -> None:
    """Asserts that it does within some time: Ray ends its actors a little later than it is told to."""
    until = time.monotonic() + seconds
    while (now := what()) != expected and time.monotonic() < until:
        time.sleep(0.2)
    assert now == expected
