"""Lightning's look at the signatures of the user's steps: once for each function, and not several times a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType
from typing import Any

from lightning.pytorch.core import module, optimizer
from lightning.pytorch.loops import evaluation_loop, training_epoch_loop, utilities
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

_MODULES: tuple[Any, ...] = (module, optimizer, evaluation_loop, training_epoch_loop, utilities)
_ASKING = [one for one in _MODULES if hasattr(one, "is_param_in_hook_signature")]  # all, so far
# What Lightning found in functions that say nothing of themselves but what is in their code.
_known: dict[tuple[CodeType, type, str, bool, int | None], bool] = {}


def is_parameter_of(hook: Callable[..., Any], param: str, explicit: bool = False, min_args: int | None = None) -> bool:
    """Return what Lightning's ``is_param_in_hook_signature`` does; it reads a function's code each time.

    >>> is_parameter_of(lambda self, batch, batch_idx: None, "batch_idx")
    True
    """
    function = getattr(hook, "__func__", hook)
    if type(hook) not in (FunctionType, MethodType) or type(function) is not FunctionType or function.__dict__:
        return is_param_in_hook_signature(hook, param, explicit, min_args)  # a decorator may have said something else
    key = function.__code__, type(hook), param, explicit, min_args
    if key not in _known:
        if len(_known) >= 1000:  # of functions that are made anew for each client
            _known.clear()
        _known[key] = is_param_in_hook_signature(hook, param, explicit, min_args)
    return _known[key]


@contextmanager
def signatures_known() -> Iterator[None]:
    """In the block, a fit, Lightning reads no signature a second time."""
    before = [asking.is_param_in_hook_signature for asking in _ASKING]
    for asking in _ASKING:
        asking.is_param_in_hook_signature = is_parameter_of
    try:
        yield
    finally:
        for asking, reads in zip(_ASKING, before, strict=True):
            asking.is_param_in_hook_signature = reads
