"""What a fit works with, what it leaves, and what all fits of a trainer have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_fed.client.local.work import LocalOptions
from lightning_fed.client.side import ClientSide
from lightning_fed.server.checkpoint import Found
from lightning_fed.server.deal import Deal
from lightning_fed.server.script import Script


@dataclass
class Settings:
    """What all fits of a trainer have in common, besides who decides what.

    Attributes:
        seed: The run's seed.
        timeout: Seconds to wait for replies.
        max_examples: The greatest number of examples that a client is believed to have.
        max_clients: Truncates cohorts (``fast_dev_run``).
        client_storage: The folder for what clients keep, or ``None`` for memory.
    """

    seed: int
    timeout: float
    max_examples: float
    max_clients: int | None
    client_storage: Path | None = None


@dataclass
class Resumed:
    """What a run goes on from.

    Attributes:
        found: What the checkpoint holds.
        script: How the script sets the run up, before callbacks load what the checkpoint holds.
    """

    found: Found
    script: Script


@dataclass
class FitInputs:
    """What a fit works with.

    Attributes:
        grid: Where the clients are reached.
        deal: Which data each has.
        side: All else that they work with.
        engine: The name of what gave the grid, for the summary.
        resumed: What the run goes on from, or ``None``.
    """

    grid: Grid
    deal: Deal
    side: ClientSide
    engine: str
    resumed: Resumed | None = None


@dataclass
class Fitted:
    """What of a fit stays with its trainer, for who asks for clients' models afterwards.

    Attributes:
        module: The module.
        datamodule: The server's datamodule, or ``None``.
        deal: Which data each client has.
        options: What all local fits had in common.
    """

    module: LightningModule
    datamodule: LightningDataModule | None
    deal: Deal
    options: LocalOptions
