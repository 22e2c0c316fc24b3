"""What docs/clients.md shows is run, each section by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

TEXT = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the code finds: a module, and lines of five speakers."""
    monkeypatch.chdir(tmp_path)
    original = FederatedTrainer.__init__

    def quiet(self: FederatedTrainer, **arguments: Any) -> None:
        original(self, **{**QUIET, **arguments})

    monkeypatch.setattr(FederatedTrainer, "__init__", quiet)
    data = toy_data(60)
    data.speaker = [f"speaker {i % 5 if i < 59 else 'who speaks once'}" for i in range(60)]
    return {"model": ToyModule(), "train": DataLoader(data, batch_size=8, shuffle=True), "torch": torch, "L": L}


@pytest.mark.parametrize("section", SECTIONS)
def test_the_code_of_a_section_runs(section: str, names: dict[str, Any]) -> None:
    exec("from lightning_fed import FederatedTrainer; from lightning_fed.callbacks import *", names)
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, section, "exec"), names)


def test_clients_are_the_speakers(names: dict[str, Any]) -> None:
    exec(re.findall(r"```python\n(.*?)```", SECTIONS["Data that is apart already"], re.S)[0], names)
    assert names["partition"].client_names == [f"speaker {i}" for i in range(5)]
    assert Path("speakers.png").stat().st_size > 2000
