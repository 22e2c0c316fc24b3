"""Prints the peak memory of a round above the idle module, in module sizes, for each number of clients given."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer

WIDTH, LAYERS = 1000, 10  # 10 million parameters


class Wide(L.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module: Wide, clients: int, width: int) -> None:
    trainer = FederatedTrainer(
        max_rounds=1,
        num_clients=clients,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(clients, width)), batch_size=1))


def status(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak(clients: int) -> float:
    module = Wide(WIDTH)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    idle = status("VmRSS")
    fit(module, clients, WIDTH)
    return (status("VmHWM") - idle) / size


if __name__ == "__main__":
    torch.set_num_threads(1)
    peak(5)  # whatever is loaded or allocated on first use is there
    print(json.dumps([peak(int(clients)) for clients in sys.argv[1:]]))
