"""Server memory does not grow with the cohort."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(900)
def test_two_hundred_clients_need_no_more_memory_than_twenty() -> None:
    script = Path(__file__).with_name("memory_script.py")
    command = [sys.executable, str(script), "20", "200"]
    # Each tensor in pages of its own, which go back at once: what is measured is what is held, not how malloc keeps it.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=850, env=env)
    assert run.returncode == 0, run.stderr
    small, large = json.loads(run.stdout.splitlines()[-1])
    assert small < 6
    assert large < 6
    assert abs(large - small) < 0.2
