"""What a module finds at its trainer and its data on a client, and at the server in hooks that both have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET, SuperLinkLike, in_flower

FOUND: list[Any] = []


class Data(LightningDataModule):
    def __init__(self, examples: int = 48) -> None:
        super().__init__()
        self.examples = examples

    def train_dataloader(self) -> DataLoader:
        return DataLoader(toy_data(self.examples), 8)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(toy_data(8), 8)


class Looks(ToyModule):
    """Asks its datamodule for the training data in the hooks that server and clients have."""

    def on_fit_start(self) -> None:
        client = getattr(self.trainer, "client_id", "server")
        own = self.trainer.datamodule or self
        loader = own.train_dataloader()
        FOUND.append((client, len(loader.dataset), len(loader)))


class OwnLoader(Looks):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(toy_data(48), 8)


def fit(module: Any, *args: Any, **options: Any) -> list[Any]:
    FOUND.clear()
    data = {name: options.pop(name) for name in ("datamodule",) if name in options}
    FederatedTrainer(**{"max_rounds": 1, "num_clients": 3, **QUIET, **options}).fit(module, *args, **data)
    return FOUND.copy()


EACH = [("server", 48, 6), (0, 16, 2), (1, 16, 2), (2, 16, 2)]


def test_a_datamodule_s_train_loader_in_on_fit_start_is_the_clients_own_and_at_the_server_the_user_s() -> None:
    assert fit(Looks(), datamodule=Data()) == EACH
    assert fit(Looks(), Data()) == EACH


def test_a_module_s_own_train_loader_is_the_clients_part_on_a_client() -> None:
    assert fit(OwnLoader()) == EACH


def test_a_client_s_own_datamodule_gives_its_own_loader() -> None:
    class Asks(ToyModule):
        def on_fit_start(self) -> None:
            if (client := getattr(self.trainer, "client_id", None)) is not None:
                FOUND.append((client, len(self.trainer.datamodule.train_dataloader().dataset)))

    clients = ClientData([Data(8), Data(24)])
    assert fit(Asks(), num_clients=None, callbacks=[clients]) == [(0, 8), (1, 24)]


class Notes(ToyModule):
    """Writes where it would write pictures into a file of that name, also from another process."""

    def on_train_start(self) -> None:
        self.note("train")

    def on_validation_start(self) -> None:
        if hasattr(self.trainer, "client_id"):
            self.note("validation")

    def note(self, stage: str) -> None:
        Path(f"{stage} {self.trainer.client_id}").write_text(f"{self.trainer.log_dir} {self.trainer.default_root_dir}")


@pytest.mark.parametrize("engine", ["in_process", "processes"])
@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger, None])
def test_log_dir_and_default_root_dir_are_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: Any, engine: str
) -> None:
    monkeypatch.chdir(tmp_path)
    clients = [(DataLoader(toy_data(16), 8), DataLoader(toy_data(8), 8))] * 2
    trainer = FederatedTrainer(
        max_rounds=1,
        callbacks=[ClientData(clients)],
        engine=Processes(2, start_method="fork") if engine == "processes" else engine,
        **{**QUIET, "logger": logger(tmp_path / "logs") if logger else False, "default_root_dir": tmp_path / "root"},
    )
    trainer.fit(Notes())
    assert trainer.log_dir.startswith(str(tmp_path / ("logs" if logger else "root")))
    said = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    where = f"{trainer.log_dir} {tmp_path / 'root'}"
    assert said == {f"{stage} {client}": where for stage in ("train", "validation") for client in (0, 1)}


def test_nothing_is_written_into_the_server_s_log_dir_by_clients_trainers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = FederatedTrainer(max_rounds=2, num_clients=3, **{**QUIET, "logger": logger})
    trainer.fit(ToyModule(), DataLoader(toy_data(48), 8))
    assert {path.name for path in Path(trainer.log_dir).iterdir()} == {"hparams.yaml", "metrics.csv"}
    assert [path.name for path in tmp_path.iterdir()] == ["lightning_logs"]
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


def test_an_app_without_a_server_has_the_root_directory_for_its_logs(tmp_path: Path) -> None:
    module = Notes()
    trainer = FederatedTrainer(max_rounds=1, num_clients=1, **{**QUIET, "default_root_dir": tmp_path})
    app = trainer.client_app(module, DataLoader(toy_data(16), 8))
    grid = SuperLinkLike(app, {7: {"partition-id": 0, "num-partitions": 1}})
    other = FederatedTrainer(max_rounds=1, num_clients=1, **QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        server = other.server_app(ToyModule(), DataLoader(toy_data(16), 8))
        in_flower(lambda: server(grid, next(iter(grid.contexts.values()))))
        assert (tmp_path / "train 0").read_text() == f"{tmp_path} {tmp_path}"


def test_a_client_on_slurm_does_not_resume_from_the_checkpoint_that_a_requeued_server_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(rounds: int, **how: Any) -> tuple[FederatedTrainer, torch.Tensor]:
        torch.manual_seed(0)
        module = ToyModule()
        trainer = FederatedTrainer(num_clients=2, max_rounds=rounds, default_root_dir=tmp_path, **QUIET)
        trainer.fit(module, DataLoader(toy_data(16), 8), **how)
        return trainer, module.net[0].weight.detach()

    _, expected = trained(3)
    requeued, _ = trained(1)
    requeued.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    for name, value in {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "1", "NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    trainer, weight = trained(3)

    assert trainer.current_epoch == 3
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)


def test_who_saves_checkpoints_is_the_server_s_plugin_alone(tmp_path: Path) -> None:
    trainer = FederatedTrainer(
        num_clients=2, max_rounds=3, default_root_dir=tmp_path, logger=False, plugins=[AsyncCheckpointIO()]
    )
    trainer.fit(ToyModule(), DataLoader(toy_data(16), 8))
    assert list(tmp_path.rglob("*.ckpt"))
