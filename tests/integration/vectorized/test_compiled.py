"""Compiled steps of vectorized clients give the same, and say where they are not compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_fed.client.vectorized import compiled_step
from lightning_fed.errors import FederationError
from tests.helpers import sweep
from tests.integration.vectorized.runs import CASES, Lit, assert_close, data, mlp, momentum, run


@pytest.fixture
def compiled_without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """``torch.compile`` with all but its slow last part; tells of each step that ran whether SGD was in it."""
    calls: list[bool] = []
    monkeypatch.setattr(compiled_step.CompiledStep.__init__, "__defaults__", ("aot_eager",))
    run = compiled_step.CompiledStep.run

    def counting(self: Any, stack: Any, step: Any, batch: Any, batch_idx: int, update: Any = None) -> Any:
        ran = run(self, stack, step, batch, batch_idx, update)
        calls.extend([] if ran is None else [update is not None])
        return ran

    monkeypatch.setattr(compiled_step.CompiledStep, "run", counting)
    torch._dynamo.reset()
    yield calls
    torch._dynamo.reset()


class ByEpoch(Lit):
    """A loss that depends on the epoch and on an attribute that a hook changes."""

    acts_elementwise = True
    factor = 1.0

    def on_train_epoch_start(self) -> None:
        self.factor = 1.0 + 0.5 * self.current_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (2.0 if self.current_epoch == 1 else 1.0) * self.factor


class TwoGroupsOfSgd(Lit):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "momentum": 0.9, "nesterov": True}, self.net[2].parameters()]
        groups[1] = {"params": groups[1], "weight_decay": 0.1, "maximize": True, "lr": 0.01}
        return torch.optim.SGD(groups, lr=0.05)


class ByRound(Lit):
    """Its learning rate decays from round to round."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1 * 0.5**self.current_epoch)


