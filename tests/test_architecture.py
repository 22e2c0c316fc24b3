"""Levels and doors: which module may import which, and who lets third parties in (docs/architecture.md)."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lightning_fed"

LEVELS = [
    {"errors", "seeding", "views", "_version"},
    {"weights", "metrics", "data"},
    {"messages"},
    {"strategies.mean", "engines.base", "roster", "client", "client.isolation", "client.fit_state"},
    {"strategies.server_optimizers", "client.local_trainer"},
    {"strategies", "client.local_fit"},
    {"callbacks.base", "client.app", "engines.*"},
    {"callbacks.*"},
    {"callbacks", "engines", "rounds", "server", "arguments"},
    {"federation"},
    {"trainer"},
    {"", "testing"},
]

FLOWER = ("flwr.app", "flwr.clientapp", "flwr.clientapp.typing", "flwr.serverapp", "flwr.serverapp.strategy")
FLOWER_DOORS = ("messages", "rounds", "roster", "federation", "trainer", "testing", "client.app")


def modules() -> dict[str, Path]:
    files = sorted(ROOT.rglob("*.py"))
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix("__init__").rstrip("."): file for file, name in names.items()}


MODULES = modules()


def level(name: str) -> int:
    for number, members in enumerate(LEVELS):
        if name in members:
            return number
    family = f"{name.split('.')[0]}.*"
    numbers = [number for number, members in enumerate(LEVELS) if family in members]
    assert numbers, f"lightning_fed/{name} is on no level; give it one, here and in docs/architecture.md"
    return numbers[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports, and whether inside a function; what only type checkers see is left out."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "relative imports hide the level"
                yield from ((f"{child.module}:{alias.name}", inside) for alias in child.names)
            else:
                yield from visit(child, inside or isinstance(child, (ast.FunctionDef, ast.Lambda)))

    yield from visit(ast.parse(path.read_text()), False)


def own(imported: str) -> str | None:
    """The module of ours behind an import, ``None`` for others'."""
    package, _, attribute = imported.partition(":")
    if package != "lightning_fed" and not package.startswith("lightning_fed."):
        return None
    name = package.removeprefix("lightning_fed").lstrip(".")
    deeper = f"{name}.{attribute}".lstrip(".")
    return deeper if deeper in MODULES else name


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_lower_levels(name: str) -> None:
    for imported, _ in imports(MODULES[name]):
        other = own(imported)
        if other is not None:
            assert level(other) < level(name), f"{name or '__init__'} imports {other}, which is not below it"


@pytest.mark.parametrize("name", MODULES)
def test_third_parties_come_in_by_their_doors(name: str) -> None:
    for imported, inside in imports(MODULES[name]):
        module = imported.partition(":")[0]
        package = module.split(".")[0]
        if package == "flwr":
            families = ("strategies.", "callbacks.", "engines.")
            assert name in FLOWER_DOORS or name.startswith(families), f"{name} imports {module}"
            assert module in FLOWER or name == "engines.in_process", f"{name} imports Flower's private {module}"
        if package == "ray":
            assert name == "engines.ray"
        if package in ("flwr_datasets", "datasets"):
            assert name == "callbacks.partition"
            assert inside, f"{module} is slow to import: import it where it is used"
        if package == "matplotlib":
            assert inside, f"{module} is slow to import: import it where it is used"


def test_the_levels_are_those_of_the_docs() -> None:
    table = (ROOT.parent / "docs" / "architecture.md").read_text()
    for number, members in enumerate(LEVELS):
        row = next(line for line in table.splitlines() if line.startswith(f"| {number} |"))
        for member in members - {"client"}:
            assert f"`{member or 'lightning_fed'}`" in row, f"level {number} of docs/architecture.md lacks {member}"


SCRIPT = """
import json, os, sys
for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
    os.environ.pop(name, None)
import lightning, flwr, flwr.app, flwr.serverapp.strategy, flwr.clientapp
before = {name.split(".")[0] for name in sys.modules}
import lightning_fed
added = {name.split(".")[0] for name in sys.modules} - before
print(json.dumps([sorted(added), os.environ["FLWR_TELEMETRY_ENABLED"], os.environ["FLWR_DISABLE_UPDATE_CHECK"]]))
"""


def test_importing_costs_no_more_than_lightning_and_flower_and_phones_nobody() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    added, *switches = json.loads(run.stdout.splitlines()[-1])
    slow = {"datasets", "flwr_datasets", "matplotlib", "pandas", "ray", "sklearn", "scipy"}
    assert not slow & set(added)
    assert switches == ["0", "1"]


def test_a_user_who_wants_telemetry_keeps_it() -> None:
    script = "import os, lightning_fed; print(os.environ['FLWR_TELEMETRY_ENABLED'])"
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    assert run.stdout.split()[-1] == "1"


@pytest.mark.parametrize("package", ["lightning_fed", "lightning_fed.callbacks", "lightning_fed.engines"])
def test_every_public_name_is_documented(package: str) -> None:
    module = importlib.import_module(package)
    for name in set(module.__all__) - {"__version__"}:
        assert getattr(module, name).__doc__, f"{package}.{name} has no docstring"
