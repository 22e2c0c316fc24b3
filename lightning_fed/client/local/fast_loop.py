"""The epoch loop of clients' trainers: Lightning's, step for step, without what nobody listens to.

With a small model most of a step's time is Lightning's: twenty hooks, called overridden or not, each
with a profiler's context; closures in closures; signatures read anew. Here one look at the beginning of an epoch says
which hooks the user overrides. Where anything is unusual (another precision, accumulated gradients, a module's own
``backward``) Lightning's own code runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lightning_fed._compat.known_lightning import is_known
from lightning_fed._compat.lightning import (
    DataFetcher,
    LightningAutomaticOptimization,
    PrefetchDataFetcher,
    begin_batch,
    call_callbacks,
    call_module,
    clip_gradients,
    count_step,
    end_batch,
    is_last_ready_batch,
    is_training_done,
    iterators_of,
    on_before_transfer,
    set_running_hook,
    skips_backward,
    to_device,
    warn_once,
)
from lightning_fed._compat.torch import step_of, unlabel
from lightning_fed.client.local.loops import EpochLoop, EvaluationLoop, FitLoop, ManualOptimization
from lightning_fed.views import overrides

_OF_A_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
_OF_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_OF_OPTIMIZATION = ("optimizer_step", "optimizer_zero_grad", "backward")


class StepHooks:
    """Those hooks of a step that the user overrides, found once an epoch."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._module = trainer, trainer.lightning_module
        self._callbacks = {name for name in _OF_A_STEP if any(overrides(c, Callback, name) for c in trainer.callbacks)}  # type: ignore[attr-defined]
        self._own = {name for name in _OF_A_STEP if overrides(self._module, LightningModule, name)}

    def __contains__(self, name: str) -> bool:
        return name in self._callbacks or name in self._own

    def __bool__(self) -> bool:
        return bool(self._callbacks or self._own)

    def call(self, name: str, *args: Any) -> Any:
        """Call a hook in Lightning's way and order, and return what the module's own gave."""
        if name in self._callbacks:
            call_callbacks(self._trainer, name, *args)
        return call_module(self._trainer, name, *args) if name in self._own else None


class FastOptimization(LightningAutomaticOptimization):
    """Lightning's automatic optimization in one closure."""

    hooks: StepHooks | None = None

    def prepare(self, hooks: StepHooks, is_plain: bool) -> None:
        """Look, once an epoch, whether there is anything else that needs Lightning's own way."""
        module = self.trainer.lightning_module
        usual = is_plain and not skips_backward(self) and self.trainer.strategy.model is module
        usual = usual and not any(overrides(module, LightningModule, name) for name in _OF_OPTIMIZATION)
        self.hooks = hooks if usual else None
        self.clips = bool(self.trainer.gradient_clip_val)
        self.clips = self.clips or overrides(module, LightningModule, "configure_gradient_clipping")

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        """Do as Lightning's; what the step gave is there only for an ``on_train_batch_end`` that is overridden."""
        if self.hooks is None:
            return super().run(optimizer, batch_idx, kwargs)
        module, step = self.trainer.lightning_module, self.optim_progress.optimizer.step
        self._output: dict[str, Any] = {}
        step.increment_ready()
        set_running_hook(module, "optimizer_step")
        step_of(optimizer)(closure=partial(self._closure, optimizer, kwargs))
        set_running_hook(module, None)
        step.increment_completed()
        return self._output

    @torch.enable_grad()
    def _closure(self, optimizer: Optimizer, kwargs: OrderedDict[str, Any]) -> Tensor | None:
        hooks, trainer, module = self.hooks, self.trainer, self.trainer.lightning_module
        assert hooks is not None
        set_running_hook(module, "training_step")
        loss = self._loss(module.training_step(*kwargs.values()), "on_train_batch_end" in hooks)
        set_running_hook(module, "optimizer_step")

        zero_grad = self.optim_progress.optimizer.zero_grad
        zero_grad.increment_ready()
        hooks.call("on_before_zero_grad", optimizer)
        zero_grad.increment_started()
        _zero_grad(optimizer)
        zero_grad.increment_completed()
        if loss is not None:
            hooks.call("on_before_backward", loss)
            self.backward(loss)
            hooks.call("on_after_backward")
        hooks.call("on_before_optimizer_step", optimizer)
        if self.clips:
            clip_gradients(trainer, module, optimizer)
        return None if loss is None else loss.detach()

    def backward(self, loss: Tensor) -> None:
        """Give the parameters their gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def _loss(self, output: Any, is_heard: bool) -> Tensor | None:
        if type(output) is Tensor and output.is_floating_point() and not is_heard:
            return output
        result = ClosureResult.from_training_step_output(output)
        if result.closure_loss is None:
            Closure.warning_cache.warn(
                "`training_step` returned `None`. If this was on purpose, ignore this warning..."
            )
        self._output = {} if result.loss is None else result.asdict()
        return result.closure_loss


# To read a signature takes as long as a small step. Held weakly, for a step may lead to its module.
_takes_index: MutableMapping[Callable[..., Any], bool] = WeakKeyDictionary()


def takes_index(step: Callable[..., Any]) -> bool:
    """Return whether a step, as a function of the module and more, takes the batch's index."""
    try:
        if step not in _takes_index:
            _takes_index[step] = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        return _takes_index[step]
    except TypeError:  # what cannot be a key, or has no weak references
        return is_param_in_hook_signature(step, "batch_idx", min_args=2)


