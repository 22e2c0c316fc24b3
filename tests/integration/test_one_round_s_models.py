"""What clients keep belongs to a round and a way of training; it is used, or left, and where rounds mix it is said."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import APFL, ClientData, Ditto, FedDyn, FedPer, TrainableOnly
from tests.callbacks.rounds import EPOCHS, Chosen, assert_equal, encoded, federated, loaders, loss, sgd
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier

COUNTED_ON = "This trainer has done 2 rounds and fits again without ckpt_path"


class Tested(Classifier):
    """Validates and tests by its loss."""

    __test__ = False

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss(self.net, batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", loss(self.net, batch))

    def configure_optimizers(self) -> Any:
        return sgd([p for p in self.parameters() if p.requires_grad])


class Heads(L.Callback):
    """On clients: which head each trains and validates with."""

    def __init__(self, seen: list[torch.Tensor]) -> None:
        self.seen = seen

    def __deepcopy__(self, memo: dict[int, Any]) -> Heads:
        return self

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.seen.append(pl_module.net.head.weight.detach().clone())

    on_validation_start = on_train_start


def fitted(module: Any, *callbacks: Any, rounds: int = 2, ckpt_path: str | None = None, **how: Any) -> FederatedTrainer:
    pairs = [(loader, loader) for loader in loaders()]
    arguments = {**QUIET, "enable_checkpointing": True, **how}
    trainer = FederatedTrainer(
        max_rounds=rounds, local_epochs=EPOCHS, callbacks=[ClientData(pairs), *callbacks], **arguments
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def test_a_head_that_is_frozen_after_a_resume_is_the_same_on_all_clients(tmp_path: Path) -> None:
    net = encoded()
    first = [Chosen(), FedPer("net.head"), ModelCheckpoint(tmp_path, save_last=True)]
    fitted(Tested(copy.deepcopy(net), sgd), *first, rounds=1)
    module, seen = Tested(copy.deepcopy(net), sgd), []
    module.net.head.requires_grad_(False)
    second = [TrainableOnly(), ModelCheckpoint(tmp_path, save_last=True)]
    trainer = fitted(module, *second, ckpt_path="last", client_callbacks=[Heads(seen)])
    assert len(seen) >= 2 * 4
    assert all(torch.equal(head, module.net.head.weight) for head in seen)
    assert_equal(trainer.personal_module(0).state_dict(), module.state_dict())


@pytest.mark.parametrize("ask", ["test_clients", "save_personal_modules", "personal_module"])
def test_a_checkpoint_of_another_round_that_a_test_has_loaded_is_said(ask: str, tmp_path: Path) -> None:
    each = ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True)
    trainer = fitted(Tested(encoded(), sgd), FedPer("net.head"), each)
    arguments = {"save_personal_modules": [tmp_path / "own"], "personal_module": [1]}.get(ask, [])
    call, data = getattr(trainer, ask), loaders()[0]
    trainer.test(dataloaders=data, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    says_nothing(call, *arguments)
    [earlier] = tmp_path.glob("epoch=0*.ckpt")
    trainer.test(dataloaders=data, ckpt_path=str(earlier), verbose=False)
    with pytest.warns(UserWarning, match=rf"{ask}\(.*the module has the weights of .*epoch=0.*of different rounds"):
        call(*arguments)
    says_nothing(trainer.client_data, 1)  # which is of no round
    trainer.test(dataloaders=data, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    says_nothing(call, *arguments)


def test_where_clients_have_nothing_of_their_own_nothing_is_said(tmp_path: Path) -> None:
    trainer = fitted(Tested(encoded(), sgd), ModelCheckpoint(tmp_path, save_top_k=-1))
    [earlier] = tmp_path.glob("epoch=0*.ckpt")
    trainer.test(dataloaders=loaders()[0], ckpt_path=str(earlier), verbose=False)
    says_nothing(trainer.test_clients)


def says_nothing(call: Any, *arguments: Any) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call(*arguments)
    assert [str(one.message) for one in said if "rounds" in str(one.message)] == []


def test_a_second_fit_without_a_checkpoint_says_what_begins_anew(tmp_path: Path) -> None:
    module = Tested(encoded(), sgd)
    trainer = fitted(module, ModelCheckpoint(tmp_path, save_last=True))
    with pytest.warns(UserWarning, match=COUNTED_ON):
        trainer.fit(module)
    trainer = fitted(module, ModelCheckpoint(tmp_path, save_last=True), rounds=3, ckpt_path="last")
    assert trainer.global_step == 3


class Quantized(Classifier):
    """Has weights that are integers, and do not train."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(net, sgd)
        self.scale = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)

    def configure_optimizers(self) -> Any:
        return sgd(self.net.parameters())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("method", [APFL, Ditto, FedDyn])
def test_integer_parameters_take_no_part(method: Any, dtype: torch.dtype) -> None:
    net = encoded()
    expected = federated(net, sgd, method())
    got = federated(net, None, method(), kind=lambda net, _: Quantized(net, dtype))
    assert_equal(got, expected)
