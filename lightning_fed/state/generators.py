"""Generators of random numbers, whichever library's they are, and how they are seeded, read and set."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_fed._compat.numpy import everybodys_generator
from lightning_fed.caching import cached


@dataclass(frozen=True, slots=True)
class GeneratorKind:
    """How the generators of one library are handled.

    Attributes:
        seed: Seeds a generator with a number in ``[0, 2**32)``.
        state: A generator's state, a copy.
        load: Gives a generator a state.
    """

    seed: Callable[[Any, int], Any]
    state: Callable[[Any], Any]
    load: Callable[[Any, Any], Any]


def _seed_bits(bits: Any, seed: int) -> None:
    bits.state = type(bits)(seed).state


def _load_bits(bits: Any, state: Any) -> None:
    bits.state = state


_KINDS: dict[type, GeneratorKind] = {
    torch.Generator: GeneratorKind(
        torch.Generator.manual_seed, lambda own: own.get_state(), lambda own, state: own.set_state(state)
    ),
    np.random.BitGenerator: GeneratorKind(_seed_bits, lambda own: own.state, _load_bits),
    np.random.Generator: GeneratorKind(
        lambda own, seed: _seed_bits(own.bit_generator, seed),
        lambda own: own.bit_generator.state,
        lambda own, state: _load_bits(own.bit_generator, state),
    ),
    np.random.RandomState: GeneratorKind(
        lambda own, seed: own.seed(seed),
        lambda own: own.get_state(legacy=False),
        lambda own, state: own.set_state(state),
    ),
    random.Random: GeneratorKind(
        lambda own, seed: own.seed(seed), lambda own: own.getstate(), lambda own, state: own.setstate(state)
    ),
}


@cached(4096)
def generator_kind(cls: type) -> GeneratorKind | None:
    """Return how generators of a class are handled; ``None`` for others, and for one that draws from the system."""
    if issubclass(cls, random.SystemRandom):
        return None
    return next((kind for base, kind in _KINDS.items() if issubclass(cls, base)), None)


def is_global(generator: object) -> bool:
    """Return whether it is the one that Python, NumPy or torch has for everybody."""
    everybodys = (random.seed.__self__, everybodys_generator(), torch.default_generator)  # type: ignore[attr-defined]
    return any(generator is one for one in everybodys)


@cached(4096)
def seeding_method(cls: type) -> Callable[[Any, int], Any] | None:
    """Return the method by which objects of a class are seeded, with whatever they draw from, or ``None``.

    MONAI's transforms have ``set_random_state``, those of albumentations ``set_random_seed``.
    """
    for name in ("set_random_state", "set_random_seed"):
        method = getattr(cls, name, None)
        if callable(method):
            try:
                inspect.signature(method).bind(None, 0)
            except (TypeError, ValueError):
                continue
            return method
    return None
