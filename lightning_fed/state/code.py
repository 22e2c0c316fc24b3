"""What code leads to: the generators that it draws from, its default arguments, variables of the code around it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from lightning_fed.caching import cached
from lightning_fed.state.generators import generator_kind
from lightning_fed.state.nodes import Child
from lightning_fed.state.packages import is_library

# Attributes by which something that is called, or looks like an attribute, leads to the function that was written.
_WRITTEN = ("__func__", "fget", "fset", "func", "__wrapped__")
_DEEP = 4  # so many functions call each other before a generator is not looked for any more


def of_function(function: types.FunctionType) -> list[Child]:
    """Return what a function leads to."""
    closure = [(("closure", i), cell) for i, cell in enumerate(function.__closure__ or ())]
    return [*_drawn_by(function), *_defaults(function), *closure]


def of_class(cls: type) -> list[Child]:
    """Return the classes within a class, and what its functions lead to, but for the variables around them.

    These are the code's that made the class.
    """
    found: list[Child] = []
    for name, value in vars(cls).items():
        if isinstance(value, type) and not is_library(value.__module__):
            found.append((("attribute", name), value))
        for function in _functions(value):
            if function.__module__ == cls.__module__ or not is_library(function.__module__):
                found += [((f"function {name}", step), one) for (_, step), one in _drawn_by(function)]
                found += _defaults(function, name)
    return found


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Return the functions behind an attribute of a class: a method's, a property's, a decorated one."""
    if isinstance(value, types.FunctionType):
        yield value
    if isinstance(value, type):
        return
    for name in _WRITTEN:
        with suppress(Exception):  # whatever a descriptor of the user's does
            inner = value.__dict__.get(name) if isinstance(value, types.FunctionType) else getattr(value, name, None)
            if inner is not None and inner is not value:
                yield from _functions(inner)


def _defaults(function: types.FunctionType, method: str | None = None) -> list[Child]:
    """Return the default arguments, and attributes of a method, that may change."""
    held = [("__defaults__", function.__defaults__), ("__kwdefaults__", function.__kwdefaults__)]
    if method is None:
        return [(("attribute", name), value) for name, value in held if value]
    owned = [*held, ("__dict__", function.__dict__)]
    # An attribute may be the first that a method gets.
    changing = [(name, value) for name, value in owned if name == "__dict__" or (value and not _is_fixed(value))]
    return [((f"function {method}", name), value) for name, value in changing]


def _is_fixed(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, tuple) and all(isinstance(one, (int, float, str, bytes, type(None))) for one in inner)


def _drawn_by(function: types.FunctionType) -> list[Child]:
    """Return the generators that a function, or one that it calls, finds around it."""
    return [(("global", name), one) for name, one in _drawn(function, "", set())]


def _drawn(function: types.FunctionType, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(function) in seen or prefix.count(".") >= _DEEP:
        return
    seen.add(id(function))
    for name, value in _around(function):
        path = f"{prefix}{name}"
        if _is_generator(value):
            yield path, value
        elif isinstance(value, types.FunctionType):
            if not is_library(value.__module__):
                yield from _drawn(value, f"{path}.", seen)
        elif not is_library(type(value).__module__) or isinstance(value, (dict, type, types.SimpleNamespace)):
            for key, one in _held_by(value):
                if _is_generator(one):
                    yield f"{path}.{key}", one
                elif isinstance(one, types.FunctionType) and not is_library(one.__module__):
                    yield from _drawn(one, f"{path}.{key}.", seen)


def _held_by(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, type) and is_library(value.__module__):
        return []
    held = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return list(held.items()) if len(held) <= 64 else []


def _around(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Return the variables that a function finds in its module, and in the function that made it."""
    names = (name for name in _names_in(function.__code__) if name in function.__globals__)
    yield from ((name, function.__globals__[name]) for name in names)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents


def _is_generator(value: Any) -> bool:
    return generator_kind(type(value)) is not None


@cached(4096)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names_in(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))
