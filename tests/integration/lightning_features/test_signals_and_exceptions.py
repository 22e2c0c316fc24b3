"""SIGTERM, Ctrl-C, exits and exceptions, while a client works, end a run as they end a plain Trainer's."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, IterableDataset

from lightning_fed import ClientError
from lightning_fed.callbacks import (
    ClientData,
    FederatedCallback,
    History,
)
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET
from tests.integration.lightning_features.fits import Each, federated, same, toy, train, val, weights


def at(hook: str, do: Callable[[], None], round: int = 2, client: int = 1) -> Callback:
    """A client callback that does something once, at a hook of one client in one round."""
    done = []

    def once(trainer: Any, module: Any) -> None:
        if not done and (trainer.current_round, trainer.client_id) == (round, client):
            done.append(True)
            do()

    return Each(hook, once)


def save_last(directory: Path) -> ModelCheckpoint:
    return ModelCheckpoint(directory, save_last=True)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_end", "on_validation_start"])
def test_sigterm_while_a_client_works_ends_the_run_after_the_round_and_it_can_be_resumed(tmp_path, hook):
    options = {"rounds": 4, "held_out": True, "enable_checkpointing": True, "seed": 1}
    expected = toy()
    federated(**options).fit(expected, train(shuffle=True), val())

    before = signal.getsignal(signal.SIGTERM)
    trained = Each("on_train_end", lambda trainer, module: (trainer.current_round, trainer.client_id))
    stopped = federated(save_last(tmp_path), client_callbacks=[at(hook, terminate), trained], **options)
    with pytest.raises(SIGTERMException):
        stopped.fit(toy(), train(shuffle=True), val())
    assert signal.getsignal(signal.SIGTERM) is before
    assert trained.seen == [(1, 0), (1, 1), (2, 0), (2, 1)]

    module, trainer = toy(), federated(save_last(tmp_path), **options)
    trainer.fit(module, train(shuffle=True), val(), ckpt_path="last")
    assert same(weights(module), weights(expected))
    assert trainer.global_step == 4


def test_sigterm_while_a_client_opens_its_data_ends_the_run_after_the_round():
    class Stream(IterableDataset):
        def __iter__(self):  # Lightning reads the first batch of a stream before any training hook
            terminate()
            yield from toy_data(24)

    trained = Each("on_train_end", lambda trainer, module: (trainer.current_round, trainer.client_id))
    clients = [train(), DataLoader(Stream(), 8), train()]
    with pytest.raises(SIGTERMException):
        federated(ClientData(clients), client_callbacks=[trained]).fit(toy(), val_dataloaders=val())
    assert trained.seen == [(1, 0), (1, 1), (1, 2)]


def test_ctrl_c_while_a_client_works_is_that_of_a_plain_trainer():
    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    reasons, history = Each("on_exception", lambda trainer, module: None), History()
    reasons.on_exception = lambda trainer, module, exception: reasons.seen.append(exception)
    after = Each("on_train_epoch_end", lambda trainer, module: weights(module))
    module = toy()
    trainer = federated(reasons, after, history, client_callbacks=[at("on_train_batch_start", interrupt)])
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(module, train(), val())
    assert stopped.value.code == 1
    assert [type(reason) for reason in reasons.seen] == [KeyboardInterrupt]
    assert trainer.interrupted
    assert signal.getsignal(signal.SIGINT) is before
    assert len(after.seen) == 1
    assert same(weights(module), after.seen[0])
    assert type(module) is ToyModule


def test_a_module_that_exits_ends_the_run_with_its_own_exit_code():
    class Leaves(ToyModule):
        def training_step(self, batch, batch_idx):
            raise SystemExit(3)

    with pytest.raises(SystemExit) as stopped:
        federated().fit(toy(Leaves), train(), val())
    assert stopped.value.code == 3


class Broken(ToyModule):
    """Fails in training in round 2."""

    def training_step(self, batch, batch_idx):
        if self.trainer.current_round == 2 and self.trainer.client_id == 1:
            raise ValueError("broken")
        return super().training_step(batch, batch_idx)


def test_after_an_exception_the_module_is_the_users_with_the_weights_of_before_the_round():
    module = toy(Broken)
    after = Each("on_train_epoch_end", lambda trainer, module: weights(module))
    seen = []
    watcher = Callback()
    watcher.on_exception = lambda trainer, module, exception: seen.append(exception)
    with pytest.raises(ClientError, match="client 1 raised ValueError: broken") as raised:
        federated(after, watcher).fit(module, train(), val())
    assert seen == [raised.value]
    assert type(module) is Broken
    assert same(weights(module), after.seen[-1])
    assert not {name for name in module.__dict__ if "lightning_fed" in name}
    L.Trainer(**QUIET, max_epochs=1).validate(module, val(), verbose=False)


def test_what_a_servers_callback_raises_comes_out_as_it_is():
    class Watcher(FederatedCallback):
        def on_client_end(self, trainer, round, stage, report):
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        federated(Watcher()).fit(toy(), train())
