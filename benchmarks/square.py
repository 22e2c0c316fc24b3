"""The federation of which benchmarks/link.py measures the rounds: one layer, whose local steps take no time.

``server`` and ``site`` are its scripts, ``server_app`` and ``client_app`` the same for Flower's ``flwr run``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FederatedCallback
from lightning_fed.engines import SuperLink
from tests.helpers import QUIET

SITES = 3


class Square(LightningModule):
    """One layer, trained with four small batches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Steps(Callback):
    """Writes down how long a site's training takes, from the first hook of its loop to the last."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._began = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([trainer.current_round, time.perf_counter() - self._began]) + "\n")


class Clock(FederatedCallback):
    """Writes down when rounds end, and how much CPU each of some processes has had by then.

    Args:
        path: Where.
        pids: Processes, by name.
    """

    def __init__(self, path: Path, pids: Mapping[str, int]) -> None:
        self._path, self._pids = path, {**pids, "the server": os.getpid()}

    def on_round_end(self, trainer: Any, round: int, metrics: dict[str, float]) -> None:
        spent = {who: cpu(pid) for who, pid in self._pids.items()}
        with self._path.open("a") as file:
            file.write(json.dumps([round, time.perf_counter(), spent]) + "\n")


def cpu(pid: int) -> float:
    """Return the seconds of CPU that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loader(width: int, client: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(client)
    return DataLoader(TensorDataset(torch.randn(32, width, generator=generator)), batch_size=8)


def module(width: int) -> Square:
    torch.manual_seed(0)
    return Square(width)


def trainer(max_rounds: int = 1, **given: Any) -> FederatedTrainer:
    return FederatedTrainer(max_rounds=max_rounds, num_clients=SITES, **QUIET, **given)


def site(address: str, client: int, width: int) -> None:
    steps = Steps(Path(f"steps-{client}.jsonl"))
    here = trainer(client_callbacks=[steps], default_root_dir=f"site-{client}")
    here.join(address, module(width), loader(width, client), client=client, insecure=True)


def server(address: str, width: int, rounds: int, ends: str, pids: Mapping[str, int]) -> None:
    clock = Clock(Path(ends), pids)
    engine, as_sites_have = SuperLink(address, insecure=True), [Steps(Path("steps.jsonl"))]
    fit = trainer(max_rounds=rounds, engine=engine, callbacks=[clock], client_callbacks=as_sites_have)
    fit.fit(module(width))


PROJECT = """
[project]
name = "square"
version = "1.0.0"
[tool.flwr.app]
publisher = "benchmarks"
[tool.flwr.app.components]
serverapp = "benchmarks.square:server_app"
clientapp = "benchmarks.square:client_app"
[tool.flwr.app.config]
max_rounds = 1
width = 300
ends = ""
"""
server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    given = context.run_config
    clock = Clock(Path(str(given["ends"])), {})
    fit = trainer(max_rounds=int(given["max_rounds"]), callbacks=[clock])
    fit.server_app(module(int(given["width"])))(grid, context)


@client_app.train()
@client_app.query()
def answer(message: Message, context: Context) -> Message:
    width = int(context.run_config["width"])
    client = int(context.node_config["partition-id"])
    return trainer().client_app(module(width), loader(width, client))(message, context)
