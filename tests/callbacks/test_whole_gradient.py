"""The pass of Scaffold's option I: what counts in it, what hooks see, and that no optimizer does anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, Personal, Scaffold
from lightning_fed.errors import FederationError
from tests.callbacks.rounds import assert_close, assert_equal, loaders, loss, momentum
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network


def control_of(module: Any, *methods: Any, **how: Any) -> dict[str, torch.Tensor]:
    """The server's control after one round: the mean of the clients'."""
    scaffold = Scaffold(option="I")
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(loaders()), scaffold, *methods], **{**QUIET, **how})
    trainer.fit(module)
    return scaffold.state_dict()["control"]


def mean_gradient(net: nn.Module, counts: Callable[[int], bool] = lambda index: True) -> dict[str, torch.Tensor]:
    """Over clients, each over all examples of its batches that count."""
    net, means = copy.deepcopy(net), []
    for loader in loaders():
        x, y = map(torch.cat, zip(*[batch for i, batch in enumerate(loader) if counts(i)], strict=True))
        means.append(loss(net, (x, y)))
    torch.stack(means).mean().backward()
    return {f"net.{name}": p.grad for name, p in net.named_parameters()}


class ReadsGradients(Classifier):
    """In all hooks from the backward pass on."""

    def read(self, *_: Any) -> None:
        assert all(p.grad.norm() > 0 for p in self.parameters())

    on_after_backward = on_before_optimizer_step = on_train_batch_end = read


class ClipsThem(Classifier):
    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        for p in self.parameters():
            p.grad.clamp_(-1e-3, 1e-3)


HOWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip by value": (Classifier, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    "clip by norm": (Classifier, {"gradient_clip_val": 1e-3}),
    "clip by hand": (ClipsThem, {}),
    "hooks that read": (ReadsGradients, {}),
    "Lightning's own loop": (ReadsGradients, {"gradient_clip_val": 1e-3, "precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("how", HOWS)
def test_gradients_stay_for_hooks_and_are_taken_before_they_are_clipped(how: str) -> None:
    kind, arguments = HOWS[how]
    net = network(torch.float32 if "precision" in arguments else torch.float64)
    if "precision" in arguments:
        control_of(SinglePrecision(net), **arguments)
        return
    assert_close(control_of(kind(copy.deepcopy(net), momentum), **arguments), mean_gradient(net))


class SinglePrecision(ReadsGradients):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((batch[0].float(), batch[1]), batch_idx)


def test_no_optimizer_does_anything_in_it() -> None:
    """Neither a step, nor what hangs on one: weight decay and momentum would move what has a gradient of zero."""
    stepped: list[tuple[bool, torch.Tensor]] = []
    passes: list[bool] = []

    class Hooked(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = momentum(self.parameters())
            optimizer.register_step_post_hook(lambda *_: stepped.append((len(passes) == 1, self.net[0].weight.clone())))
            return optimizer

        def on_train_start(self) -> None:
            passes.append(True)

    class OneClient(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if len(passes) == 1:
                assert_equal(pl_module.net.state_dict(), net.state_dict())
                assert not trainer.optimizers[0].state

    net = network(torch.float64)
    trainer = FederatedTrainer(
        max_rounds=1,
        callbacks=[ClientData(loaders()[:1]), Scaffold(option="I")],
        client_callbacks=[OneClient()],
        **QUIET,
    )
    trainer.fit(Hooked(copy.deepcopy(net)))
    assert [in_pass for in_pass, _ in stepped] == [False, False]  # the fit's two


class Keeps(Classifier):
    """An optimizer that it has before the fit."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.kept = momentum(self.parameters())

    def configure_optimizers(self) -> Any:
        return self.kept


def test_an_optimizer_that_the_module_keeps_steps_after_it() -> None:
    net = network(torch.float64)
    one, other = Keeps(copy.deepcopy(net)), Classifier(copy.deepcopy(net), momentum)
    assert_equal(control_of(one), control_of(other))
    assert_equal(one.net.state_dict(), other.net.state_dict())
    assert "step" not in vars(one.kept)


class Skips(Classifier):
    """One batch of each client."""

    skipped = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == self.skipped else super().training_step(batch, batch_idx)


class SkipsWithZeros(Skips):
    """Where gradients are zero and not None."""

    skipped = 1

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class ByHand(Classifier):
    """Two optimizers by hand."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [momentum(self.net[0].parameters()), momentum(self.net[2].parameters())]


class SkipsByHand(ByHand):
    """Leaving the gradients of the batch before where they are."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            return
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss(self.net, batch))
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize("kind", [Skips, SkipsWithZeros])
def test_a_batch_without_a_loss_does_not_count(kind: Any) -> None:
    net = network(torch.float64)
    assert_close(control_of(kind(copy.deepcopy(net))), mean_gradient(net, lambda index: index != kind.skipped))


def test_nor_does_one_that_is_left_out_by_hand() -> None:
    net = network(torch.float64)
    assert_close(control_of(SkipsByHand(copy.deepcopy(net))), mean_gradient(net, lambda index: index != 1))


class Alternates(ByHand):
    """One optimizer in even batches, the other in odd ones."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(loss(self.net, batch))
        optimizer.step()


def test_of_optimizers_that_take_turns_each_has_its_own_batches() -> None:
    net = network(torch.float64)
    even, odd = (mean_gradient(net, lambda index, rest=rest: index % 2 == rest) for rest in (0, 1))
    expected = {name: (even if name.startswith("net.0.") else odd)[name] for name in even}
    assert_close(control_of(Alternates(copy.deepcopy(net))), expected)


class Accumulates(ByHand):
    """Over two batches, of which the last may be shorter."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(loss(self.net, batch) / 2)
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


class AccumulatesInOne(ByHand):
    """The other steps in each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(loss(self.net, batch))
        for optimizer in self.optimizers()[: 1 + batch_idx % 2]:
            optimizer.step()
            optimizer.zero_grad()


class ClosureAlone(Classifier):
    """In odd batches."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        if batch_idx % 2:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


class PastLightning(ByHand):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss(self.net, batch).backward()
        for optimizer in self.optimizers(use_pl_optimizer=False):
            optimizer.step()
            optimizer.zero_grad()


REFUSED: dict[Any, str] = {
    Accumulates: "computes gradients in a batch in which no optimizer takes them",
    AccumulatesInOne: "computes gradients in a batch in which no optimizer takes them",
    ClosureAlone: "computes gradients in a batch in which no optimizer takes them",
    PastLightning: "steps an optimizer past Lightning, so Scaffold hears of no step",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_gradients_that_count_for_nobody_knows_how_much_are_refused(kind: Any) -> None:
    with pytest.raises(FederationError, match=REFUSED[kind]):
        control_of(kind(network(torch.float64)))


def test_a_batch_that_gives_personal_parameters_gradients_counts() -> None:
    """The shared ones have a gradient of zero in it, which is their part of the objective's."""

    class InTurns(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            hidden = self.net[:2](batch[0])
            logits = self.net[2](hidden.detach() if batch_idx else hidden)
            self.manual_backward(nn.functional.cross_entropy(logits, batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()

    net, shares = network(torch.float64), []
    for loader in loaders():
        sizes = [len(batch[0]) for batch in loader]
        own = copy.deepcopy(net)
        loss(own, next(iter(loader))).backward()
        shares.append({f"net.0.{n}": p.grad * sizes[0] / sum(sizes) for n, p in own[0].named_parameters()})
    expected = {name: sum(share[name] for share in shares) / len(shares) for name in shares[0]}
    assert_close(control_of(InTurns(net), Personal("net.2")), expected)
