"""What a client's module logs, kept at a fraction of the cost: the same values, in Lightning's own collection."""

from __future__ import annotations

from collections.abc import MutableMapping
from types import BuiltinFunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_fed._compat.lightning import (
    ResultCollection,
    ResultMetric,
    batch_size_for,
    is_first_log_of,
    last_value,
    note_log_of,
    running_hook,
    set_loop_results,
)
from lightning_fed._compat.results import records_copied, result_metric, same_metadata
from lightning_fed._compat.signatures import is_parameter_of
from lightning_fed._compat.torchmetrics import computed, defaults

# Arguments of ``self.log`` that may be kept longer than a fit.
_PLAIN = (bool, str, type(None), BuiltinFunctionType)
# How the fits of a module have logged numbers, by hook and name: the arguments, and what Lightning made of them.
_known_earlier: MutableMapping[LightningModule, dict[tuple[str, str], tuple[Any, Any]]] = WeakKeyDictionary()


class _Logged(ResultMetric):
    """A logged value that looks whether it is at its device already, where Lightning walks over all it holds."""

    def to(self, *args: Any, **kwargs: Any) -> ResultMetric:  # type: ignore[override]
        device = kwargs.get("device", args[0] if len(args) == 1 else None)
        if not self.is_tensor or device is None:
            return super().to(*args, **kwargs)
        device = torch.device(device)
        held = (self.value, computed(self), last_value(self), *defaults(self).values())
        if any(part is not None and part.device != device for part in held):
            super().to(device)
        return self


class LoggedValues(ResultCollection):
    """Lightning's collection, which remembers how a name was logged: the second time nothing has to be checked."""

    def __init__(self, training: bool) -> None:
        super().__init__(training)
        self._known: dict[tuple[str, str], tuple[Any, ...]] = {}

    def __setitem__(self, key: str, value: ResultMetric) -> None:
        value.__class__ = _Logged
        super().__setitem__(key, value)

    @torch.compiler.disable  # as Lightning's
    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does."""
        with records_copied():
            super().log(*args, **kwargs)

    def remember(self, module: LightningModule, hook: Any, name: str, how: tuple[Any, ...]) -> None:
        """Take note of how Lightning has just logged a name in a hook of a module; of numbers also for later fits."""
        self._known[hook, name] = how
        record = self.get(f"{hook}.{name}")
        is_plain = all(isinstance(one, _PLAIN) for one in (*how[0], *how[1].values()))
        if record is not None and record.is_tensor and is_plain:
            _known_earlier.setdefault(module, {})[hook, name] = how, same_metadata(record.meta, None)

    def log_again(
        self, module: LightningModule, name: str, value: Any, how: tuple[Any, ...], batch_size: int | None
    ) -> bool:
        """Log a value as Lightning would.

        Args:
            module: The module, in the hook that logs.
            name: The name, as the user wrote it.
            value: What is logged.
            how: All other arguments of ``self.log``.
            batch_size: The one that the user gave.

        Returns:
            Whether it did; not where name, arguments or kind of value are new, and Lightning must check them.
        """
        if type(value) is not Tensor or value.numel() != 1 or not value.is_floating_point():
            return False
        hook, trainer = running_hook(module), module.trainer
        if hook is None or not self._is_known(module, hook, name, how):
            return False
        metric = self[f"{hook}.{name}"]
        if not metric.is_tensor:
            return False
        if is_first_log_of(trainer, hook):  # what the hook logged in the epoch before
            self.reset(metrics=False, fx=hook)
        metric.to(value.device)
        metric.forward(value.detach().squeeze(), batch_size_for(self, metric, batch_size))
        metric.has_reset = False
        note_log_of(trainer, hook)
        return True

    def _is_known(self, module: LightningModule, hook: str, name: str, how: tuple[Any, ...]) -> bool:
        """Return whether a name was logged so before; a record is made here of what only an earlier fit has logged."""
        if (hook, name) in self._known:
            return self._known[hook, name] == how
        earlier = _known_earlier.get(module, {}).get((hook, name))
        key = f"{hook}.{name}"
        if earlier is None or earlier[0] != how or key in self:
            return False
        if is_parameter_of(module.training_step, "dataloader_iter", explicit=True):  # it may be another one now
            return False
        self[key] = result_metric(same_metadata(earlier[1], module.trainer.strategy.reduce), True)
        self._known[hook, name] = how
        return True


def use_logged_values(trainer: Trainer) -> None:
    """Let the loops of a trainer that has not begun log into ``LoggedValues``."""
    epoch_loop = trainer.fit_loop.epoch_loop
    for loop in (epoch_loop, epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        set_loop_results(loop, LoggedValues(training=loop is epoch_loop))
