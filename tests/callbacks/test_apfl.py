"""APFL against the paper's equations, with unequal clients, part of whom take part in a round."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from flwr_datasets.partitioner import ExponentialPartitioner
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import APFL, ClientData, Ditto, FedPer, FedProx, Partition, Scaffold, TrainableOnly
from lightning_fed.callbacks import apfl as file
from lightning_fed.errors import ConfigurationError, FederationError
from lightning_fed.values.trajectory import Trajectory
from lightning_fed.wire.messages import memory_in
from tests import references
from tests.callbacks.rounds import (
    BATCH,
    COHORTS,
    EPOCHS,
    ROUNDS,
    SIZES,
    WAYS,
    Chosen,
    Stops,
    adam,
    assert_close,
    assert_equal,
    batches,
    federated,
    loaders,
    loss,
    momentum,
    sgd,
)
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

OPTIMIZERS = {"SGD": sgd, "momentum": momentum, "Adam": adam}
CLIENTS = range(len(SIZES))


class Validates(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss(self.net, batch))


def fit(net: nn.Module, *callbacks: Any, optimizer: Any = momentum, kind: Any = Validates, **how: Any) -> Any:
    """The trainer after the rounds, and the global weights."""
    module, data = kind(copy.deepcopy(net), optimizer), list(zip(loaders(), loaders(), strict=True))
    how = {**QUIET, "local_epochs": EPOCHS, "max_rounds": ROUNDS, **how}
    path = how.pop("ckpt_path", None)
    trainer = FederatedTrainer(callbacks=[ClientData(data), Chosen(), *callbacks], **how)
    trainer.fit(module, ckpt_path=path)
    return trainer, module.net.state_dict()


def own(trainer: FederatedTrainer) -> list[references.Weights]:
    """Each client's mixture."""
    return [trainer.personal_module(client).net.state_dict() for client in CLIENTS]


def kept(trainer: FederatedTrainer, what: str) -> list[torch.Tensor]:
    """What each client keeps under a name."""
    memories = [memory_in(trainer.federation._state.kept_by(client)) for client in CLIENTS]
    return [next(t for name, t in memory.items() if name.endswith(f"fit/{what}")) for memory in memories]


def by_the_paper(net: nn.Module, optimizer: Any = momentum, **how: Any) -> Any:
    return references.apfl(copy.deepcopy(net), batches(), SIZES, loss, optimizer, **how)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("adaptive", [True, False])
def test_it_is_the_papers(name: str, adaptive: bool) -> None:
    net = network(torch.float64, batch_norm=name != "Adam")  # which makes steps of the noise of a bias before a norm
    shared, theirs, alphas = by_the_paper(net, OPTIMIZERS[name], alpha=0.4, adaptive=adaptive)
    trainer, ours = fit(net, APFL(0.4, adaptive=adaptive), optimizer=OPTIMIZERS[name])
    assert_close(ours, shared)
    for one, other in zip(own(trainer), theirs, strict=True):
        assert_close(one, other)
    assert [float(alpha) for alpha in kept(trainer, "alpha")] == pytest.approx(alphas, rel=1e-9)
    assert (len({*alphas}) > 2) is adaptive


def test_alpha_is_clipped() -> None:
    net, large = network(torch.float64), lambda parameters: torch.optim.SGD(parameters, lr=0.9)
    _, theirs, alphas = by_the_paper(net, large, alpha=0.95)
    trainer, _ = fit(net, APFL(0.95), optimizer=large)
    assert 1.0 in alphas
    assert [float(alpha) for alpha in kept(trainer, "alpha")] == pytest.approx(alphas, rel=1e-9)
    for one, other in zip(own(trainer), theirs, strict=True):
        assert_close(one, other)


