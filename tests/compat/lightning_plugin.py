"""A pytest plugin that runs Lightning's own tests with a federation of one client in the Trainer's place.

``python -m tests.compat.lightning_tests`` runs them; ``docs/compatibility.md`` tells what comes of it. A test that is
in ``differences.toml`` is expected to differ, and fails if it does not; any other has to pass as with Lightning's own
Trainer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import lightning
import lightning.pytorch
import lightning.pytorch.trainer
import pytest
import torch

import lightning_fed
from lightning_fed import FederatedTrainer
from lightning_fed.errors import ClientError, ConfigurationError, FederationError
from tests.compat.differences import CLIENT_ERROR, FAULT, LIST, REFUSED, Difference, Differences

# Where pytest's cache, which is that of the checkout, keeps what passes with the plain Trainer.
PLAIN = "lightning_fed/plain"
PACKAGE = Path(lightning_fed.__file__).parent
PASSES, FAILS = "passes", "fails"


class OneClientTrainer(FederatedTrainer):
    """What a test gets that asks for a ``Trainer``: one client that trains one epoch a round.

    Attributes:
        refusals: What was refused since the test began.
        client_errors: How many clients failed since then.
        fits: How many fits began since then.
    """

    refusals: ClassVar[list[str]] = []
    client_errors: ClassVar[int] = 0
    fits: ClassVar[int] = 0

    def __init__(self, *, max_epochs: int | None = None, **arguments: Any) -> None:
        if max_epochs is None:  # Lightning's own defaults
            max_epochs = -1 if arguments.get("max_time") is not None else 1000
        with _noted():
            super().__init__(max_rounds=max_epochs, local_epochs=1, num_clients=1, **arguments)

    def fit(self, *args: Any, **kwargs: Any) -> None:
        OneClientTrainer.fits += 1
        with _noted():
            super().fit(*args, **kwargs)


@contextmanager
def _noted() -> Iterator[None]:
    """Takes note of our errors, for a test may expect another one and hide it."""
    try:
        yield
    except ConfigurationError as error:
        OneClientTrainer.refusals.append(str(error))
        raise
    except ClientError:
        OneClientTrainer.client_errors += 1
        raise


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--trainer",
        choices=("plain", "one-client"),
        default="one-client",
        help="Run Lightning's tests with its own Trainer and keep which pass, or with a federation of one client.",
    )
    parser.addoption("--differences", type=Path, default=LIST, help="The list of tests that differ.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flaky: of pytest-rerunfailures, which may not be installed")
    run = PlainRun(config) if config.getoption("--trainer") == "plain" else OneClientRun(config)
    config.pluginmanager.register(run, "lightning_fed_run")


def versions() -> list[str]:
    """What the outcomes of a plain run hold for."""
    return [lightning.__version__, torch.__version__]


def name_of(nodeid: str) -> str:
    """A test's name within ``tests_pytorch``."""
    return nodeid.split("tests_pytorch/", 1)[-1]


class PlainRun:
    """Keeps which tests pass with Lightning's own Trainer."""

    def __init__(self, config: pytest.Config) -> None:
        assert config.cache is not None
        self._cache = config.cache
        self._failed: set[str] = set()
        self._passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(name_of(report.nodeid))
        elif report.when == "call" and report.passed:
            self._passed.add(name_of(report.nodeid))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._cache.set(PLAIN, {"versions": versions(), "passed": sorted(self._passed - self._failed)})

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"The plain Trainer passes {len(self._passed - self._failed)} tests.")


