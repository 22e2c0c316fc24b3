"""Every random draw of a run starts from ``(seed, round, client, purpose)``."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng


def run_seed(seed: int | None) -> int:
    """Return the seed of a run: the one given, else that of ``lightning.seed_everything``, else 0."""
    if seed is not None:
        return seed
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def seed_for(seed: int, purpose: str, *, round: int = 0, client: int = -1) -> int:
    """Derive an independent seed in ``[0, 2**32)`` (NumPy takes no more).

    Args:
        seed: The run's seed.
        purpose: What is drawn, such as ``"train"`` or ``"cohort"``.
        round: The round, from 1; 0 for what is drawn once a run.
        client: The client's index; -1 for the server.

    >>> seed_for(0, "train", round=1, client=3) == seed_for(0, "train", round=1, client=3)
    True
    >>> seed_for(0, "train", round=1, client=3) == seed_for(0, "train", round=2, client=3)
    False
    """
    key = f"{seed}/{round}/{client}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")


def seed_all(seed: int, *, devices: bool = True) -> None:
    """Seed Python, NumPy and torch, on every device or on the CPU alone.

    Unlike ``seed_everything`` this leaves the environment's variables alone.
    """
    random.seed(seed)
    np.random.seed(seed)
    if devices and _has_accelerator():
        torch.manual_seed(seed)
    else:
        # torch.manual_seed would note a call, with its traceback, for each kind of device that may yet start: a
        # millisecond for each client, and memory that grows from round to round.
        torch.default_generator.manual_seed(seed)


@lru_cache(maxsize=1)
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


@contextmanager
def random_states_kept(*, devices: bool = True) -> Iterator[None]:
    """Put the states of Python's, NumPy's and torch's generators back after the block, however it ends.

    Args:
        devices: Those of all devices; a loader's worker process cannot ask them, and may leave them alone.
    """
    raised: BaseException | None = None
    with isolate_rng(include_cuda=devices and _has_accelerator()):
        try:
            yield
        except BaseException as error:  # isolate_rng restores nothing when it sees one
            raised = error
    if raised is not None:
        raise raised


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch for the block and restore their states after it, however it ends."""
    with random_states_kept():
        seed_all(seed)
        yield
