"""The house stands: imports point downward, third parties come in by their doors, importing costs little."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lightning_fed"

# By package, or by file for those at the top ("" is the package itself). A module imports from its own layer and from
# those before it, and nowhere do imports go in a circle, neither of modules nor of packages.
LAYERS = {
    "foundation": ["_compat", "_version", "caching", "checks", "errors", "seeding", "tracebacks", "views"],
    "values": ["values", "state"],
    "wire": ["wire"],
    "parts": ["strategies", "client", "engines", "site"],
    "callbacks": ["callbacks"],
    "server": ["server"],
    "public": ["", "trainer", "testing"],
}
# Within `client`, likewise: one client's fit knows nothing of stacked ones, and neither knows Flower.
WITHIN_CLIENT = ["client.local", "client.vectorized", "client"]

# Third party -> the modules that may import it.
DOORS = {
    "flwr": [
        "_compat.flower*",
        "wire.*",
        "strategies.*",
        "client.app",
        "engines.*",
        "site.*",
        "callbacks.*",
        "server.*",
        "trainer",
        "testing",
    ],
    "ray": ["engines.ray"],
    "flwr_datasets": ["callbacks.partition", "callbacks.dealt"],
    "datasets": ["callbacks.columns", "callbacks.dealt", "callbacks.natural"],
    "matplotlib": ["callbacks.*"],
}
# What flwr calls public; all else is private.
PUBLIC_FLWR = {
    *("flwr.app", "flwr.clientapp", "flwr.clientapp.typing", "flwr.clientapp.mod"),
    *("flwr.serverapp", "flwr.serverapp.strategy", "flwr.proto.node_pb2"),
}
KNOWS_PRIVATE_FLWR = ["_compat.flower", "_compat.flower_link", "_compat.flower_node", "_compat.flower_server"]
# Heavy, or not installed everywhere: imported when used.
ONLY_INSIDE_FUNCTIONS = ["flwr_datasets", "datasets", "matplotlib", "ray", "sklearn", "pandas", "torchvision"]


@dataclass
class Import:
    """One import: what of, and whether it runs only when a function does."""

    module: str
    in_function: bool


def imports(source: str) -> Iterator[Import]:
    """All imports of a source that ever run: also those inside functions, not those for type checkers."""
    yield from _imports(ast.parse(source), False)


def _imports(node: ast.AST, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _imports(ast.Module([other], []), in_function)
        elif isinstance(child, ast.Import):
            yield from (Import(alias.name, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports here are absolute"
            assert child.module is not None
            # `from a import b` may import the module a.b.
            yield from (Import(f"{child.module}.{alias.name}", in_function) for alias in child.names)
        else:
            inner = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, inner)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
IMPORTS = {name: list(imports(path.read_text())) for name, path in MODULES.items()}
each = pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "lightning_fed")


def own_module(imported: str) -> str | None:
    """Which of our modules an import is of, or ``None``."""
    if imported.split(".")[0] != "lightning_fed":
        return None
    name = imported.removeprefix("lightning_fed").removeprefix(".")
    return name if name in MODULES else name.rpartition(".")[0]


def layer_of(name: str) -> int:
    room = name.split(".")[0]
    layers = [layer for layer, rooms in enumerate(LAYERS.values()) if room in rooms]
    assert layers, f"{room} has no layer: give it one in LAYERS"
    return layers[0]


def package_of(name: str) -> str:
    """The package that a module is in, or is; for a file at the top the file itself."""
    is_package = MODULES[name].name == "__init__.py"
    return name if is_package or "." not in name else name.rpartition(".")[0]


def own_imports(name: str) -> set[str]:
    """Which of our modules a module imports."""
    return {own for one in IMPORTS[name] if (own := own_module(one.module)) is not None} - {name}


def is_one_of(name: str, patterns: list[str]) -> bool:
    """Whether a pattern names a module; ``callbacks.*`` names the package ``callbacks``, too."""
    return any(fnmatch(name, pattern) or f"{name}.*" == pattern for pattern in patterns)


# ------------------------------------------------------------------------------------------------- layers


@each
def test_module_imports_from_no_layer_above_its_own(name):
    for imported in own_imports(name):
        assert layer_of(imported) <= layer_of(name), f"{name} imports {imported}"


@each
def test_within_client_one_fit_comes_before_many(name):
    if name.split(".")[0] != "client":
        return
    for imported in own_imports(name):
        if imported.split(".")[0] == "client":
            order = WITHIN_CLIENT.index(package_of(imported)), WITHIN_CLIENT.index(package_of(name))
            assert order[0] <= order[1], f"{name} imports {imported}"


def test_modules_import_each_other_in_no_circle():
    list(TopologicalSorter({name: own_imports(name) for name in MODULES}).static_order())


def test_no_two_classes_and_no_two_public_functions_have_one_name():
    kinds = (ast.ClassDef, ast.FunctionDef)
    named = [
        (n.name, name)
        for name, path in MODULES.items()
        for n in ast.parse(path.read_text()).body
        if isinstance(n, kinds)
    ]
    homes: dict[str, list[str]] = {}
    for one, home in named:
        homes.setdefault(one, []).append(home)
    assert {one: where for one, where in homes.items() if len(where) > 1 and not one.startswith("_")} == {}


def test_packages_import_each_other_in_no_circle():
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        package = package_of(name)
        graph.setdefault(package, set()).update({package_of(one) for one in own_imports(name)} - {package})
    list(TopologicalSorter(graph).static_order())


# ------------------------------------------------------------------------------------------------- doors


@each
def test_third_parties_come_in_by_their_doors(name):
    for one in IMPORTS[name]:
        package = one.module.split(".")[0]
        if package in DOORS:
            assert is_one_of(name, DOORS[package]), f"{name} imports {one.module}"


@each
def test_flowers_private_modules_are_known_in_one_place(name):
    for one in IMPORTS[name]:
        if one.module.split(".")[0] == "flwr" and name not in KNOWS_PRIVATE_FLWR:
            public = one.module in PUBLIC_FLWR or one.module.rpartition(".")[0] in PUBLIC_FLWR
            assert public, f"{name} imports {one.module}"


@each
def test_heavy_and_optional_packages_are_imported_when_used(name):
    for one in IMPORTS[name]:
        if one.module.split(".")[0] in ONLY_INSIDE_FUNCTIONS:
            assert one.in_function, f"{name} imports {one.module} when it is imported"


def test_local_training_knows_lightning_and_not_flower_and_the_client_app_the_other_way_round():
    trainer = {"lightning.pytorch.Trainer", "lightning.Trainer"}
    assert not trainer & {one.module for one in IMPORTS["client.app"]}
    for name in ("client.local.run", "client.local.trainer"):
        assert "lightning.pytorch.Trainer" in {one.module for one in IMPORTS[name]}
        assert not any(one.module.split(".")[0] == "flwr" for one in IMPORTS[name])


def test_reader_of_imports_sees_those_that_run_and_no_others():
    source = """
