"""What `quality.py` runs: settings, partitions and methods of two published comparisons, with their accuracies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr_datasets.partitioner import DirichletPartitioner, PathologicalPartitioner

from lightning_fed.callbacks import APFL, Ditto, FedBN, FedNova, FedPer, FedProx, FedRep, Scaffold

Make = Callable[..., Any]


@dataclass(frozen=True)
class Settings:
    """What all runs of a table have in common; another value makes another run.

    Attributes:
        images: How many of the 60,000 training images are dealt out.
        val_fraction: The part of each client's images that it is evaluated on; 0 where the server evaluates.
    """

    clients: int
    images: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    rounds: int
    local_epochs: int
    val_fraction: float = 0.0


@dataclass(frozen=True)
class Method:
    """A row: the callbacks of a method, what it changes in the settings, and the published accuracies by partition."""

    callbacks: Callable[[], list[Any]]
    published: dict[str, str]
    local_epochs: int = 0
    norm: bool = False


# NIID-Bench (Li et al. 2022), reproduced by Flower's baseline niid_bench: 50 rounds of 10 local epochs, 60,000 images.
DRIFT = Settings(10, 10_000, 64, 0.01, 0.9, 1e-5, rounds=10, local_epochs=5)
DRIFT_PARTITIONS: dict[str, Make] = {
    "IID": lambda clients, seed: clients,
    "Dirichlet 0.5": lambda clients, seed: dirichlet(clients, 0.5, seed),
    "two labels": lambda clients, seed: labels_each(clients, 2, seed),
    "three labels": lambda clients, seed: labels_each(clients, 3, seed),
}
DRIFT_METHODS = {
    "FedAvg": Method(
        lambda: [],
        dict(zip(DRIFT_PARTITIONS, ("89.2 ± 0.5", "88.1 ± 0.3", "78.1 ± 2.5", "82.4 ± 1.5"), strict=True)),
    ),
    "FedProx": Method(
        lambda: [FedProx(mu=0.01)],
        dict(zip(DRIFT_PARTITIONS, ("89.4 ± 0.1", "88.2 ± 0.4", "78.1 ± 1.0", "83.0 ± 0.5"), strict=True)),
    ),
    "SCAFFOLD": Method(
        lambda: [Scaffold()],
        dict(zip(DRIFT_PARTITIONS, ("89.3 ± 0.3", "88.4 ± 0.3", "33.8 ± 41.2", "80.3 ± 5.0"), strict=True)),
    ),
    "FedNova": Method(
        lambda: [FedNova()],
        dict(zip(DRIFT_PARTITIONS, ("89.4 ± 0.1", "88.2 ± 0.1", "71.7 ± 2.3", "82.0 ± 1.3"), strict=True)),
    ),
}

# PFLlib: 20 clients, batch 10, one local epoch, 2,000 rounds, 70,000 images of which a quarter is held out.
PERSONAL = Settings(20, 3_000, 10, 0.05, 0.0, 0.0, rounds=50, local_epochs=1, val_fraction=0.25)
STRONG, MILD = "Dirichlet 0.1", "Dirichlet 10"
PERSONAL_PARTITIONS: dict[str, Make] = {
    STRONG: lambda clients, seed: dirichlet(clients, 0.1, seed),
    MILD: lambda clients, seed: dirichlet(clients, 10.0, seed),
}
PERSONAL_METHODS = {
    "FedAvg": Method(lambda: [], {STRONG: "85.9", MILD: ""}),
    "FedPer": Method(lambda: [FedPer("head")], {STRONG: "97.4", MILD: ""}),
    "FedRep": Method(lambda: [FedRep("head")], {STRONG: "97.6"}, local_epochs=2),
    "Ditto": Method(lambda: [Ditto(lam=0.1)], {STRONG: "97.5"}),
    "APFL": Method(lambda: [APFL(alpha=0.5)], {STRONG: "97.3"}),
    "FedAvg, BatchNorm": Method(lambda: [], {STRONG: ""}, norm=True),
    "FedBN": Method(lambda: [FedBN()], {STRONG: ""}, norm=True),
}
TABLES = {
    "drift": (DRIFT, DRIFT_PARTITIONS, DRIFT_METHODS),
    "personal": (PERSONAL, PERSONAL_PARTITIONS, PERSONAL_METHODS),
}


def labels_each(clients: int, labels: int, seed: int) -> PathologicalPartitioner:
    """NIID-Bench's: client i has label i and others that are drawn; clients share a label's images evenly."""
    how = {"num_classes_per_partition": labels, "class_assignment_mode": "first-deterministic", "seed": seed}
    return PathologicalPartitioner(clients, partition_by="label", **how)


def dirichlet(clients: int, alpha: float, seed: int) -> DirichletPartitioner:
    """As both papers' code has it: drawn again until the smallest client has enough images."""
    return DirichletPartitioner(clients, partition_by="label", alpha=alpha, min_partition_size=12, seed=seed)
