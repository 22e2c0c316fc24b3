"""What a client's module logs, kept at a fraction of the cost: the same values, in Lightning's own collection."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_fed._compat.lightning import ResultCollection, ResultMetric, batch_size_for, set_loop_results
from lightning_fed._compat.results import records_copied
from lightning_fed._compat.torchmetrics import defaults


class _Logged(ResultMetric):
    """A logged value that looks whether it is at its device already, where Lightning walks over all it holds."""

    def to(self, *args: Any, **kwargs: Any) -> ResultMetric:  # type: ignore[override]
        device = kwargs.get("device", args[0] if len(args) == 1 else None)
        if not self.is_tensor or device is None:
            return super().to(*args, **kwargs)
        device = torch.device(device)
        for part in (*self.__dict__.values(), *defaults(self).values()):
            if isinstance(part, Tensor) and part.device != device:
                super().to(device)
                break
        return self


class LoggedValues(ResultCollection):
    """Lightning's collection, which remembers how a name was logged: the second time nothing has to be checked."""

    def __init__(self, training: bool) -> None:
        super().__init__(training)
        self._known: dict[tuple[str, str], tuple[Any, ...]] = {}

    def __setitem__(self, key: str, value: ResultMetric) -> None:
        value.__class__ = _Logged
        super().__setitem__(key, value)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does."""
        with records_copied():
            super().log(*args, **kwargs)

    def remember(self, hook: str, name: str, how: tuple[Any, ...]) -> None:
        """Take note of how Lightning has just logged a name in a hook."""
        self._known[hook, name] = how

    def log_again(
        self, hook: str, name: str, value: Any, how: tuple[Any, ...], batch_size: int | None, is_first: bool
    ) -> bool:
        """Log a value as Lightning would.

        Args:
            hook: The hook that logs.
            name: The name, as the user wrote it.
            value: What is logged.
            how: All other arguments of ``self.log``.
            batch_size: The one that the user gave.
            is_first: Whether it is the first of the hook in an epoch: what it logged in the one before is reset.

        Returns:
            Whether it did; not where name, arguments or kind of value are new, and Lightning must check them.
        """
        if type(value) is not Tensor or self._known.get((hook, name)) != how:
            return False
        if value.numel() != 1 or not value.is_floating_point():
            return False
        metric = self[f"{hook}.{name}"]
        if not metric.is_tensor:
            return False
        if is_first:
            self.reset(metrics=False, fx=hook)
        metric.to(value.device)
        metric.forward(value.detach().squeeze(), batch_size_for(self, metric, batch_size))
        metric.has_reset = False
        return True


def use_logged_values(trainer: Trainer) -> None:
    """Let the loops of a trainer that has not begun log into ``LoggedValues``."""
    epoch_loop = trainer.fit_loop.epoch_loop
    for loop in (epoch_loop, epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        set_loop_results(loop, LoggedValues(training=loop is epoch_loop))
