"""The workloads, one function each."""

from __future__ import annotations

import torch
from common import Examples, Workload, cifar, fashion, slice_of
from torch import Tensor, nn


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def w1() -> Workload:
    """Fashion-MNIST: 10 clients x 150 steps of batch 32, MLP 784-100-100-10, evaluation each round."""
    return Workload(
        "W1", mlp, lambda k: slice_of(fashion(True), k, 4800), lambda: fashion(False),
        population=10, cohort=10, batch=32, lr=0.01, rounds=10,
    )  # fmt: skip


def w2() -> Workload:
    """Regression: 3 clients of 100 points, 1-128-64-1 MLP, 5 full-batch momentum steps, a global loss each round."""
    functions = [
        (lambda x: x**2 + 10 * torch.sin(x), 2.0),
        (lambda x: torch.exp(x) - 2 * x**2, 1.5),
        (lambda x: 3 * x**3 - 5 * torch.cos(x), 1.0),
    ]
    draws = torch.Generator().manual_seed(42)

    def points(function, noise: float) -> Examples:
        x = torch.rand(100, 1, generator=draws) * 4 - 2
        return x, function(x) + noise * torch.randn(100, 1, generator=draws)

    parts = [points(*one) for one in functions]
    everything = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    return Workload(
        "W2",
        lambda: nn.Sequential(nn.Linear(1, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)),
        lambda k: parts[k], lambda: everything,
        population=3, cohort=3, batch=100, lr=0.001, momentum=0.9, local_epochs=5, rounds=4000,
        loss=nn.functional.mse_loss, metric=nn.functional.mse_loss,
    )  # fmt: skip


class Cifar(nn.Sequential):
    """The network of pfl-research's CIFAR-10 benchmark."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
            nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
        )  # fmt: skip


def w3() -> Workload:
    """CIFAR-10, pfl's own benchmark: 1,000 clients x 50 images, cohort 50, batch 10, SGD 0.1, uniform weights."""
    return Workload(
        "W3", Cifar, lambda k: slice_of(cifar(True), k, 50), lambda: cifar(False),
        population=1000, cohort=50, batch=10, lr=0.1, rounds=30, evaluate_every=10, uniform=True,
    )  # fmt: skip


def w4() -> Workload:
    """FLUTE's headline: logistic regression, 1,000 clients x 60 images, 10 a round, batch 10, 100 rounds."""
    return Workload(
        "W4", lambda: nn.Sequential(nn.Linear(784, 10)), lambda k: slice_of(fashion(True), k, 60),
        lambda: fashion(False), population=1000, cohort=10, batch=10, lr=0.03, rounds=100, evaluate_every=20,
    )  # fmt: skip


def w5() -> Workload:
    """Big weights: resnet18, 8 clients, 2 steps each of batch 32."""
    from torchvision.models import resnet18

    def images(k: int) -> Examples:
        draws = torch.Generator().manual_seed(k)
        return torch.randn(64, 3, 32, 32, generator=draws), torch.randint(0, 10, (64,), generator=draws)

    return Workload(
        "W5", lambda: resnet18(num_classes=10), images, lambda: images(99),
        population=8, cohort=8, batch=32, lr=0.01, rounds=5, evaluate_every=1000,
    )  # fmt: skip


def w6(cohort: int, population: int = 100_000) -> Workload:
    """Scale: a large population, 90k parameters, 2 steps each."""
    pool = torch.rand(10_000, 784, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (10_000,), generator=torch.Generator().manual_seed(1))

    def client(k: int) -> tuple[Tensor, Tensor]:
        start = 64 * k % 9_000
        return pool[start : start + 64], labels[start : start + 64]

    return Workload(
        f"W6-{cohort}", mlp, client, lambda: (pool[:1000], labels[:1000]), population=population, cohort=cohort,
        batch=32, lr=0.01, rounds=max(3, 300 // cohort), evaluate_every=1000,
    )  # fmt: skip


WORKLOADS = {
    "W1": w1, "W2": w2, "W3": w3, "W4": w4, "W5": w5,
    "W6-10": lambda: w6(10), "W6-100": lambda: w6(100), "W6-1000": lambda: w6(1000),
    "W6-100-of-1000": lambda: w6(100, 1000),
}  # fmt: skip
