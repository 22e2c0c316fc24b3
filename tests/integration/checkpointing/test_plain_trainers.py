"""Plain Trainers' checkpoints: refused by a federated fit, with the way to their weights; and the other way round."""

from __future__ import annotations

import re

import lightning as L
import pytest
import torch

from lightning_fed import ConfigurationError
from lightning_fed.testing import ToyModule
from tests.helpers import QUIET
from tests.integration.checkpointing.runs import (
    FEDERATION,
    OneTensor,
    Toy,
    fit,
    loader,
    notes,
    optimizers_of,
    save_central,
    saved,
    trainer_of,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:You defined a `validation_step` but"
)


CENTRAL = {
    "one optimizer": ToyModule,
    "no optimizer": optimizers_of(lambda self: None),
    "two parameter groups": optimizers_of(
        lambda self: torch.optim.SGD([{"params": [p]} for p in self.net[0].parameters()], lr=0.1)
    ),
    "one tensor": OneTensor,
}


@pytest.mark.parametrize("name", CENTRAL)
@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")
def test_a_plain_trainer_s_checkpoint_is_refused_with_the_way_to_its_weights(tmp_path, name):
    module, path = CENTRAL[name], tmp_path / "central.ckpt"
    save_central(module(), path)
    way_out = rf"{module.__name__}\.load_from_checkpoint\('{re.escape(str(path))}'\), and fit that without ckpt_path"
    with pytest.raises(ConfigurationError, match=rf"is a checkpoint of a plain Trainer after epoch 2, .*{way_out}"):
        trainer_of(tmp_path).fit(module(), loader(), ckpt_path=path)


@pytest.mark.filterwarnings("ignore:.*checkpoint was saved|.*upgraded your loaded checkpoint")
def test_a_checkpoint_of_lightning_1_is_refused_with_the_way_to_its_weights(tmp_path, central):
    checkpoint, path = saved(central), tmp_path / "old.ckpt"
    del checkpoint["loops"]
    checkpoint |= {"pytorch-lightning_version": "1.5.10", "epoch": 2, "global_step": 8}
    torch.save(checkpoint, path)
    with pytest.raises(
        ConfigurationError, match=r"is a checkpoint of a plain Trainer after epoch 2, .*ToyModule\.load_"
    ):
        trainer_of(tmp_path).fit(ToyModule(), loader(), ckpt_path=path)


@pytest.mark.parametrize("by", ["a plain Trainer", "a FederatedTrainer"])
def test_a_checkpoint_of_weights_only_is_refused_with_the_way_to_them(tmp_path, federated, by):
    path = tmp_path / "weights.ckpt"
    if by == "a plain Trainer":
        save_central(ToyModule(), path, weights_only=True)
    else:
        _, trainer = fit(tmp_path, rounds=1)
        trainer.save_checkpoint(path, weights_only=True)
    with pytest.raises(ConfigurationError, match=r"holds weights only .*ToyModule\.load_from_checkpoint\("):
        trainer_of(tmp_path).fit(ToyModule(), loader(), ckpt_path=path)


def test_the_way_out_works(tmp_path, central):
    module = ToyModule.load_from_checkpoint(central)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert all(torch.equal(value, saved(central)["state_dict"][name]) for name, value in before.items())
    trainer = trainer_of(tmp_path, rounds=1)
    trainer.fit(module, loader())
    assert trainer.current_epoch == 1
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_plain_trainer_s_checkpoint_is_validated_and_tested(tmp_path, stage, weights_only):
    path, module = tmp_path / "central.ckpt", Toy()
    save_central(module, path, weights_only=weights_only)
    ours = getattr(trainer_of(tmp_path), stage)(Toy(), loader(), ckpt_path=path)
    theirs = getattr(L.Trainer(**QUIET), stage)(module, loader())
    assert str(ours) == str(theirs)


def without_callbacks(checkpoint):
    del checkpoint["callbacks"]


def without_its_state(checkpoint):
    del checkpoint["callbacks"][FEDERATION]


def with_an_empty_one(checkpoint):
    checkpoint["callbacks"][FEDERATION] = {}


@pytest.mark.parametrize("change", [without_callbacks, without_its_state, with_an_empty_one])
def test_a_checkpoint_that_lost_the_federation_s_state_goes_on_and_names_what_is_missing(tmp_path, federated, change):
    path, checkpoint = tmp_path / "stripped.ckpt", saved(federated)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.warns(
        UserWarning, match=rf"{re.escape(str(path))} has no '{FEDERATION}' .*strategy.*clients keep.*seed are missing"
    ):
        _, trainer = fit(tmp_path, rounds=3, ckpt_path=path)
    assert trainer.current_epoch == 3


LOST = {
    "strategy": (["strategy"], "carry", "The checkpoint has no state of the strategy: WeightedMean begins anew."),
    "clients, carry": (
        ["clients"],
        "carry",
        "The checkpoint has nothing that clients kept: their optimizers begin anew.",
    ),
    "clients, reset": (
        ["clients"],
        "reset",
        "The checkpoint has nothing that clients kept: what their callbacks remember begins anew.",
    ),
    "the rest": (
        ["seed", "num_clients", "setup", "method"],
        "reset",
        "The checkpoint does not tell seed, num_clients, setup, method of its run: they may have been others.",
    ),
}


@pytest.mark.parametrize(("lost", "client_state", "line"), LOST.values(), ids=LOST)
def test_a_checkpoint_that_lost_a_part_of_the_state_names_it(tmp_path, lost, client_state, line):
    fit(tmp_path, rounds=2, client_state=client_state)
    checkpoint = saved(tmp_path / "last.ckpt")
    for name in lost:
        del checkpoint["callbacks"][FEDERATION][name]
    path = tmp_path / "stripped.ckpt"
    torch.save(checkpoint, path)
    with notes() as said:
        fit(tmp_path, rounds=3, ckpt_path=path, client_state=client_state)
    assert said == [line]


def test_a_federated_checkpoint_does_not_resume_a_plain_trainer_and_its_weights_load(tmp_path, federated):
    """What the README says of it: the plain Trainer refuses the server optimizer's state."""
    with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
        L.Trainer(max_epochs=4, **QUIET).fit(ToyModule(), loader(), ckpt_path=federated)
    module = ToyModule.load_from_checkpoint(federated)
    assert type(module) is ToyModule
    L.Trainer(max_epochs=1, **QUIET).fit(module, loader())


def test_a_federated_checkpoint_does_not_resume_a_plain_trainer_of_a_module_with_one_parameter(tmp_path):
    fit(tmp_path, module=OneTensor(), rounds=1)
    with pytest.raises(KeyError, match="momentum"):  # never a step with the server's learning rate of 1
        L.Trainer(max_epochs=4, **QUIET).fit(OneTensor(), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_a_plain_trainer_tests_a_federated_checkpoint(federated):
    (result,) = L.Trainer(**QUIET).validate(ToyModule(), loader(), ckpt_path=federated, verbose=False)
    (expected,) = L.Trainer(**QUIET).validate(ToyModule.load_from_checkpoint(federated), loader(), verbose=False)
    assert result == expected
