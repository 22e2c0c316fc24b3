"""What CONTRIBUTING.md shows is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def test_the_callback_that_only_looks() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names: dict[str, Any] = {}
    for block in blocks[:2]:
        exec(block, names)
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, callbacks=[names["UpdateNorm"]()], **QUIET)
    trainer.fit(ToyModule(), DataLoader(toy_data(16), 8))
    assert trainer.callback_metrics["update_norm"] > 0


def test_the_files_and_folders_that_it_names_are_there() -> None:
    root = Path(__file__).parent.parent
    for name in set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:/|\.py))`", TEXT)):
        assert (root / name).exists() or (root / "lightning_fed" / name).exists(), name
