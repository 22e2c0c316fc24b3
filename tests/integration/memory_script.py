"""Prints the peak memory of a round above the idle module, in module sizes, for each number of clients given.

``16:8`` is 16 clients, of which 8 at a time are vectorized.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer

WIDTH, LAYERS = 500, 10  # 2.5 million parameters


class Wide(L.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module: Wide, clients: int, width: int, at_once: int) -> None:
    trainer = FederatedTrainer(
        max_rounds=1,
        num_clients=clients,
        vectorize_clients=at_once or False,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(clients, width)), batch_size=1))


def memory(kind: str) -> int:
    """Bytes of this process, as the kernel counts them."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0])


def peak(clients: int, at_once: int) -> float:
    module = Wide(WIDTH)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    idle = memory("VmRSS")
    fit(module, clients, WIDTH, at_once)
    return (memory("VmHWM") - idle) / size


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = [(int(clients), int(at_once or 0)) for clients, _, at_once in (run.partition(":") for run in sys.argv[1:])]
    for at_once in sorted({at_once for _, at_once in runs}):
        peak(3, at_once)  # whatever is loaded or allocated on first use is there
    print(json.dumps([peak(*run) for run in runs]))
