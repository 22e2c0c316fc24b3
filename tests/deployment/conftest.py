"""Fixtures of real processes, which end with the tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.forks import Forks
from tests.deployment.processes import SITES, Federation, Scripts, make_keys


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Scripts make their imports, for seconds each: what needs them runs once a landing."""
    for item in items:
        if item.path.parent == Path(__file__).parent and "scripts" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.landing)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Iterator[Scripts]:
    running = Forks(tmp_path_factory.mktemp("deployment"))
    yield running
    running.end()


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder / "good", ["localhost", "127.0.0.1"], [*SITES, "stranger", "insider"])
    make_keys(folder / "other", ["localhost"], ["nobody"])
    return folder


@pytest.fixture(scope="module")
def secure(scripts, keys) -> Federation:
    return Federation(scripts, keys)