class FastEpochLoop(EpochLoop):
    """Lightning's epoch loop for the usual case: batches from loaders, one device, no accumulation."""

    def on_run_start(self, data_fetcher: DataFetcher) -> None:
        """Look whether this epoch is the usual case."""
        super().on_run_start(data_fetcher)
        trainer, module = self.trainer, self.trainer.lightning_module
        plain_loaders = type(data_fetcher) is PrefetchDataFetcher and not self.restarting
        one_device = type(trainer.strategy) is SingleDeviceStrategy
        self._is_usual = plain_loaders and one_device and trainer.accumulate_grad_batches == 1
        self._hooks, is_plain = StepHooks(trainer), type(trainer.precision_plugin) is Precision
        assert isinstance(self.automatic_optimization, FastOptimization)
        self.automatic_optimization.prepare(self._hooks, self._is_usual and is_plain)
        if not self._is_usual:
            return
        for iterator in iterators_of(data_fetcher):
            unlabel(iterator)
        self._takes_index = takes_index(getattr(module.training_step, "__func__", module.training_step))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        transfers = any(overrides(module, LightningModule, name) for name in _OF_TRANSFER) or (
            data is not None and any(overrides(data, LightningDataModule, name) for name in _OF_TRANSFER)
        )
        self._transfers = transfers or not is_plain

    def _advance(self, data_fetcher: DataFetcher) -> None:
        if not self._is_usual:
            super()._advance(data_fetcher)
            return
        trainer, progress, hooks = self.trainer, self.batch_progress, self._hooks
        batch, _, _ = next(data_fetcher)
        batch_idx = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        batch = self._at_its_device(batch)
        progress.increment_ready()
        begin_batch(trainer, batch)
        output, is_over = None, False
        if batch is None:
            warn_once(self, "train_dataloader yielded None. If this was on purpose, ignore this warning...")
        elif is_over := hooks.call("on_train_batch_start", batch, batch_idx) == -1:
            progress.increment_by(0, is_last_batch=True)
        else:
            progress.increment_started()
            output = self._step(batch, batch_idx)
        progress.increment_processed()
        if trainer.lr_scheduler_configs:
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            if is_last_ready_batch(self):
                self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        if is_over:
            raise StopIteration
        hooks.call("on_train_batch_end", output, batch, batch_idx)
        end_batch(trainer)
        progress.increment_completed()

    def _step(self, batch: Any, batch_idx: int) -> Any:
        kwargs: OrderedDict[str, Any] = OrderedDict(batch=batch)
        if self._takes_index:
            kwargs["batch_idx"] = batch_idx
        if self.trainer.lightning_module.automatic_optimization:
            return self.automatic_optimization.run(self.trainer.optimizers[0], batch_idx, kwargs)
        return self.manual_optimization.run(kwargs)

    def _at_its_device(self, batch: Any) -> Any:
        trainer, is_there = self.trainer, not self._transfers and type(batch) in (list, tuple)
        device = trainer.strategy.root_device
        if is_there and all(_is_at(part, device) for part in batch):
            return batch
        batch = trainer.precision_plugin.convert_input(batch)
        batch = on_before_transfer(trainer.lightning_module, batch)
        return to_device(trainer, batch)

    def on_advance_end(self, data_fetcher: DataFetcher) -> None:
        """Do what comes after a step; without validation that is little."""
        if not self._is_usual or self.trainer.limit_val_batches:
            super().on_advance_end(data_fetcher)
            return
        if self.trainer.lr_scheduler_configs:
            self.update_lr_schedulers("step", update_plateau_schedulers=True)
        count_step(self)
        if self.trainer.received_sigterm and not is_training_done(self):
            raise SIGTERMException


class PlacedBatch:
    """The base of batches that know where they are."""

    def is_at(self, device: torch.device) -> bool:
        """Return whether it is known to be on a device."""
        raise NotImplementedError


def use_fast_loops(trainer: Trainer) -> bool:
    """Give a trainer that has not begun the loops of this file, the fast ones where they are known to be Lightning's.

    Returns:
        Whether they are.
    """
    is_fast = is_known()
    epoch_loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.__class__ = FitLoop
    epoch_loop.__class__ = FastEpochLoop if is_fast else EpochLoop
    epoch_loop.manual_optimization.__class__ = ManualOptimization
    for loop in (epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop.__class__ = EvaluationLoop
    if is_fast:
        epoch_loop.automatic_optimization.__class__ = FastOptimization
    return is_fast


def _zero_grad(optimizer: Optimizer) -> None:
    """Do as ``optimizer.zero_grad()``, without the label of torch's that a profiler would show."""
    if getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _is_at(part: Any, device: torch.device) -> bool:
    """Return whether a part of a batch is known to be at a device."""
    return part.device == device if type(part) is Tensor else isinstance(part, PlacedBatch) and part.is_at(device)
