"""MOON against the paper's equations, with unequal clients, part of whom take part in a round."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FedProx, FedRep, LGFedAvg, Moon
from lightning_fed.callbacks.moon import ContrastiveTerm, tensors_of
from lightning_fed.errors import ClientError, ConfigurationError, FederationError
from tests import references
from tests.callbacks.rounds import (
    HOOKS,
    SIZES,
    adam,
    assert_close,
    assert_equal,
    assert_resumes,
    batches,
    encoded,
    federated,
    loaders,
    momentum,
    sgd,
)
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier

MU, TEMPERATURE = 2.0, 0.3
OPTIMIZERS = {"SGD": sgd, "momentum": momentum, "Adam": adam}


def method() -> Moon:
    return Moon(MU, TEMPERATURE, representation="net.encoder")


def cross_entropy_of(net: Any, z: torch.Tensor, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net.head(z), batch[1])


def by_the_paper(net: Any, optimizer: Any, loss: Any = cross_entropy_of) -> references.Weights:
    def features(net: Any, batch: Any) -> torch.Tensor:
        return net.encoder(batch[0])

    how: Any = {"mu": MU, "temperature": TEMPERATURE}
    return references.moon(copy.deepcopy(net), batches(), SIZES, features, loss, optimizer, **how)[-1]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_rounds_are_the_papers_with_any_optimizer(name: str, batch_norm: bool) -> None:
    net, optimizer = encoded(batch_norm), OPTIMIZERS[name]
    # Adam makes steps of the noise of a bias before a norm.
    how = {"rtol": 1e-3} if batch_norm and name == "Adam" else {}
    assert_close(federated(net, optimizer, method()), by_the_paper(net, optimizer), **how)


def test_engines_give_the_same() -> None:
    net = encoded(batch_norm=True)
    assert_equal(federated(net, momentum, method(), engine="processes"), federated(net, momentum, method()))


class Encoded(Classifier):
    """A module made of the flat network of other tests."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        *encoder, head = net
        super().__init__(nn.Sequential(OrderedDict(encoder=nn.Sequential(*encoder), head=head)), optimizer)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("way", ["in process", "processes"])
def test_a_run_that_is_stopped_in_a_round_goes_on_bit_for_bit(way: str, hook: str, tmp_path: Path) -> None:
    how = {"engine": "processes"} if way == "processes" else {}
    assert_resumes(tmp_path, hook, momentum, method, kind=Encoded, **how)


# ------------------------------------------------------------------------------------------ one fit, by autograd


class ByHand(Classifier):
    """The term in the loss, the frozen features of two other networks beside it."""

    def __init__(self, net: Any, before: nn.Module, has_term: bool, optimizer: Any, penalty: bool) -> None:
        super().__init__(copy.deepcopy(net), optimizer)
        self.others = [copy.deepcopy(one.encoder).eval() for one in (net, before)] if has_term else []
        self.penalty = penalty

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        z = self.net.encoder(x)
        loss = nn.functional.cross_entropy(self.net.head(z), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        if self.penalty:  # which goes back through the features while the step runs
            (slope,) = torch.autograd.grad(loss, self.net.encoder[0].weight, create_graph=True)
            loss = loss + slope.square().sum()
        if self.others:
            with torch.no_grad():
                others = [encoder(x) for encoder in self.others]
            near, far = [(nn.functional.cosine_similarity(z, o) / TEMPERATURE).exp() for o in others]
            loss = loss - MU * (near / (near + far)).log().mean()
        return loss


class Scaled(Precision):
    """Scales losses as a gradient scaler does."""

    precision = "64"

    class scaler:
        @staticmethod
        def get_scale() -> float:
            return 8.0

    def pre_backward(self, tensor: torch.Tensor, module: Any) -> torch.Tensor:
        return super().pre_backward(tensor * 8, module)


class Unscales(L.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for p in pl_module.parameters():
            p.grad /= 8


TRAINERS: dict[str, Any] = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 4},
    "clip": {"gradient_clip_val": 0.3},
    "scaled": {"plugins": [Scaled()], "callbacks": [Unscales()]},
    "LBFGS": {},
    "penalty": {},
}


def trained(has_term: bool, trainer: str) -> tuple[Any, L.Trainer]:
    net, before = encoded(), encoded()
    with torch.no_grad():
        for p in before.parameters():
            p.mul_(-0.7).add_(0.1)
    how = dict(TRAINERS[trainer])
    optimizer = (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)) if trainer == "LBFGS" else sgd
    module = ByHand(net, before, has_term, optimizer, trainer == "penalty")
    term = ContrastiveTerm(MU, TEMPERATURE, "net.encoder")
    term.memory = tensors_of(before.encoder)
    callbacks = [*([] if has_term else [term]), *how.pop("callbacks", [])]
    fit = L.Trainer(max_epochs=3, callbacks=callbacks, **how, **QUIET)
    fit.fit(module, loaders()[2])
    return module, fit


