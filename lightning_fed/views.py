"""A view: a subclass of an instance's own class, which the instance has for a while.

The server and the clients of one process share one module under two views. A copy would not do: copies of compiled
modules, or of modules that hold a closure over a layer, silently train nothing.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_fed._compat.lightning import COMPILER
from lightning_fed._compat.torch import COMPILED_CALL
from lightning_fed.caching import cached

_HIDDEN = "_lightning_fed_hidden"
_CLASS = "_lightning_fed_class"
_COMPILED = {"forward", "training_step", "validation_step", "test_step", "predict_step"}


class View:
    """The base of all views; instances pickle as the user's own class."""

    _lightning_fed_class: type
    _lightning_fed_names: frozenset[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # The user's own __init_subclass__ (a registry, required arguments) is not meant for views.
        pass

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = list(object.__reduce_ex__(self, protocol))
        reduced[1] = tuple(self._lightning_fed_class if arg is type(self) else arg for arg in reduced[1])
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            reduced[0] = _new
        if len(reduced) > 2 and isinstance(reduced[2], dict):  # what the view hides is the instance's own
            state = {**reduced[2], **reduced[2].get(_HIDDEN, {})}
            state.pop(_HIDDEN, None)
            if state.get(COMPILER) is not None:
                # Lightning puts compiled methods there, which cannot be pickled: a copy runs the user's own.
                state = {name: value for name, value in state.items() if name not in _COMPILED}
                state[COMPILER] = None
            reduced[2] = state
        return tuple(reduced)


def _new(cls: Any, *args: Any) -> Any:
    """Do as ``copyreg.__newobj__``, which pickle accepts for the instance's present class only."""
    return cls.__new__(cls, *args)


def user_class(instance: object) -> type:
    """Return the class that the user wrote, whichever view the instance has."""
    return below(type(instance))


def below(cls: type) -> type:
    """Return the class that the user wrote, where a class is that of a view over it."""
    return getattr(cls, _CLASS, cls)


def overrides(instance: object, base: type, name: str) -> bool:
    """Return whether a hook is overridden: in the user's class, under whichever view, or on the instance itself."""
    if name in vars(instance) or name in vars(instance).get(_HIDDEN, {}):
        return True
    return getattr(user_class(instance), name, None) is not getattr(base, name, None)


def users_own(instance: Any, name: str) -> Any:
    """Return a method as the user has it, under whichever view: what stands on the instance comes first."""
    own = {**vars(instance), **vars(instance).get(_HIDDEN, {})}
    if name in own:
        return own[name]
    return getattr(super(View, instance) if issubclass(type(instance), View) else instance, name)


# Kept, because torch.compile guards on the class: a new one each round would compile anew each round.
@cached(256)
def _view_class(view: type, cls: type) -> type:
    names = {_CLASS: cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made: type = type(cls)(cls.__name__, (view, cls), names)
    made._lightning_fed_names = frozenset(vars(made))  # type: ignore[attr-defined]
    return made


@cached(256)
def _names(view: type) -> frozenset[str]:
    every = (name for cls in view.__mro__ if issubclass(cls, View) for name in vars(cls))
    return frozenset(name for name in every if not name.startswith("__"))


def uncompile(copied: nn.Module) -> None:
    """Let a copy of a module, and all within it, run the user's own code; what is compiled has the original's layers.

    Args:
        copied: The copy, changed in place.
    """
    for child in copied.modules():
        state = vars(child)
        state.pop(COMPILED_CALL, None)
        if state.get(COMPILER) is not None:
            state[COMPILER] = None
            for name in _COMPILED & state.keys():
                del state[name]


def move_to_class(instance: Any) -> None:
    """Give the user's class what was set on a view: ``type(self).count += 1`` means the class that the user wrote."""
    cls = type(instance)
    if not issubclass(cls, View):
        return
    for name in vars(cls).keys() - cls._lightning_fed_names - {"_lightning_fed_names"}:
        setattr(cls._lightning_fed_class, name, vars(cls)[name])
        delattr(cls, name)


@contextmanager
def viewed_as(instance: Any, view: type[View]) -> Iterator[None]:
    """Give ``instance`` the class ``view`` + its own class for the time of the block.

    What stands in the instance's ``__dict__`` under a name of the view would shadow it (``module.compile()`` and
    ``LightningCLI`` put methods there): it is taken out for the block. A view over another view sees what the
    other one hid.
    """
    outer = type(instance)
    move_to_class(instance)
    state = instance.__dict__
    uncovered = dict(state.get(_HIDDEN, {}))
    state.update(uncovered)
    hidden = {name: state.pop(name) for name in _names(view) if name in state}
    instance.__class__ = _view_class(view, user_class(instance))
    previous = state.get(_HIDDEN)
    state[_HIDDEN] = hidden
    try:
        yield
    finally:
        move_to_class(instance)
        instance.__class__ = outer
        instance.__dict__.pop(_HIDDEN, None)
        instance.__dict__.update(hidden)
        for name in uncovered:
            instance.__dict__.pop(name, None)
        if previous is not None:
            instance.__dict__[_HIDDEN] = previous
