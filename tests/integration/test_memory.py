"""Server memory does not grow with the cohort."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_fed.client.local.fit import local_evaluate, local_fit
from lightning_fed.client.local.work import LocalOptions, LocalTask, LocalWork
from lightning_fed.client.vectorized.fit import StackOptions, vectorized_evaluate, vectorized_fit
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.data import ClientLoaders
from lightning_fed.values.weights import read
from tests.helpers import QUIET, sweep


def peaks(*arguments: str) -> list[float]:
    """Peak memory above the idle module, in module sizes."""
    script = Path(__file__).with_name("memory_script.py")
    # Each tensor in pages of its own, which go back at once: what is measured is what is held, not how malloc keeps it.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=850, env=env
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("few", "many", "at_once"), sweep([(3, 8, 2), (20, 200, 8)], [(3, 8, 2)]))
def test_many_clients_need_no_more_memory_than_few(few: int, many: int, at_once: int) -> None:
    small, large, *vectorized = peaks(str(few), str(many), *(f"{n * at_once}:{at_once}" for n in (2, 4)))
    assert small < 6
    assert large < 6
    assert abs(large - small) < 0.2
    server = 4  # the weights kept aside, the mean in float64, a part that is being stacked
    assert vectorized[1] < 1.3 * at_once * 2 + server  # weights and gradients
    assert abs(vectorized[1] - vectorized[0]) < 0.2


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def alone(run: Any) -> Any:
    return lambda works: [run(work) for work in works]


def as_one(run: Any) -> Any:
    return lambda works: run(works, StackOptions())


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize(
    ("run", "apart"),
    [
        (alone(local_fit), True),
        (alone(local_evaluate), True),
        (as_one(vectorized_fit), True),
        (as_one(vectorized_evaluate), False),
    ],
    ids=["train alone", "evaluate alone", "train vectorized", "evaluate vectorized"],
)
def test_no_weights_are_left_to_the_garbage_collector(run: Any, apart: bool) -> None:
    module, own = ToyModule(), {"accelerator": "cpu", "devices": 1}
    Trainer(max_epochs=0, **QUIET, devices=1).fit(module, DataLoader(toy_data()))
    first = read(module)
    each = [first, read(module) if apart else first]
    tasks = [LocalTask(client, 1, 0, weights, set_up=False) for client, weights in enumerate(each)]
    loaders = ClientLoaders(DataLoader(toy_data(16)), DataLoader(toy_data(8)))
    works = [LocalWork(module, None, loaders, task, LocalOptions(trainer=own)) for task in tasks]
    results = run(works)
    given = [tensor for result in results for tensor in result.weights.values()]
    left = [weakref.ref(tensor.untyped_storage()) for tensor in (*first.values(), *each[1].values(), *given)]
    del first, each, tasks, works, results, given
    assert not [ref for ref in left if ref() is not None]