@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_is_that_of_the_augmented_loss_by_autograd(trainer: str) -> None:
    (ours, fit), (expected, _) = trained(False, trainer), trained(True, trainer)
    assert_close(ours.net.state_dict(), expected.net.state_dict())
    assert not ours.net.encoder._forward_hooks
    assert fit.callback_metrics["loss"] > 0


class Steps(Classifier):
    def __init__(self, net: Any, optimizer: Any, step: Any) -> None:
        super().__init__(net, optimizer)
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self.net, batch)


def cross_entropy(net: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def past_the_module(net: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net.head(net.encoder.forward(batch[0])), batch[1])


def twice(net: Any, batch: Any) -> torch.Tensor:
    return cross_entropy(net, batch) + net.encoder(batch[0]).square().mean()


def once_and_as_a_target(net: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        net.encoder(batch[0])
    return cross_entropy(net, batch)


def detached(net: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net.head(net.encoder(batch[0]).detach()), batch[1])


ERRORS: dict[str, tuple[Any, str, str]] = {
    "never called": (
        past_the_module,
        "net.encoder",
        r"does not call 'net.encoder' as a module, `self.net.encoder\(x\)`",
    ),
    "called twice": (twice, "net.encoder", r"client 0 calls 'net.encoder' more than once in a training_step"),
    "not the first": (
        cross_entropy,
        "net.head",
        r"calls 'net.head' on inputs that depend on what trains: .* names",
    ),
    "without a gradient": (detached, "net.encoder", r"has a loss that gives 'net.encoder' no gradient, so Moon's term"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_a_step_that_leaves_no_place_for_the_term_is_refused(what: str) -> None:
    step, name, said = ERRORS[what]
    with pytest.raises(FederationError, match=said):
        federated(encoded(), sgd, Moon(representation=name), kind=lambda net, optimizer: Steps(net, optimizer, step))


def test_features_of_no_gradient_do_not_count() -> None:
    kind = [
        lambda net, optimizer, step=step: Steps(net, optimizer, step) for step in (once_and_as_a_target, cross_entropy)
    ]
    one, other = (federated(encoded(), sgd, method(), kind=each) for each in kind)
    assert_equal(one, other)


def test_frozen_features_are_refused() -> None:
    net = encoded()
    net.encoder.requires_grad_(False)
    with pytest.raises(
        FederationError, match=r"has nothing to train in 'net.encoder': Moon's term would change nothing"
    ):
        federated(net, sgd, method())


def test_while_a_personal_head_trains_alone_there_is_no_term() -> None:
    """Of the two local epochs the first is without the term, and has no part in what the second does to the body."""
    net = encoded()
    with_term = federated(net, sgd, FedRep("net.head"), method())
    without = federated(net, sgd, FedRep("net.head"))
    assert torch.equal(with_term["head.weight"], without["head.weight"])  # as it was: clients have their own
    assert not torch.allclose(with_term["encoder.0.weight"], without["encoder.0.weight"], rtol=1e-3)


def test_a_representation_that_is_the_clients_own_is_refused() -> None:
    with pytest.raises(FederationError, match=r"client 0 has 'net.encoder' for its own: there are no features"):
        federated(encoded(), sgd, LGFedAvg("net.encoder"), method())


class ByHandSteps(Classifier):
    def __init__(self, net: Any, optimizer: Any) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization = False


def test_what_can_be_known_before_the_first_round_is_said_then() -> None:
    said = r"Moon\(representation='net.encodr'\): Classifier has no such submodule; it has 'net.encoder',"
    with pytest.raises(ConfigurationError, match=said):
        federated(encoded(), sgd, Moon(representation="net.encodr"))
    with pytest.raises(ConfigurationError, match=r"Moon\(representation='backbone'\): Classifier has no .* has 'net'"):
        federated(encoded(), sgd, Moon(representation="backbone"))
    with pytest.raises(ConfigurationError, match=r"Moon: ByHandSteps optimizes manually, and which of its backward"):
        federated(encoded(), sgd, method(), kind=ByHandSteps)
    with pytest.raises(ConfigurationError, match=r"the client callback ContrastiveTerm writes on_train_batch_start"):
        federated(encoded(), sgd, method(), vectorize_clients="require")
    with pytest.raises(ConfigurationError, match=r"Moon: mu=-1 must be >= 0; temperature=0 must be > 0"):
        Moon(-1, 0)


def test_the_module_is_let_go_where_a_step_fails() -> None:
    def fails(net: Any, batch: Any) -> torch.Tensor:
        raise ValueError("no")

    module = Steps(encoded(), sgd, fails)
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(loaders()), method()], **QUIET)
    with pytest.raises(ClientError, match="raised ValueError: no"):
        trainer.fit(module)
    assert not module.net.encoder._forward_hooks
    assert all(part.training for part in module.net.modules())


def test_with_fedprox() -> None:
    net, mu = encoded(), 0.5

    class Proximal(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.begin = {p: p.detach().clone() for p in self.param_groups[0]["params"]}

        def step(self, closure: Any = None) -> None:
            for p, begin in self.begin.items():
                p.grad += mu * (p.detach() - begin)
            super().step(closure)

    assert_close(federated(net, sgd, FedProx(mu), method()), by_the_paper(net, Proximal))
