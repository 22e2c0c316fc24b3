"""The list of Lightning's tests that differ with a federation of one client, each with its class and its reason."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).with_name("differences.toml")
# The class of those that use what a FederatedTrainer refuses; the reason is a word of the refusal.
REFUSED = "refused"
# Those in which a client fails, and those that are known and not yet mended.
CLIENT_ERROR, FAULT = "client-error", "fault"


@dataclass(frozen=True)
class Difference:
    """Why a test differs; ``may_pass`` where that depends on the machine."""

    kind: str
    reason: str
    may_pass: bool = False


class Differences:
    """What ``differences.toml`` holds.

    Args:
        path: The file. A test is named by its file within ``tests_pytorch`` and its function; ``name[*]`` stands for
            all its parameters.

    Raises:
        ValueError: If a class has no explanation, a test no reason, or a test stands there twice.
    """

    def __init__(self, path: Path = LIST) -> None:
        self.kinds: list[str] = []
        self._tests: dict[str, Difference] = {}
        for kind, content in tomllib.loads(path.read_text()).items():
            if not content.get("explanation", "").strip():
                raise ValueError(f"{path.name}: the class {kind!r} has no explanation.")
            self.kinds.append(kind)
            for test, reason in content.get("tests", {}).items():
                if not reason.strip() or test in self._tests:
                    raise ValueError(f"{path.name}: {test} has no reason, or stands there twice.")
                self._tests[test] = Difference(kind, reason, content.get("may_pass", False))

    def of(self, test: str) -> Difference | None:
        """Why a test differs, or ``None`` where it must not."""
        return self._tests.get(test) or self._tests.get(_all_parameters(test))

    def unknown(self, tests: Iterable[str]) -> list[str]:
        """The listed tests that are not among ``tests``."""
        known = {name for test in tests for name in (test, _all_parameters(test))}
        return sorted(self._tests.keys() - known)


def _all_parameters(test: str) -> str:
    return f"{test.split('[', 1)[0]}[*]"