import a
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import never
else:
    import otherwise
class C:
    import in_class
    def f(self):
        if True:
            from b import c
try:
    import tried
except ImportError:
    import instead
"""
    found = {one.module: one.in_function for one in imports(source)}
    assert found == {
        "a": False,
        "typing.TYPE_CHECKING": False,
        "otherwise": False,
        "in_class": False,
        "b.c": True,
        "tried": False,
        "instead": False,
    }


# ------------------------------------------------------------------------------------------------- importing

SCRIPT = """
import json, os, sys

HEAVY = {"flwr_datasets", "datasets", "fastapi", "matplotlib", "sklearn", "ray", "pandas", "pyarrow", "tensorboard"}
HEAVY |= {"torchvision"}
def heavy(): return {name.split(".")[0] for name in sys.modules} & HEAVY

class Watch:
    told = None
    def find_spec(self, name, path=None, target=None):
        if name == "flwr" and self.told is None:
            Watch.told = {k: os.environ.get(k) for k in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK")}

import lightning
before = heavy()
sys.meta_path.insert(0, Watch())
import lightning_fed
import lightning_fed.callbacks
added = sorted(heavy() - before)

# As a user has it who wants telemetry: only our own package is imported anew.
del sys.modules["lightning_fed"]
os.environ["FLWR_TELEMETRY_ENABLED"] = "1"
import lightning_fed
print(json.dumps({"added": added, "told": Watch.told, "kept": os.environ["FLWR_TELEMETRY_ENABLED"]}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, object]:
    """What a fresh process sees when it imports the package."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT.parent,
        env=environment,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_costs_no_more_than_lightning_and_flower(imported):
    assert imported["added"] == []


def test_telemetry_is_off_before_flower_is_imported(imported):
    assert imported["told"] == {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def test_telemetry_stays_on_where_the_user_switched_it_on(imported):
    assert imported["kept"] == "1"


# ------------------------------------------------------------------------------------------------- documentation


@pytest.mark.parametrize("package", ["lightning_fed", "lightning_fed.callbacks", "lightning_fed.strategies"])
def test_every_public_name_is_documented(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name[0].isupper(), name))
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            assert own, f"{package}.{name}"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "_version"])
def test_every_module_says_what_it_is_for(name):
    assert ast.get_docstring(ast.parse(MODULES[name].read_text()))


def test_the_tree_in_docs_lists_every_file():
    listed, folders = set(), [""]
    tree = (ROOT.parent / "docs" / "package.md").read_text().split("\nlightning_fed/\n")[1].split("```")[0]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in line.split("  " * depth, 1)[1].split("  ")[0].split(", "):
            if name.endswith("/"):
                folders[depth:] = [f"{folders[depth - 1]}{name}"]
            else:
                listed.add(f"{folders[depth - 1]}{name}")
    unlisted = ("__init__.py", "_version.py")
    files = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if path.name not in unlisted}
    assert listed - {"__init__.py"} == files
