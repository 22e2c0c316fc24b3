"""Runs a checkout of Lightning's tests with its own Trainer, once, and then with a federation of one client.

``LIGHTNING_TESTS=checkout python -m tests.compat.lightning_tests [--fresh] [arguments of pytest]``
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Within tests/tests_pytorch. The tests of legacy checkpoints need files that the repository does not hold.
SCOPE = (
    "callbacks",
    "checkpointing",
    "loggers",
    "trainer/logging_",
    "models/test_hooks.py",
    "trainer/optimization",
    "loops/optimization",
    "core/test_lightning_optimizer.py",
    "core/test_metric_result_integration.py",
)
LEFT_OUT = ("checkpointing/test_legacy_checkpoints.py",)


def run(checkout: Path, trainer: str, paths: tuple[str, ...] = SCOPE, arguments: tuple[str, ...] = ()) -> int:
    """Runs tests of a checkout in a process of their own, and returns pytest's exit status.

    Args:
        checkout: A checkout of Lightning's repository, of the version that is installed or the nearest.
        trainer: ``"plain"`` or ``"one-client"``.
        paths: Files and folders within its ``tests/tests_pytorch``.
        arguments: More for pytest.
    """
    tests = checkout / "tests"
    root = Path(__file__).parents[2]
    command = [
        *(sys.executable, "-m", "pytest", "-p", "tests.compat.lightning_plugin", "--trainer", trainer),
        *("-c", str(checkout / "pyproject.toml"), "--rootdir", str(checkout), "-o", "addopts="),
        *("--quiet", "--timeout=600", "--disable-warnings", "--tb=short", "-r", "fE"),
        *(f"--ignore={tests / 'tests_pytorch' / path}" for path in LEFT_OUT),
        *arguments,
        *(str(tests / "tests_pytorch" / path) for path in paths),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(tests)]), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=tests, env=environment, check=False).returncode


def main(arguments: list[str]) -> int:
    """Both runs; the first only where it was not made before, or ``--fresh`` asks for it."""
    if "LIGHTNING_TESTS" not in os.environ:
        print("Set LIGHTNING_TESTS to a checkout of Lightning's repository.", file=sys.stderr)
        return 2
    checkout = Path(os.environ["LIGHTNING_TESTS"]).resolve()
    fresh = "--fresh" in arguments
    if fresh or not (checkout / ".pytest_cache" / "v" / "lightning_fed" / "plain").is_file():
        run(checkout, "plain")
    rest = tuple(argument for argument in arguments if argument != "--fresh")
    paths = tuple(argument for argument in rest if not argument.startswith("-"))
    return run(checkout, "one-client", paths or SCOPE, tuple(a for a in rest if a.startswith("-")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