def test_clients_evaluate_their_mixtures() -> None:
    trainer, _ = fit(network(torch.float64, batch_norm=True), APFL(), engine="processes")
    losses = 0.0
    for client in COHORTS[-1]:
        module = trainer.personal_module(client).eval()
        with torch.no_grad():
            losses += sum(float(loss(module.net, batch)) * len(batch[0]) for batch in loaders()[client])
    assert trainer.callback_metrics["clients/val_loss"].item() == pytest.approx(losses / sum(SIZES), rel=1e-6)


class Sees(Callback):
    """Notes into a dict what each client's fit ended with."""

    def __init__(self, last: dict[int, references.Weights]) -> None:
        self._note = lambda client, state: last.update({client: {name: t.clone() for name, t in state.items()}})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._note(trainer.client_id, pl_module.net.state_dict())


def test_with_alpha_zero_it_is_each_clients_copy_of_the_global_model() -> None:
    last: dict[int, references.Weights] = {}
    trainer, _ = fit(network(torch.float64), APFL(0.0, adaptive=False), client_callbacks=[Sees(last)])
    for client, mixture in enumerate(own(trainer)):
        assert_equal(mixture, last[client])


class Shuffled(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(loaders((50,))[0].dataset, batch_size=BATCH, shuffle=True)


def test_both_fits_have_the_same_batches_and_draws_with_a_datamodule_that_shuffles() -> None:
    net, last = nn.Sequential(*network(torch.float64)[:2], nn.Dropout(0.4), network(torch.float64)[2]), {}
    trainer = FederatedTrainer(
        max_rounds=2,
        local_epochs=EPOCHS,
        callbacks=[Partition(ExponentialPartitioner(3)), APFL(0.0, adaptive=False)],
        client_callbacks=[Sees(last)],
        **QUIET,
    )
    trainer.fit(Classifier(net, sgd), datamodule=Shuffled())
    for client, expected in last.items():
        assert_equal(trainer.personal_module(client).net.state_dict(), expected)
    assert len(last) == 3


class Skips(Precision):
    """Leaves out steps with gradients that are not finite, as a gradient scaler does."""

    scaler = object()

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        result = closure()
        self._after_closure(model, optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = all(gradient.isfinite().all() for gradient in gradients)
        return optimizer.step(**kwargs) if finite else result


class Overflows(Validates):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1.0)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.5])
def test_steps_that_a_scaler_leaves_out_are_no_steps_of_its_own_model(alpha: float) -> None:
    net, last = network(torch.float64), {}
    how: Any = {"kind": Overflows, "plugins": Skips(), "max_rounds": 1, "client_callbacks": [Sees(last)]}
    trainer, _ = fit(net, APFL(alpha, adaptive=False), **how)
    for client in COHORTS[0]:
        mixture = own(trainer)[client]
        if alpha != 0.5:  # v and w are one in the first round
            assert_equal(mixture, last[client])
        assert all(torch.isfinite(tensor).all() for tensor in mixture.values())


def test_with_alpha_one_each_client_trains_on_alone() -> None:
    """As Ditto without its term."""
    net = network(torch.float64, batch_norm=True)
    trainer, ours = fit(net, APFL(1.0, adaptive=False))
    other, theirs = fit(net, Ditto(0.0))
    assert_equal(ours, theirs)
    for mixture, alone in zip(own(trainer), own(other), strict=True):
        assert_equal(mixture, alone)


