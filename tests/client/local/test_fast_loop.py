"""The fast loops of clients' trainers are Lightning's: the same hooks, arguments, values and weights, bit for bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import History
from lightning_fed.client.local import fast_loop
from lightning_fed.client.local import trainer as local_trainer
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET, sweep
from tests.integration.modules import MODULES, trained

HOOKS = fast_loop._OF_A_STEP
SEEN: list[Any] = []


def plain(thing: Any) -> Any:
    """What a hook got, as something to compare."""
    if isinstance(thing, torch.Tensor):
        return thing.detach().tolist()
    if isinstance(thing, (list, tuple)):
        return [plain(one) for one in thing]
    if isinstance(thing, dict):
        return {name: plain(value) for name, value in thing.items()}
    return thing if isinstance(thing, (int, float, str, type(None))) else type(thing).__name__


def note(who: str, hook: str, trainer: Any, module: Any, args: Any) -> None:
    progress = trainer.fit_loop.epoch_loop.state_dict()
    said = {name: float(value) for name, value in trainer.callback_metrics.items()}
    here = trainer.global_step, trainer.fit_loop.epoch_loop.batch_idx, module._current_fx_name, trainer.is_last_batch
    SEEN.append((who, hook, plain(args), here, repr(progress), said))


class Watch(Callback):
    """Notes each hook of a step with all that a callback can see in it."""


class Watched(ToyModule):
    """The same for a module."""


def _noting(hook: str) -> tuple[Callable[..., None], Callable[..., None]]:
    def of_callback(self: Any, trainer: Any, pl_module: Any, *args: Any) -> None:
        note("callback", hook, trainer, pl_module, args)

    def of_module(self: Any, *args: Any) -> None:
        note("module", hook, self.trainer, self, args)
        if hook == "on_after_backward":
            self.log("grad", sum(p.grad.norm() for p in self.parameters()), on_step=True, on_epoch=True)

    return of_callback, of_module


for _hook in HOOKS:
    for _cls, _function in zip((Watch, Watched), _noting(_hook), strict=True):
        setattr(_cls, _hook, _function)


def as_lightning_does(patch: pytest.MonkeyPatch) -> None:
    """Clients' trainers keep Lightning's own loops."""
    patch.setattr(local_trainer, "use_fast_loops", lambda trainer: None)
    patch.setattr(local_trainer.LocalTrainer, "log_again", lambda *args: False)


def fit(build: Callable[[], ToyModule], fast: bool, *callbacks: Callback, **options: Any) -> Any:
    """Weights, history and all that was noted."""
    SEEN.clear()
    torch.manual_seed(0)
    module, history = build(), History(per_client=True)
    loops = []
    with pytest.MonkeyPatch.context() as patch:
        if not fast:
            as_lightning_does(patch)

        class Which(Callback):
            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                epoch_loop = trainer.fit_loop.epoch_loop
                loops.append((type(epoch_loop), type(epoch_loop.automatic_optimization)))

        arguments = {"num_clients": 2, "local_epochs": 2, "max_rounds": 2, **QUIET, **options}
        client_callbacks = [*callbacks, Which()]
        patch.setattr(Which, "__deepcopy__", lambda self, memo: self, raising=False)
        trainer = FederatedTrainer(callbacks=[history], client_callbacks=client_callbacks, **arguments)
        trainer.fit(module, DataLoader(toy_data(27), batch_size=4, shuffle=True))
    expected = (
        (fast_loop.FastEpochLoop, fast_loop.FastOptimization) if fast else (_TrainingEpochLoop, _AutomaticOptimization)
    )
    assert set(loops) == {expected}
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    return weights, repr((history.rows, history.clients)), list(SEEN)


def assert_same(build: Callable[[], Any], *callbacks: Callback, **options: Any) -> Any:
    usual, fast = (fit(build, fast, *callbacks, **options) for fast in (False, True))
    torch.testing.assert_close(fast[0], usual[0], rtol=0, atol=0)
    assert fast[1] == usual[1]
    assert len(fast[2]) == len(usual[2])
    for one, other in zip(fast[2], usual[2], strict=True):
        assert one == other
    return fast[2]


def test_every_hook_sees_what_it_sees_in_lightning_s_own_loop() -> None:
    seen = assert_same(Watched, Watch())
    # 2 rounds x 2 clients x 2 epochs x 4 batches, for a callback and the module
    assert {(who, hook): sum((w, h) == (who, hook) for w, h, *_ in seen) for who, hook, *_ in seen} == {
        (who, hook): 32 for who in ("callback", "module") for hook in HOOKS
    }


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_stands_alone_is_called(hook: str) -> None:
    alone = type("Alone", (Callback,), {hook: vars(Watch)[hook]})
    assert len(assert_same(ToyModule, alone())) == 32


def test_a_hook_on_the_instance_is_called() -> None:
    def build() -> ToyModule:
        module = ToyModule()
        module.on_after_backward = lambda: SEEN.append("called")
        return module

    assert len(assert_same(build)) == 32


class Dict(Watched):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "batch": batch_idx}


class Sometimes(Watched):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class NoIndex(Watched):
    def training_step(self, batch: Any) -> Any:
        return super().training_step(batch, 0)


class Breaks(Watched):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 2 else None


class Own(Watched):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        SEEN.append(("step", epoch, batch_idx))


class Backward(Watched):
    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(2 * loss)


class LBFGS(Watched):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


class Clips(Watched):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.01)


class Logs(Watched):
    """All that may change from one log of a name to the next."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("sized", loss, True, batch_size=batch_idx + 1)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("most", loss, reduce_fx="max")
        self.log("number", batch_idx / 2)
        self.log("one", loss.reshape(1).double(), on_step=True)
        self.log_dict({"a": loss * 2, "b": loss.detach().bfloat16()}, on_epoch=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.log("both", torch.tensor(1.0), on_step=True, on_epoch=True)
        super().on_train_batch_end(*args)

    def on_train_epoch_end(self) -> None:
        self.log("end", torch.tensor(float(self.current_epoch)))


class LogsNowAndThen(Watched):
    """Names that another step or another epoch begins with, or has not."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx:
            self.log("before", torch.tensor(float(batch_idx)), on_step=True, on_epoch=True)
        return super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        odd = self.current_epoch % 2
        if batch_idx >= odd:
            self.log("late in odd epochs", torch.tensor(batch_idx + 0.5))
        loss = super().training_step(batch, batch_idx)
        if odd:
            self.log("in odd epochs", loss, reduce_fx="max")
        if batch_idx == 2 - odd:
            self.log("once", loss, on_step=True, on_epoch=True)
        return loss


UNUSUAL = {
    "dict": (Dict, {}),
    "None now and then": (Sometimes, {}),
    "no batch_idx": (NoIndex, {}),
    "ends the epoch": (Breaks, {}),
    "optimizer_step": (Own, {}),
    "backward": (Backward, {}),
    "LBFGS": (LBFGS, {}),
    "configure_gradient_clipping": (Clips, {}),
    "logs": (Logs, {}),
    "logs now and then": (LogsNowAndThen, {"local_epochs": 3}),
    "clip by norm": (Watched, {"gradient_clip_val": 0.1}),
    "clip by value": (Watched, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "accumulation": (Watched, {"accumulate_grad_batches": 3}),
    "local steps": (Watched, {"local_epochs": None, "local_steps": 5}),
    "limited batches": (Watched, {"limit_train_batches": 2}),
    "double": (Watched, {"precision": "64-true"}),
    "bf16": (Watched, {"precision": "bf16-mixed"}),
}


# What the step gives, when it steps, how often, and what is logged.
SOME = (
    "None now and then",
    "ends the epoch",
    "optimizer_step",
    "LBFGS",
    "logs",
    "logs now and then",
    "clip by norm",
    "accumulation",
    "bf16",
)


@pytest.mark.parametrize("name", sweep(UNUSUAL, SOME))
def test_what_is_unusual_goes_as_in_lightning_s_own_loop(name: str) -> None:
    build, options = UNUSUAL[name]
    assert assert_same(build, Watch(), **options)


def test_gradients_that_are_accumulated_in_a_later_epoch() -> None:
    assert assert_same(Watched, Watch(), GradientAccumulationScheduler({0: 1, 1: 2, 2: 1, 3: 2}))


class OwnZeroGrad(torch.optim.SGD):
    """Lets a hundredth of a gradient stand."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.detach() * 0.01


def test_an_optimizer_s_own_zero_grad_is_called() -> None:
    class Module(Watched):
        def configure_optimizers(self) -> Any:
            return OwnZeroGrad(self.parameters(), lr=0.1)

    assert assert_same(Module, Watch())


# The compiled ones take seconds; the others differ in what their steps do.
FEW = ("GAN", "step schedule", "dropout", "built in setup", "transfer hooks", "metric objects")


@pytest.mark.parametrize("name", sweep([name for name in MODULES if name != "bf16"], FEW))
def test_every_kind_of_module_trains_as_in_lightning_s_own_loop(name: str) -> None:
    def result() -> Any:
        weights, history = trained(MODULES[name])
        return weights, repr(history)

    fast = result()
    with pytest.MonkeyPatch.context() as patch:
        as_lightning_does(patch)
        usual = result()
    torch.testing.assert_close(fast[0], usual[0], rtol=0, atol=0)
    assert fast[1] == usual[1]


def test_a_name_logged_in_two_ways_is_still_refused() -> None:
    class Twice(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("x", loss, on_step=batch_idx == 2, on_epoch=True)
            return loss

    with pytest.raises(Exception, match=r"(?s)self.log\(x, ...\).*twice") as caught:
        fit(Twice, True)
    assert MisconfigurationException.__name__ in str(caught.value)


def test_a_value_with_many_elements_is_still_refused() -> None:
    class Wide(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("x", loss if batch_idx == 0 else loss.expand(3))
            return loss

    with pytest.raises(Exception, match="must have a single element"):
        fit(Wide, True)


def test_what_is_known_of_a_step_does_not_keep_what_it_leads_to() -> None:
    def known() -> weakref.ref[ToyModule]:
        module = ToyModule()
        assert fast_loop.takes_index(lambda batch, batch_idx: module.net(batch))
        return weakref.ref(module)

    gone = known()
    gc.collect()
    assert gone() is None