class OneClientRun:
    """Puts the federation in the Trainer's place and holds each test to the list."""

    def __init__(self, config: pytest.Config) -> None:
        assert config.cache is not None
        kept = config.cache.get(PLAIN, None)
        if kept is None or kept["versions"] != versions():
            raise pytest.UsageError(f"Run once with --trainer plain: nothing is known of {versions()}.")
        self._plain = set(kept["passed"])
        self._differences = Differences(config.getoption("--differences"))
        self._outcomes: dict[str, str] = {}
        self._fitted: set[str] = set()
        self._refused: dict[str, str] = {}
        self._patch = pytest.MonkeyPatch()
        # Where Lightning's tests import it from; Lightning itself does not.
        for module in (lightning, lightning.pytorch, lightning.pytorch.trainer):
            self._patch.setattr(module, "Trainer", OneClientTrainer)

    def pytest_unconfigure(self) -> None:
        self._patch.undo()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        rest = [item for item in items if name_of(item.nodeid) not in self._plain]
        items[:] = [item for item in items if name_of(item.nodeid) in self._plain]
        config.hook.pytest_deselected(items=rest)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        OneClientTrainer.refusals.clear()
        OneClientTrainer.fits = OneClientTrainer.client_errors = 0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        test = name_of(item.nodeid)
        if report.failed:
            self._judge_failure(test, report, call)
        elif report.when == "teardown" and test not in self._outcomes:
            self._judge_success(test, report)
        return report

    def _judge_failure(self, test: str, report: pytest.TestReport, call: pytest.CallInfo[None]) -> None:
        difference = self._differences.of(test)
        other = "" if difference is None else _another_reason(difference, call.excinfo)
        if difference is not None and not other:
            report.outcome, report.wasxfail = "skipped", f"{difference.kind}: {difference.reason}"
            self._outcomes[test] = difference.kind
            return
        self._outcomes[test] = FAILS
        if difference is not None:
            report.longrepr = f"{report.longreprtext}\n[it is listed as {difference.kind}, but {other}]"
        if OneClientTrainer.refusals:
            self._refused[test] = _first_word(OneClientTrainer.refusals[0])

    def _judge_success(self, test: str, report: pytest.TestReport) -> None:
        difference = self._differences.of(test)
        self._outcomes[test] = PASSES
        if OneClientTrainer.fits:
            self._fitted.add(test)
        if difference is not None and not difference.may_pass:
            report.outcome, self._outcomes[test] = "failed", FAILS
            report.longrepr = f"[it passes, and is listed as {difference.kind}: {difference.reason}]"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        counts = Counter(self._outcomes.values())
        trained = sum(self._outcomes[test] == PASSES for test in self._fitted)
        refused = [test for test, outcome in self._outcomes.items() if outcome == REFUSED]
        reasons = Counter(difference.reason for test in refused if (difference := self._differences.of(test)))
        lines = [
            "",
            f"Of {len(self._outcomes)} tests that Lightning {lightning.__version__} passes, with one client",
            f"  {counts[PASSES]:4} pass, {trained} of them with a fit",
            f"  {counts[FAILS]:4} fail",
            *(f"  {counts[kind]:4} differ: {kind}" for kind in self._differences.kinds),
            *(f"       {count:4} {reason}" for reason, count in reasons.most_common()),
            *_paragraph(
                "Refused, and not listed so:", [f'"{test}" = "{self._refused[test]}"' for test in self._refused]
            ),
            *_paragraph("Listed, and not among the plain Trainer's:", self._differences.unknown(self._plain)),
        ]
        for line in lines:
            terminalreporter.write_line(line)


def _paragraph(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)] if lines else []


def _another_reason(difference: Difference, excinfo: pytest.ExceptionInfo[BaseException] | None) -> str:
    """What a listed test fails of, where it is not what the list says."""
    refusals = "\n".join(OneClientTrainer.refusals)
    if difference.kind == REFUSED and not re.search(rf"\b{re.escape(difference.reason)}\b", refusals):
        return f"{difference.reason} was not refused: {refusals or 'nothing was'}"
    if difference.kind != REFUSED and refusals:
        return f"it uses what is refused: {refusals}"
    if difference.kind == CLIENT_ERROR and not OneClientTrainer.client_errors:
        return "no client failed"
    if difference.kind == FAULT or excinfo is None or isinstance(excinfo.value, FederationError):
        return ""
    crashed = PACKAGE in Path(excinfo.traceback[-1].path).parents
    return "this package raised an error that is not its own" if crashed else ""


def _first_word(refusal: str) -> str:
    """The name of the argument or the callback that the first fault begins with."""
    faults = refusal.removeprefix("FederatedTrainer cannot start:").lstrip(" \n-")
    return re.split(r"\W", faults, maxsplit=1)[0]
