"""LightningCLI builds a federation from a YAML file, with nothing but another ``trainer_class``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr_datasets.partitioner import DirichletPartitioner
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from torch.utils.data import DataLoader

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import History, PartialParticipation, Partition, Personal
from lightning_fed.engines import InProcess
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import sweep

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),
    pytest.mark.filterwarnings("ignore:.*will be overridden by `LightningCLI.configure_optimizers`"),
    pytest.mark.filterwarnings("ignore:(?s).*deprecated in v4.49.0"),
]

CONFIG = """
seed_everything: 7
trainer:
  max_rounds: 3
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  gradient_clip_val: 0.5
  client_state: carry
  engine:
    class_path: lightning_fed.engines.InProcess
  client_callbacks:
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
  callbacks:
    - class_path: lightning_fed.callbacks.Partition
      init_args:
        partitioner:
          class_path: flwr_datasets.partitioner.DirichletPartitioner
          init_args: {num_partitions: 4, partition_by: label, alpha: 1.0, min_partition_size: 4}
        val_fraction: 0.25
    - class_path: lightning_fed.callbacks.PartialParticipation
      init_args: {fraction_train: 0.5}
    - class_path: lightning_fed.callbacks.History
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: val_loss, patience: 5}
model:
  hidden: 4
data:
  batch_size: 16
"""


class ToyData(LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(toy_data(64), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(toy_data(32, seed=1), self.batch_size)


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    """The file, in a directory of its own; the CLI sets the run's seed for the whole process."""
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    Path("config.yaml").write_text(CONFIG)
    return "config.yaml"


def cli(*args: str, **options: Any) -> LightningCLI:
    options = {"save_config_callback": None, **options}
    return LightningCLI(ToyModule, ToyData, trainer_class=FederatedTrainer, args=list(args), **options)


def of(trainer: FederatedTrainer, cls: type) -> Any:
    (found,) = [callback for callback in trainer.callbacks if isinstance(callback, cls)]
    return found


def test_what_may_change_from_round_to_round_is_a_list_there(config):
    lists = CONFIG.replace("fraction_train: 0.5", "fraction_train: [0.25, 1.0], weights: [1, 2, 3, 4]")
    lists = lists.replace("  max_rounds: 3\n", "  max_rounds: 3\n  local_epochs: [1, 2]\n")
    assert lists.count("[") == 3
    Path(config).write_text(lists)
    trainer = cli("fit", "--config", config).trainer
    assert trainer.local_options.epochs == (1, 2)
    assert of(trainer, PartialParticipation).size("train", 4, 2) == 4
    assert of(trainer, PartialParticipation).weights == [1, 2, 3, 4]


def test_clients_by_a_column_are_written_there_too(config):
    lines = CONFIG.splitlines()
    [begin] = [i for i, line in enumerate(lines) if line.strip() == "partitioner:"]
    lines[begin : begin + 3] = ["        by: targets"]
    Path(config).write_text("\n".join(lines))
    made = cli("--config", config, run=False)
    assert of(made.trainer, Partition).by == "targets"


@pytest.mark.parametrize("name", ["Personal", "FedPer", "FedRep"])
def test_layers_that_stay_with_clients_are_named_there(config, name):
    given = f"    - class_path: lightning_fed.callbacks.{name}\n      init_args: {{patterns: [net.2, '*.bias']}}\n"
    Path(config).write_text(
        CONFIG.replace("  callbacks:\n    - class_path: light", f"  callbacks:\n{given}    - class_path: light", 1)
    )
    assert Path(config).read_text().count(name) == 1
    assert of(cli("--config", config, run=False).trainer, Personal).patterns == ("net.2", "*.bias")


def test_a_yaml_file_and_a_few_words_on_the_command_line_make_a_federation(config):
    made = cli("fit", "--config", config, "--optimizer", "Adam", "--optimizer.lr", "0.05", "--trainer.local_epochs=2")
    trainer = made.trainer
    assert isinstance(trainer, FederatedTrainer)
    assert trainer.seed == 7
    assert isinstance(trainer.engine, InProcess)
    options = trainer.local_options
    assert (options.epochs, options.client_state) == (2, "carry")
    assert options.trainer["gradient_clip_val"] == 0.5
    assert [type(callback) for callback in options.callbacks] == [LearningRateMonitor]
    assert isinstance(of(trainer, Partition).partitioner, DirichletPartitioner)
    assert of(trainer, PartialParticipation).fraction_train == 0.5
    assert of(trainer, EarlyStopping).patience == 5

    assert trainer.global_step == 3
    rows = of(trainer, History).rows
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert {"train_loss", "clients/val_loss", "val_loss"} <= rows[-1].keys()
    assert made.model.net[0].out_features == 4
    assert type(made.model) is ToyModule


