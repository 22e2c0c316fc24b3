"""What all workloads and peers share: the description of a workload, its data, and how a peer reports."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DATA = Path(os.environ.get("LIGHTNING_FED_DATA", Path(__file__).parents[2] / "shared" / "data"))
CACHE = Path(__file__).parent / ".cache"
SEED = int(os.environ.get("BENCH_SEED", 0))  # of initial weights, cohorts and batch orders; data is dealt out alike
Examples = tuple[Tensor, Tensor]


@dataclass
class Workload:
    """A federation that every peer runs alike: same model, data, batches, steps, averaging and evaluation.

    Attributes:
        name: Its number.
        model: Builds the module.
        client: The examples of a client, (n, ...) and (n,).
        test: The examples that the server evaluates on.
        loss: Of predictions and targets.
        metric: What the server reports, of predictions and targets.
    """

    name: str
    model: Callable[[], nn.Module]
    client: Callable[[int], Examples]
    test: Callable[[], Examples]
    population: int
    cohort: int
    batch: int
    lr: float
    rounds: int
    momentum: float = 0.0
    local_epochs: int = 1
    evaluate_every: int = 1
    uniform: bool = False
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    metric: Callable[[Tensor, Tensor], Tensor] = field(
        default=lambda logits, y: (logits.argmax(-1) == y).float().mean()
    )

    def initial(self) -> nn.Module:
        """The module with the weights that all peers start from."""
        torch.manual_seed(SEED)
        return self.model()

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=self.lr, momentum=self.momentum)

    def due(self, round: int) -> bool:
        """Whether the server evaluates after a round, from 1."""
        return round % self.evaluate_every == 0

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> float:
        module.eval()
        device = next(module.parameters()).device
        x, y = (tensor.to(device) for tensor in self.test())
        predicted = torch.cat([module(part) for part in x.split(1000)])
        module.train()
        return float(self.metric(predicted, y))


class Clock:
    """A peer's times: ``start`` before the first round, ``lap`` after each."""

    def __init__(self) -> None:
        self.laps: list[float] = []

    def start(self) -> None:
        self.laps = [time.time()]

    def lap(self) -> None:
        self.laps.append(time.time())

    def report(self, metric: float, **more: Any) -> None:
        """Prints the one line that the runner reads."""
        began = float(os.environ.get("BENCH_BEGAN", self.laps[0]))
        rounds = [b - a for a, b in zip(self.laps, self.laps[1:], strict=False)]
        line = {"start": self.laps[0] - began, "rounds": rounds, "total": time.time() - began, "metric": metric, **more}
        line["peak"] = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        print("RESULT " + json.dumps(line), flush=True)


@lru_cache
def fashion(train: bool) -> Examples:
    """Fashion-MNIST as (n, 784) floats in [0, 1]; shuffled once, so that slices are IID."""
    from torchvision.datasets import FashionMNIST

    images = FashionMNIST(str(DATA), train=train)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.data[order].flatten(1) / 255, images.targets[order]


@lru_cache
def cifar(train: bool) -> Examples:
    """CIFAR-10 as (n, 3, 32, 32) floats, normalised; decoded once and kept beside this file."""
    file = CACHE / f"cifar10-{train}.pt"
    if not file.exists():
        import datasets
        import numpy as np

        name = "train.parquet" if train else "test.parquet"
        table = datasets.Dataset.from_parquet(str(DATA / "cifar10" / name)).with_format("numpy")
        images = torch.stack([torch.from_numpy(np.asarray(image)) for image in table["image"]])
        CACHE.mkdir(exist_ok=True)
        torch.save((images.permute(0, 3, 1, 2).contiguous(), torch.as_tensor(np.asarray(table["label"]))), file)
    images, labels = torch.load(file)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return (images[order].float() / 255 - 0.47) / 0.25, labels[order]


def slice_of(examples: Examples, client: int, size: int) -> Examples:
    """One client's examples of data that is dealt out in equal parts."""
    part = slice(client * size, (client + 1) * size)
    return examples[0][part], examples[1][part]