class ByEpochOfSgd(Lit):
    """Its learning rate is halved in the middle of the second round."""

    acts_elementwise = True

    def on_train_epoch_start(self) -> None:
        self.optimizers().param_groups[0]["lr"] = 0.05 / (1 + self.current_epoch // 3)


class Looks(Lit):
    """Notes what is to be seen between epochs and at the end: steps, gradients, momentum."""

    acts_elementwise = True

    def on_train_epoch_start(self) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        momenta = [state["momentum_buffer"] for state in self.optimizers().state.values()]
        SEEN.append([self.trainer.global_step, *(tensor.sum().item() for tensor in (*gradients, *momenta))])

    on_train_end = on_train_epoch_start


class Decays(Lit):
    """Changes gradients between backward pass and step."""

    acts_elementwise = True

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(0.5)


class Temperature(Lit):
    """Logs a weight, and keeps weights of the step before in a buffer."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("before", torch.zeros(3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) / self.temperature
        self.log("temperature", self.temperature, on_step=False, on_epoch=True)
        self.log("bias", self.net[2].bias[0], on_step=False, on_epoch=True)
        loss = loss + (self.net[2].bias - self.before).square().sum()
        self.before = self.net[2].bias.detach().clone()
        return loss


class SharedGradients(Decays):
    """Two weights that have one gradient."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.shared, self.personal = nn.Parameter(torch.zeros(3, 6)), nn.Parameter(torch.ones(3, 6))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = nn.functional.linear(batch[0], self.shared + self.personal)
        return super().training_step(batch, batch_idx) + logits.square().mean()


class Masks(Lit):
    """Trains only half of its first layer."""

    acts_elementwise = True

    def on_train_start(self) -> None:
        weight = self.net[0].weight
        weight.register_hook(lambda gradient: gradient * (torch.arange(6) % 2))


def _twice_as_far(parameters: Any) -> Any:
    """Steps twice as far."""
    optimizer = SGD(parameters)
    step = optimizer.step

    def twice(closure: Any = None) -> Any:
        loss = step(closure)
        step()
        return loss

    optimizer.step = twice
    return optimizer


SEEN: list[Any] = []


SGD = partial(torch.optim.SGD, lr=0.05)


# With whether SGD is compiled, too: always, for some steps, never.
COMPILED: dict[str, tuple[Callable[[], L.LightningModule], dict[str, Any], set[bool]]] = {
    "MLP": (CASES["MLP"], {}, {True}),
    "CNN with BatchNorm": (CASES["CNN with BatchNorm"], {}, {True}),
    "buffers": (CASES["buffers"], {}, {True}),
    "by epoch": (lambda: ByEpoch(mlp()), {}, {True}),
    "SGD without momentum": (lambda: Lit(mlp(), partial(SGD, weight_decay=0.1)), {}, {True}),
    "two groups of SGD": (lambda: TwoGroupsOfSgd(mlp()), {}, {True}),
    "looks": (lambda: Looks(mlp()), {}, {True}),
    "learning rate by round": (lambda: ByRound(mlp()), {}, {True, False}),
    "learning rate by epoch": (lambda: ByEpochOfSgd(mlp()), {}, {True, False}),
    "tied, frozen and unused weights": (CASES["tied, frozen and unused weights"], {}, {False}),
    "other parameters and names by epoch": (
        lambda: Thawing(mlp(), partial(momentum, weight_decay=0.1)),
        {},
        {False},
    ),
    "weights in log and buffer": (Temperature, {}, {True}),
    "gradients in the same memory": (SharedGradients, {}, {False}),
    "hook on a weight": (lambda: Masks(mlp()), {}, {False}),
    "hook on a weight, Adam": (lambda: Masks(mlp(), CASES["Adam"]().optimizer), {}, {False}),
    "step put in place of another": (lambda: Lit(mlp(), _twice_as_far), {}, {False}),
    "dampening": (lambda: Lit(mlp(), partial(momentum, dampening=0.5)), {}, {False}),
    "Adam": (CASES["Adam"], {}, {False}),
    "AdamW, two groups, schedule by step": (CASES["AdamW, two groups, schedule by step"], {}, {False}),
    "changes gradients": (lambda: Decays(mlp()), {}, {False}),
    "clipping by norm": (CASES["MLP"], {"gradient_clip_val": 0.2}, {False}),
}


# SGD is compiled with the step for some steps and never; each takes seconds.
@pytest.mark.parametrize("name", sweep(COMPILED, ("learning rate by round", "Adam")))
def test_compiled_steps_give_the_same(name: str, compiled_without_inductor: list[bool]) -> None:
    build, options, is_updated = COMPILED[name]
    SEEN.clear()
    as_one = run(build, dtype=torch.float64, vectorize_clients="require", compile_clients=True, **options)
    assert set(compiled_without_inductor) == is_updated
    seen = list(SEEN)
    assert_close(as_one, run(build, dtype=torch.float64, **options), torch.float64)
    SEEN.clear()
    run(build, dtype=torch.float64, vectorize_clients="require", **options)
    assert len(seen) == len(SEEN)
    for mine, theirs in zip(seen, SEEN, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)


def test_an_error_in_a_compiled_update_is_the_clients_own(compiled_without_inductor: list[bool]) -> None:
    loaders = [DataLoader(train.dataset, batch_size=8) for train, _ in data(sizes=[48] * 3)]
    for loader in loaders:
        loader.dataset.tensors[1][40] = 7  # of 3 classes; in the last batch
    with pytest.raises(FederationError, match=r"(?s)Round 1.*out of bounds"):
        run(CASES["MLP"], vectorize_clients="require", compile_clients=True, loaders=loaders)


def test_steps_that_draw_are_not_compiled(compiled_without_inductor: list[bool]) -> None:
    with pytest.warns(
        UserWarning, match="compile_clients: clients train uncompiled, for their steps draw random numbers"
    ):
        run(CASES["dropout"], vectorize_clients="require", compile_clients=True, max_rounds=1)
    assert not compiled_without_inductor


def test_without_a_compiler_clients_train_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: g++")

    monkeypatch.setattr(compiled_step.CompiledStep, "_of", lambda self, *args: fails)
    with pytest.warns(UserWarning, match=r"clients train uncompiled: no C\+\+ compiler was found \(install g\+\+"):
        as_one = run(CASES["MLP"], vectorize_clients="require", compile_clients=True)
    assert_close(as_one, run(CASES["MLP"]))


class Thawing(Lit):
    """Its first layer is trained from the second epoch of a round on, and logged then."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = torch.tanh(self.net[0](batch[0]))
        if self.current_epoch % 2:
            self.log("thawed", hidden.mean(), on_step=False, on_epoch=True)
        else:
            hidden = hidden.detach()
        return nn.functional.cross_entropy(self.net[2](hidden), batch[1])


class EverNew(ByEpoch):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + 0.01 * batch_idx * (self.current_epoch + 1))


@pytest.mark.landing
def test_a_step_that_would_be_compiled_for_ever_runs_uncompiled(compiled_without_inductor: list[bool]) -> None:
    loaders = [train for train, _ in data(torch.float64, sizes=[48] * 3)]
    options: dict[str, Any] = {"dtype": torch.float64, "loaders": loaders}
    with pytest.warns(UserWarning, match="clients train uncompiled: the step was compiled too often"):
        as_one = run(lambda: EverNew(mlp()), vectorize_clients="require", compile_clients=True, **options)
    assert_close(as_one, run(lambda: EverNew(mlp()), **options), torch.float64)


@pytest.mark.landing
def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    as_one = run(CASES["CNN with BatchNorm"], dtype=torch.float64, vectorize_clients="require", compile_clients=True)
    assert_close(as_one, run(CASES["CNN with BatchNorm"], dtype=torch.float64), torch.float64)
