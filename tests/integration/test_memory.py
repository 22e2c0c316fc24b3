"""Server memory does not grow with the cohort."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


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
def test_two_hundred_clients_need_no_more_memory_than_twenty() -> None:
    small, large = peaks("20", "200")
    assert small < 6
    assert large < 6
    assert abs(large - small) < 0.2


@pytest.mark.timeout(900)
def test_clients_trained_as_one_need_the_memory_of_as_many_and_no_more_with_the_cohort() -> None:
    small, large = peaks("16", "48", "--at-once", "8")
    server = 4  # the weights kept aside, the mean in float64, a part that is being stacked
    assert large < 1.3 * 8 * 2 + server  # weights and gradients
    assert abs(large - small) < 1