def test_on_processes_it_is_the_same_bit_for_bit() -> None:
    net = network(torch.float64, batch_norm=True)
    (alone, shared), (apart, same) = fit(net, APFL()), fit(net, APFL(), **WAYS["processes"])
    assert_equal(same, shared)
    for one, other in zip(own(apart), own(alone), strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("way", ["in process", "processes", "in files"])
def test_a_run_that_is_stopped_in_a_round_goes_on_bit_for_bit(way: str, tmp_path: Path) -> None:
    net, how = network(torch.float64, batch_norm=True), WAYS.get(way, {})
    whole, expected = fit(net, APFL(), **how)
    how = {**how, "enable_checkpointing": True, "default_root_dir": str(tmp_path)}
    how |= {"client_storage": str(tmp_path / "clients")} if way == "in files" else {}
    stops, saves = Stops("on_client_end"), OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(net, APFL(), stops, saves, **how)
    trainer, ours = fit(net, APFL(), stops, saves, ckpt_path=str(tmp_path / "on_exception.ckpt"), **how)
    assert_equal(ours, expected)
    for one, other in zip(own(trainer), own(whole), strict=True):
        assert_equal(one, other)
    assert kept(trainer, "alpha") == kept(whole, "alpha")
    for one, other in zip(kept(trainer, "v/net.0.weight"), kept(whole, "v/net.0.weight"), strict=True):
        assert torch.equal(one, other)


def test_steps_in_a_temporary_file_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net, made, in_files = network(torch.float64), [], []

    class Small(Trajectory):
        def __init__(self) -> None:
            super().__init__(budget=100)
            made.append(weakref.ref(self))

        def __iter__(self) -> Any:
            alive = [steps for one in made if (steps := one()) is not None and steps._steps]
            assert alive == [self]  # those of the fits before are free
            in_files.append(self._file._rolled)
            return super().__iter__()

    trainer, _ = fit(net, APFL())
    monkeypatch.setattr(file, "Trajectory", Small)
    gc.disable()
    try:
        other, _ = fit(net, APFL())
    finally:
        gc.enable()
    assert in_files == [True] * sum(map(len, COHORTS))
    for one, two in zip(own(other), own(trainer), strict=True):
        assert_equal(one, two)


class ByHand(Validates):
    """Two optimizers by hand, one of which steps twice a batch, and a schedule that it steps itself."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second, first):
            optimizer.zero_grad()
            self.manual_backward(loss(self.net, batch))
            optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        first, second = sgd(self.net[0].parameters()), adam(self.net[2].parameters())
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 3, 0.8)]


def test_two_optimizers_by_hand_are_followed_step_by_step() -> None:
    net = network(torch.float64)
    trainer, _ = fit(net, APFL(0.3, adaptive=False), kind=ByHand, max_rounds=1)
    for client in COHORTS[0]:
        assert_close(own(trainer)[client], by_two_optimizers(net, client))


def test_schedules_that_are_stepped_by_hand_go_on_from_round_to_round() -> None:
    net = network(torch.float64)
    (alone, _), (other, _) = fit(net, APFL(1.0, adaptive=False), kind=ByHand), fit(net, Ditto(0.0), kind=ByHand)
    for one, two in zip(own(alone), own(other), strict=True):
        assert_equal(one, two)


def by_two_optimizers(net: nn.Module, client: int, alpha: float = 0.3) -> references.Weights:
    w, v, bar = (copy.deepcopy(net) for _ in range(3))
    made = [[sgd(one[0].parameters()), adam(one[2].parameters())] for one in (w, v)]
    schedules = [torch.optim.lr_scheduler.StepLR(first, 3, 0.8) for first, _ in made]
    for batch in list(loaders()[client]) * EPOCHS:
        for which in (0, 1, 0):
            w.zero_grad()
            loss(w, batch).backward()
            bar.zero_grad()
            loss(bar, batch).backward()
            for p, mixed in zip(v.parameters(), bar.parameters(), strict=True):
                p.grad = alpha * mixed.grad
            for optimizers in made:
                optimizers[which].step()
            with torch.no_grad():
                for mixed, p, q in zip(bar.parameters(), v.parameters(), w.parameters(), strict=True):
                    mixed.copy_(alpha * p + (1 - alpha) * q)
        for schedule in schedules:
            schedule.step()
    return bar.state_dict()


@pytest.mark.parametrize(
    "how", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"local_steps": 3}], ids=str
)
def test_lightnings_arguments_act_on_both_fits(how: Any) -> None:
    how = {**how, "local_epochs": None} if "local_steps" in how else how
    net = network(torch.float64)
    (_, ours), (_, theirs) = fit(net, APFL(0.0, adaptive=False), **how), fit(net, **how)
    assert_equal(ours, theirs)
    alone, _ = fit(net, APFL(1.0, adaptive=False), max_rounds=1, **how)
    zero, _ = fit(net, APFL(0.0, adaptive=False), max_rounds=1, **how)
    half, _ = fit(net, APFL(0.5, adaptive=False), max_rounds=1, **how)
    for one, other, mixed in zip(own(alone), own(zero), own(half), strict=True):
        assert_equal(one, other)  # in their first round both begin with what came
        assert all(torch.isfinite(tensor).all() for tensor in mixed.values())


def test_it_goes_with_other_methods_which_act_on_the_global_model() -> None:
    net = network(torch.float64)
    trainer, ours = fit(net, APFL(), FedProx(0.5), Scaffold(), FedPer("net.2"), optimizer=sgd)
    _, theirs = fit(net, FedProx(0.5), Scaffold(), FedPer("net.2"), optimizer=sgd)
    assert_equal(ours, theirs)
    assert all(torch.isfinite(tensor).all() for mixture in own(trainer) for tensor in mixture.values())


def test_what_is_frozen_stays_as_it_is() -> None:
    net = network(torch.float64)
    net[0].requires_grad_(False)
    for others in ([], [TrainableOnly()]):
        trainer, _ = fit(net, APFL(0.3), *others)
        for mixture in own(trainer):
            assert torch.equal(mixture["0.weight"], net[0].weight)


class Clamps(Validates):
    def on_train_batch_end(self, *_: Any) -> None:
        for p in self.parameters():
            p.data.clamp_(-0.05, 0.05)


class Lbfgs(Validates):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class EndsEarly(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step % 2:
            trainer.should_stop = True


class FreezesFirst(Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[0].requires_grad_(False)


REFUSED: dict[str, tuple[Any, str]] = {
    "weights that are clamped": ({"kind": Clamps}, r"changes 'net.0.weight' beside its optimizer's steps"),
    "L-BFGS": ({"kind": Lbfgs}, "trains with LBFGS, which asks for the loss more than once a step"),
    "unequal steps": ({"client_callbacks": [EndsEarly()]}, "takes more steps in the fit of its own model"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_mixed_is_refused(what: str) -> None:
    how, said = REFUSED[what]
    with pytest.raises(FederationError, match=said):
        fit(network(torch.float64), APFL(), **how)


def test_a_layer_that_only_the_global_fit_freezes_is_mixed_with_what_came() -> None:
    net = network(torch.float64)
    trainer, ours = fit(net, APFL(0.3, adaptive=False), max_rounds=1, client_callbacks=[FreezesFirst()])
    assert torch.equal(ours["0.weight"], net[0].weight)
    for client in COHORTS[0]:
        mixture = trainer.personal_module(client).net.state_dict()["0.weight"]
        v = kept_one(trainer, client, "v/net.0.weight")
        assert not torch.equal(mixture, net[0].weight)
        torch.testing.assert_close(mixture, 0.3 * v + 0.7 * net[0].weight.detach(), rtol=1e-12, atol=1e-12)


def kept_one(trainer: FederatedTrainer, client: int, what: str) -> torch.Tensor:
    memory = memory_in(trainer.federation._state.kept_by(client))
    return next(tensor for name, tensor in memory.items() if name.endswith(f"fit/{what}"))


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"APFL: alpha=1\.5 must be from 0 to 1"):
        APFL(1.5)
    for adaptive in ("no", 0, None):
        with pytest.raises(ConfigurationError, match=f"APFL: adaptive={adaptive!r}: write True or False"):
            APFL(adaptive=adaptive)


def test_clients_train_one_after_the_other() -> None:
    with pytest.warns(UserWarning, match="one after the other: each client trains a second model of its own"):
        fit(network(torch.float64), APFL(), vectorize_clients=True)


def test_the_global_model_is_as_without_it() -> None:
    net = network(torch.float64, batch_norm=True)
    assert_equal(federated(net, momentum, APFL()), federated(net, momentum))