def test_the_optimizer_of_the_command_line_trains_the_clients(config):
    """LightningCLI puts configure_optimizers into the module's ``__dict__``, where it would shadow the server's."""

    def weights(*optimizer: str) -> torch.Tensor:
        seed_everything(7)
        return cli("fit", "--config", config, *optimizer).model.net[0].weight

    adam = weights("--optimizer", "Adam", "--optimizer.lr", "0.05")
    assert torch.equal(adam, weights("--optimizer=torch.optim.Adam", "--optimizer.lr", "0.05"))
    assert not torch.equal(adam, weights("--optimizer", "Adam", "--optimizer.lr", "0.01"))
    assert not torch.equal(adam, weights())


def test_after_a_fit_the_optimizer_of_the_command_line_is_still_the_modules(config):
    given = ["--optimizer", "Adam", "--lr_scheduler", "ExponentialLR", "--lr_scheduler.gamma=0.5"]
    model = cli("fit", "--config", config, *given).model
    optimizers, schedulers = model.configure_optimizers()
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.Adam]
    assert [type(scheduler) for scheduler in schedulers] == [torch.optim.lr_scheduler.ExponentialLR]


SEEN: list[tuple[int, float]] = []


class Rates(ToyModule):
    """Notes the learning rate that each local fit begins with."""

    def on_train_start(self) -> None:
        SEEN.append((self.trainer.current_round, self.optimizers().param_groups[0]["lr"]))


class MakesItsOwn(Rates):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


@pytest.mark.parametrize("client_state", sweep(["global", "carry", "reset"], ["global"]))
@pytest.mark.filterwarnings("ignore:client_state='reset' begins schedules anew")
def test_the_optimizer_and_schedule_of_the_command_line_are_fresh_in_every_local_fit(client_state):
    """LightningCLI makes them once, and configure_optimizers gives the same objects at every call."""
    given = ["--optimizer=SGD", "--optimizer.lr=0.1", "--optimizer.momentum=0.9"]
    given += ["--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"]
    trainer = ["--trainer.max_rounds=2", "--trainer.num_clients=3", "--trainer.accelerator=cpu"]
    trainer += [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")]

    def fit(module: type[Rates], *words: str) -> tuple[torch.Tensor, list[tuple[int, float]]]:
        seed_everything(7)
        SEEN.clear()
        words = ("fit", *trainer, f"--trainer.client_state={client_state}", *words)
        made = LightningCLI(module, ToyData, trainer_class=FederatedTrainer, args=[*words], save_config_callback=None)
        return made.model.net[0].weight, SEEN.copy()

    weight, rates = fit(Rates, *given)
    expected, its_own = fit(MakesItsOwn)
    assert rates == its_own == [(1, 0.1)] * 3 + [(2, 0.05 if client_state != "reset" else 0.1)] * 3
    assert torch.equal(weight, expected)
    engine = ["--trainer.engine=lightning_fed.engines.Processes", "--trainer.engine.num_workers=2"]
    assert torch.equal(fit(Rates, *given, *engine, "--trainer.engine.start_method=fork")[0], expected)


def test_num_clients_is_enough():
    given = ["--trainer.max_rounds=1", "--trainer.num_clients=2", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    trainer = cli("fit", *given, "--trainer.enable_checkpointing=false").trainer
    assert trainer.global_step == 1
    assert trainer.owners.partition.num_clients == 2


def test_the_printed_config_makes_the_same_federation(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli("fit", "--config", config, "--print_config")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    tree = yaml.safe_load(printed)["trainer"]
    assert tree["max_rounds"] == 3
    # Lightning's own defaults are among them, and not refused.
    assert (tree["max_epochs"], tree["max_steps"], tree["strategy"]) == (None, -1, "auto")

    Path("printed.yaml").write_text(printed)
    seed_everything(7)
    one = cli("fit", "--config", config)
    seed_everything(7)
    other = cli("fit", "--config", "printed.yaml")
    assert of(one.trainer, History).rows == of(other.trainer, History).rows


def test_the_config_saved_beside_the_logs_can_be_run_again(config):
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=logs"]
    first = cli("fit", "--config", config, *logger, save_config_callback=SaveConfigCallback)
    saved = Path(first.trainer.log_dir) / "config.yaml"
    assert saved.exists()
    again = cli("fit", "--config", str(saved))
    assert of(again.trainer, History).rows == of(first.trainer, History).rows


def test_fit_goes_on_and_validate_reads_a_checkpoint_from_the_command_line(config):
    keep = ["--trainer.enable_checkpointing=true", "--trainer.default_root_dir=here"]
    first = cli("fit", "--config", config, *keep)
    path = first.trainer.checkpoint_callback.best_model_path
    more = cli("fit", "--config", config, *keep, "--trainer.max_rounds=5", "--ckpt_path", path)
    assert [row["round"] for row in of(more.trainer, History).rows] == [1, 2, 3, 4, 5]

    validated = cli("validate", "--config", config, "--ckpt_path", path)
    last = of(first.trainer, History).rows[-1]["val_loss"]
    assert float(validated.trainer.callback_metrics["val_loss"]) == pytest.approx(last)


def test_max_epochs_on_the_command_line_is_refused_with_what_to_write(config):
    with pytest.raises(ConfigurationError, match=r"max_epochs=3 is not for a FederatedTrainer.*max_rounds=3"):
        cli("fit", "--config", config, "--trainer.max_epochs=3")
