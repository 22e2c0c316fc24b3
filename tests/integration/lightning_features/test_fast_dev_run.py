"""fast_dev_run runs few rounds of few clients with few batches."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
)
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    Partition,
)
from lightning_fed.testing import toy_data
from tests.helpers import QUIET
from tests.integration.lightning_features.fits import Each, toy, train


@pytest.mark.parametrize(("dev_run", "rounds"), [(2, 2), (True, 1)])
def test_fast_dev_run_runs_n_rounds_of_at_most_two_clients_with_n_batches_each(tmp_path, dev_run, rounds):
    trained = Each("on_train_batch_start", lambda trainer, module: (trainer.current_round, trainer.client_id))
    evaluated = Each("on_validation_batch_start", lambda trainer, module: (trainer.current_round, trainer.client_id))
    validated = Each("on_validation_batch_start", lambda trainer, module: trainer.current_round)
    trainer = FederatedTrainer(
        max_rounds=50,
        fast_dev_run=dev_run,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[
            Partition(4, val_fraction=0.5),
            validated,
            ModelCheckpoint(monitor="nobody"),
            EarlyStopping("nobody"),
        ],
        client_callbacks=[trained, evaluated],
        enable_progress_bar=False,
        local_epochs=3,
    )
    trainer.fit(toy(), train(256, batch_size=4), DataLoader(toy_data(64), 4))
    expected = [(r, c) for r in range(1, rounds + 1) for c in (0, 1) for _ in range(rounds)]
    assert trained.seen == expected
    assert evaluated.seen == expected
    assert validated.seen == [r for r in range(1, rounds + 1) for _ in range(rounds)]
    assert trainer.global_step == rounds
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dev_run", "told"), [(False, False), (0, False), (1, True), (True, True), (2, 2)])
def test_a_client_s_trainer_says_whether_it_is_a_dev_run_as_the_server_s_does(dev_run, told):
    trained = Each("on_train_batch_start", lambda trainer, module: trainer.fast_dev_run)
    evaluated = Each("on_validation_batch_start", lambda trainer, module: module.trainer.fast_dev_run)
    trainer = FederatedTrainer(
        max_rounds=1,
        fast_dev_run=dev_run,
        callbacks=[Partition(2, val_fraction=0.5)],
        client_callbacks=[trained, evaluated],
        **QUIET,
    )
    trainer.fit(toy(), train(64, batch_size=4))
    assert {*trained.seen} == {*evaluated.seen} == {told} == {trainer.fast_dev_run}
