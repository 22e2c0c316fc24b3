"""Optimizers and schedulers that a module keeps and gives at every call of ``configure_optimizers``.

``LightningCLI`` makes such modules. A local fit must not find what the one before made of them.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_fed._compat.lightning import trainer_of
from lightning_fed._compat.torch import buffers_in, parameters_in

_KINDS = (Optimizer, LRScheduler)
# A list or dict with more in it holds something else.
_MANY = 100
_LIGHTNINGS = frozenset(vars(LightningModule()))
_PLAIN = {bool, int, float, str, type(None), types.FunctionType}


class AsConfigured:
    """Optimizers and schedulers as they were before a fit, to be restored after it.

    The objects themselves and not copies of them, for the user's code may hold them, too.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, dict[str, Any]]] = {}

    def keep(self, module: LightningModule, objects: Iterable[Any]) -> None:
        """Remember what objects, and those that they hold, are like; of those known already nothing new."""
        found = {id(one): one for one in _with_held(objects) if id(one) not in self._kept}
        if not found:
            return
        copier = _Copier(module, {**found, **{key: one for key, (one, _) in self._kept.items()}})
        for one in found.values():
            for group in getattr(one, "param_groups", ()):
                copier.same.update({id(parameter): parameter for parameter in group["params"]})
        for key, one in found.items():
            self._kept[key] = one, copier.copied(vars(one))

    def restore(self) -> None:
        """Make all objects what they were."""
        for one, attributes in self._kept.values():
            vars(one).clear()
            vars(one).update(attributes)
        self._kept = {}


class _Copier:
    """Deep copies that hold the very same optimizers, schedulers and parts of the module.

    Most of what an optimizer has is numbers in dicts, for which ``copy.deepcopy`` takes its time.
    """

    def __init__(self, module: LightningModule, same: dict[int, Any]) -> None:
        self._module, self.same = module, same
        self._memo: dict[int, Any] = {}

    def copied(self, value: Any) -> Any:
        """Return a copy; a part that cannot be copied (a weak reference, a lock) is no part that a step changes."""
        kind = type(value)
        if kind in _PLAIN or id(value) in self.same:
            return value
        if kind is dict:
            return {key: part if type(part) in _PLAIN else self.copied(part) for key, part in value.items()}
        if kind is list:
            return [self.copied(part) for part in value]
        if isinstance(value, dict) and not value:
            return value.copy()
        self._memo = self._memo or {**shared(self._module), **self.same}
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:
            return value


def shared(module: nn.Module) -> dict[int, Any]:
    """Return a memo for ``copy.deepcopy`` with which copies hold the module's own submodules and tensors."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        memo[id(child)] = child
        for store in (parameters_in(child), buffers_in(child)):
            memo.update({id(tensor): tensor for tensor in store.values() if tensor is not None})
    if isinstance(module, LightningModule) and (trainer := trainer_of(module)) is not None:
        memo[id(trainer)] = trainer
    return memo


def held_by(module: LightningModule) -> Iterator[Any]:
    """Return what a module may give ``configure_optimizers`` to return: in attributes, or bound to that method."""
    attributes = vars(module)
    yield from (value for name, value in attributes.items() if name not in _LIGHTNINGS)
    bound = getattr(attributes.get("configure_optimizers"), "__func__", None)
    if isinstance(bound, partial):
        yield from (*bound.args, *bound.keywords.values())


def _with_held(objects: Iterable[Any]) -> Iterator[Any]:
    """Optimizers and schedulers among objects, in containers of them, and in each other (``SequentialLR``)."""
    waiting, seen = list(objects), set[int]()
    while waiting:
        one = waiting.pop()
        if isinstance(one, _KINDS):
            if id(one) not in seen:
                seen.add(id(one))
                yield one
                waiting += vars(one).values()
        elif isinstance(one, (dict, list, tuple)) and 0 < len(one) <= _MANY:
            waiting += [part for part in (one.values() if isinstance(one, dict) else one) if isinstance(part, _KINDS)]
