"""Server memory does not grow with the cohort."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_round_of_200_clients_needs_no_more_memory_than_one_of_20() -> None:
    script = Path(__file__).with_name("memory_script.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=True)
    peaks = json.loads(run.stdout.splitlines()[-1])
    assert peaks["20"] < 6
    assert peaks["200"] < 6
    assert abs(peaks["200"] - peaks["20"]) < 0.5, peaks
