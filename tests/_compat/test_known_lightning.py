"""A Lightning that nobody has compared the clients' loops with: slower, said, and never other numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from torch.utils.data import DataLoader

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed._compat import known_lightning as known
from lightning_fed.callbacks import FederatedCallback
from lightning_fed.client.local.trainer import LocalTrainer
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.weights import read
from tests.helpers import QUIET

SOURCES = Path(lightning.pytorch.__file__).parent


@contextmanager
def no_lightning_known() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "KNOWN", {})
        known.is_known.cache_clear()
        try:
            yield
        finally:
            known.is_known.cache_clear()


@pytest.fixture
def unknown() -> Iterator[None]:
    with no_lightning_known():
        yield


class Loops(FederatedCallback):
    """Notes how clients optimize."""

    def __init__(self) -> None:
        self.seen: set[type] = set()

    def local_callbacks(self) -> list[Any]:
        return [self]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if isinstance(trainer, LocalTrainer):
            self.seen.add(type(trainer.fit_loop.epoch_loop.automatic_optimization))


def fit(**options: Any) -> Any:
    torch.manual_seed(0)
    module = ToyModule()
    trainer = FederatedTrainer(max_rounds=2, num_clients=3, **{**QUIET, **options})
    trainer.fit(module, DataLoader(toy_data(48), 8, shuffle=True))
    return read(module), {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_installed_lightning_is_known() -> None:
    assert known.is_known()


@pytest.mark.parametrize(
    "options", [{}, {"engine": Processes(2, start_method="fork")}], ids=["in process", "processes"]
)
def test_clients_use_lightning_s_own_loop_to_the_same_bits(options: dict[str, Any]) -> None:
    expected = fit(**options)
    with (
        no_lightning_known(),
        pytest.warns(UserWarning, match="is not one that lightning_fed was compared with") as said,
    ):
        found = fit(**options)
    assert len([one for one in said if "compared with" in str(one.message)]) == 1
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1] == expected[1]


def test_its_optimization_is_lightning_s(unknown: None) -> None:
    loops = Loops()
    fit(callbacks=[loops])
    assert loops.seen == {_AutomaticOptimization}


def test_clients_are_not_vectorized(unknown: None) -> None:
    with pytest.warns(UserWarning, match=r"clients train one after the other: Lightning .* is not one that"):
        fit(vectorize_clients=True)
    with pytest.raises(ConfigurationError, match=r"cannot be vectorized: Lightning .* is not one that"):
        fit(vectorize_clients="require")


def test_a_changed_file_is_another_lightning(tmp_path: Path) -> None:
    for name in known._COPIED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCES / name, tmp_path / name)
    assert known.digest(tmp_path) == known.digest(SOURCES)
    with (tmp_path / known._COPIED[-1]).open("a") as file:
        file.write("\nchanged = True\n")
    assert known.digest(tmp_path) not in known.KNOWN
