"""What a client's trainer leaves out of Lightning's, it leaves out for itself alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.trainer import trainer as lightning_trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lightning_fed.client.local.fit import local_evaluate, local_fit
from lightning_fed.client.local.work import LocalOptions, LocalTask, LocalWork
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.data import ClientLoaders
from lightning_fed.values.weights import read
from tests.helpers import QUIET

FOUND: list[Any] = []


class Looks(ToyModule):
    """Looks at what Lightning would keep random states with."""

    fails = False

    def on_train_start(self) -> None:
        FOUND.append(lightning_trainer.isolate_rng)
        if self.fails:
            raise ValueError("no")

    def on_validation_start(self) -> None:
        FOUND.append(lightning_trainer.isolate_rng)


def run(module: Looks, what: Any) -> Any:
    FOUND.clear()
    Trainer(max_epochs=0, **QUIET, devices=1).fit(module, DataLoader(toy_data()))
    task = LocalTask(0, 1, 0, read(module))
    loaders = ClientLoaders(DataLoader(toy_data(16)), DataLoader(toy_data(8)))
    options = LocalOptions(trainer={"accelerator": "cpu", "devices": 1})
    return what(LocalWork(module, None, loaders, task, options))


def test_no_random_states_are_kept_for_a_sanity_check_that_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(include_cuda: bool = True) -> Any:
        asked.append(include_cuda)
        return isolate_rng(include_cuda)

    monkeypatch.setattr("lightning_fed._compat.quick_trainer.isolate_rng", counted)
    monkeypatch.setattr(lightning_trainer, "isolate_rng", counted)
    run(Looks(), local_fit)
    assert asked == [True]  # by Lightning's own trainer, which sets the module up


@pytest.mark.parametrize(("what", "fails"), [(local_fit, False), (local_fit, True), (local_evaluate, False)])
def test_a_trainer_that_the_user_starts_meanwhile_or_later_is_lightnings(what: Any, fails: bool) -> None:
    module = Looks()
    module.fails = fails
    with pytest.raises(ValueError, match="no") if fails else nullcontext():
        run(module, what)
    assert [isolate_rng] == FOUND
    assert lightning_trainer.isolate_rng is isolate_rng
