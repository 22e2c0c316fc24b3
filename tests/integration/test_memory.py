"""Server memory does not grow with the cohort."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


# Twenty clients against two hundred take minutes; the same holds, and is seen, with fewer.
@pytest.mark.parametrize("cohorts", [(5, 25), pytest.param((20, 200), marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_a_larger_cohort_needs_no_more_memory(cohorts: tuple[int, int]) -> None:
    script = Path(__file__).with_name("memory_script.py")
    command = [sys.executable, str(script), *map(str, cohorts)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=850, check=True)
    small, large = json.loads(run.stdout.splitlines()[-1])
    assert small < 6
    assert large < 6
    assert abs(large - small) < 0.5
