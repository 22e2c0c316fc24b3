"""A federated run's and a plain Trainer's checkpoint."""

from __future__ import annotations

import pytest

from lightning_fed.testing import ToyModule
from tests.integration.checkpointing.runs import fit, save_central


@pytest.fixture(scope="module")
def federated(tmp_path_factory):
    """A checkpoint of two rounds."""
    directory = tmp_path_factory.mktemp("federated")
    fit(directory, rounds=2)
    return directory / "last.ckpt"


@pytest.fixture(scope="module")
def central(tmp_path_factory):
    """A plain Trainer's checkpoint after two epochs."""
    path = tmp_path_factory.mktemp("central") / "central.ckpt"
    save_central(ToyModule(), path)
    return path
