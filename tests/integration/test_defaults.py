"""Every engine with all that Lightning does unless told otherwise: progress bar, logger, checkpoints, model summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, PartialParticipation, Partition, TQDMRoundBar
from lightning_fed.engines import Engine, InProcess, Processes, Ray
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.weights import Weights, read
from tests.helpers import sweep


class Data(LightningDataModule):
    """Keeps hyperparameters, and its trainer."""

    def __init__(self, examples: int = 48, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        self.train = toy_data(self.hparams["examples"], seed=self.hparams["seed"])
        self.held_out = toy_data(8, seed=9)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, 8)


def _loaders() -> tuple[Any, dict[str, Any]]:
    return Partition(3, val_fraction=0.25), {
        "train_dataloaders": DataLoader(toy_data(48), 8, shuffle=True),
        "val_dataloaders": DataLoader(toy_data(8, seed=9), 8),
    }


def _datamodule() -> tuple[Any, dict[str, Any]]:
    return Partition(3, val_fraction=0.25), {"datamodule": Data()}


def _client_loaders() -> tuple[Any, dict[str, Any]]:
    own = [(DataLoader(toy_data(n, seed=n), 8), DataLoader(toy_data(8, seed=n + 1), 8)) for n in (8, 16, 24)]
    return ClientData(own), {}


def _client_datamodules() -> tuple[Any, dict[str, Any]]:
    return ClientData(lambda client: Data(8 * (client + 1), client), 3), {"datamodule": Data()}


DATA: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "loaders": _loaders,
    "datamodule": _datamodule,
    "clients' loaders": _client_loaders,
    "clients' datamodules": _client_datamodules,
}
# A fork must not inherit the threads that bars and loggers start: where there are any, workers start from a clean
# process.
ENGINES: dict[str, Callable[[], Engine]] = {
    "fork": lambda: Processes(2, start_method="fork"),
    "what is safe": lambda: Processes(2),
    "clean process": lambda: Processes(2, start_method="forkserver"),
    "ray": lambda: Ray(2),
}


def run(data: str, engine: Engine, root: Path, rounds: int = 2, resume: bool = False, **options: Any) -> Weights:
    torch.manual_seed(0)
    module, (owner, given) = ToyModule(hidden=4), DATA[data]()
    trainer = FederatedTrainer(
        max_rounds=rounds,
        engine=engine,
        callbacks=[owner, PartialParticipation(fraction_train=0.7), *options.pop("callbacks", [])],
        accelerator="cpu",
        default_root_dir=root,
        **options,
    )
    trainer.fit(module, **given, ckpt_path=trainer_checkpoint(root) if resume else None)
    assert list(root.rglob("*.ckpt"))
    return read(module)


def trainer_checkpoint(root: Path) -> str:
    return str(max(root.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Weights]:
    known: dict[str, Weights] = {}

    def of(data: str) -> Weights:
        if data not in known:
            known[data] = run(data, InProcess(), tmp_path_factory.mktemp("in_process"), rounds=3)
        return known[data]

    return of


def _marks(data: str, engine: str) -> list[pytest.MarkDecorator]:
    if engine == "ray":  # its actors make their imports anew in each run
        return [pytest.mark.ray] if data == "datamodule" else [pytest.mark.ray, pytest.mark.slow]
    return [] if engine == "fork" or data == "datamodule" else [pytest.mark.landing]


@pytest.mark.parametrize(
    ("data", "engine"),
    [pytest.param(data, engine, marks=_marks(data, engine)) for data in DATA for engine in ENGINES],
)
def test_every_engine_gives_the_same_with_all_defaults_on_and_after_a_restart(
    data: str, engine: str, tmp_path: Path, expected: Callable[[str], Weights], request: pytest.FixtureRequest
) -> None:
    if engine == "ray":
        request.getfixturevalue("one_ray")
    options: dict[str, Any] = {"enable_progress_bar": False} if engine == "fork" else {}
    run(data, ENGINES[engine](), tmp_path, rounds=2, **options)
    weights = run(data, ENGINES[engine](), tmp_path, rounds=3, resume=True, **options)
    torch.testing.assert_close(weights, expected(data), rtol=0, atol=0)


@pytest.mark.parametrize("bar", sweep([TQDMRoundBar, TQDMProgressBar], [TQDMRoundBar]))
def test_other_progress_bars(bar: Any, tmp_path: Path) -> None:
    ends = [
        run("datamodule", engine, tmp_path / engine.name, callbacks=[bar()])
        for engine in (InProcess(), Processes(2, start_method="forkserver"))
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=0)
