"""Epochs and steps: rounds at the server, local epochs on clients."""

from __future__ import annotations

from typing import Any

import torch

from tests.integration.lightning_features.fits import Each, federated, toy, train, val


def test_counters_mean_rounds_at_the_server_and_local_epochs_on_clients():
    def server(trainer: Any, module: Any) -> Any:
        return trainer.current_round, trainer.current_epoch, module.current_epoch, trainer.global_step

    def client(trainer: Any, module: Any) -> Any:
        return module.trainer.current_round, module.trainer.client_id, module.current_epoch

    at_start, at_end = Each("on_train_epoch_start", server), Each("on_validation_end", server)
    on_clients = Each("on_train_epoch_start", client)
    trainer = federated(at_start, at_end, rounds=2, local_epochs=2, client_callbacks=[on_clients])
    module = toy()
    trainer.fit(module, train(), val())
    assert at_start.seen == [(1, 0, 0, 0), (2, 1, 1, 1)]
    assert at_end.seen == [(1, 0, 0, 1), (2, 1, 1, 2)]
    assert on_clients.seen == [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (2, 0, 2), (2, 0, 3), (2, 1, 2), (2, 1, 3)]
    assert (trainer.current_epoch, trainer.global_step) == (2, 2)


def test_a_client_evaluates_in_the_epoch_that_it_trained_last():
    epochs = Each("on_validation_epoch_start", lambda trainer, module: (trainer.current_round, module.current_epoch))
    federated(rounds=2, local_epochs=3, held_out=True, client_callbacks=[epochs]).fit(toy(), train())
    assert epochs.seen == [(1, 2), (1, 2), (2, 5), (2, 5)]


def test_a_checkpoint_saved_after_fit_knows_how_far_it_is(tmp_path):
    trainer = federated()
    trainer.fit(toy(), train(), val())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    checkpoint = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (3, 3)
    more = federated(rounds=5)
    more.fit(toy(), train(), val(), ckpt_path=tmp_path / "after.ckpt")
    assert (more.current_epoch, more.global_step) == (5, 5)
