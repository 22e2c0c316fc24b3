"""The trainer as an object: it is pickled and copied as Lightning's own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FedAdam, History, Partition, RichRoundBar, RoundPrinter, TQDMRoundBar
from lightning_fed.engines import InProcess, Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


def loader() -> DataLoader[Any]:
    return DataLoader(toy_data(48), batch_size=8)


def by_torch(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def federated(*callbacks: Any, **options: Any) -> FederatedTrainer:
    return FederatedTrainer(
        callbacks=[Partition(2, val_fraction=0.25), FedAdam(), *callbacks], **{"max_rounds": 2, **QUIET, **options}
    )


@pytest.mark.parametrize("again", [by_torch, by_pickle, copy.deepcopy])
@pytest.mark.parametrize("engine", [InProcess(), Processes(2, start_method="fork")], ids=lambda engine: engine.name)
def test_a_trainer_that_has_fitted_is_pickled_with_what_a_checkpoint_needs(
    again: Callable[[Any], Any], engine, tmp_path
):
    history = History()
    trainer, module = federated(history, engine=engine, client_state="carry"), ToyModule()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    loaded = again(trainer)
    assert (loaded.global_step, loaded.current_epoch, loaded.max_epochs) == (2, 2, 2)
    assert loaded.round_metrics == trainer.round_metrics
    assert next(c.rows for c in loaded.callbacks if isinstance(c, History)) == history.rows
    loaded.strategy._lightning_module = module
    loaded.save_checkpoint(tmp_path / "after.ckpt")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("before.ckpt", "after.ckpt"))
    assert repr(after["callbacks"]) == repr(before["callbacks"])
    assert len(after["callbacks"]["lightning_fed.Federation"]["clients"]) == 2


@pytest.mark.parametrize("again", [by_torch, by_pickle, copy.deepcopy])
def test_a_pickled_trainer_fits_as_a_new_one(again):
    def fitted(trainer: FederatedTrainer) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = ToyModule()
        trainer.fit(module, loader())
        return module.state_dict()

    expected = fitted(federated())
    torch.testing.assert_close(fitted(again(federated())), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bar", [RichRoundBar, TQDMRoundBar, RoundPrinter])
def test_a_bar_that_has_shown_a_fit_can_be_pickled(bar):
    shown = bar()
    federated(shown, enable_progress_bar=True).fit(ToyModule(), loader())
    assert type(by_pickle(shown)) is bar
