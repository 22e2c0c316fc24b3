"""What a release is made of: an sdist with everything, a wheel of the package alone that runs the README's lines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import lightning_fed

ROOT = Path(__file__).parents[1]


def test_all_that_says_the_version_says_the_same() -> None:
    version = lightning_fed.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


@pytest.mark.parametrize("path", sorted([*ROOT.glob(".github/**/*.yml"), *ROOT.glob(".pre-commit-config.yaml")]))
def test_workflows_and_templates_are_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel that is built from it."""
    folder, copy = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("copy") / "lightning_fed"
    # Of a copy: a build leaves its metadata in the tree, and takes from an earlier one what that listed.
    left = shutil.ignore_patterns(".git", "*.egg-info", "build", "dist", "data", "outputs", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=left)
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.mark.landing
def test_the_sdist_has_everything(built: Path) -> None:
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder in ("lightning_fed", "tests", "examples", "docs", "benchmarks"):
        sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.py")}
        sources |= {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.md")}
        sources |= {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.ipynb")}
        assert sources - names == set()
    single = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "SECURITY.md", "LICENSE", ".ci/run")
    assert set(single) <= names
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []


@pytest.mark.landing
def test_the_wheel_has_the_package_alone(built: Path) -> None:
    [path] = built.glob("*.whl")
    names = set(zipfile.ZipFile(path).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lightning_fed").rglob("*.py")}
    assert code == package | {"lightning_fed/py.typed"}
    [metadata] = [name for name in names if name.endswith("METADATA")]
    said = zipfile.ZipFile(path).read(metadata).decode()
    assert f"\nVersion: {lightning_fed.__version__}\n" in said
    assert "\nLicense-Expression: Apache-2.0\n" in said


@pytest.mark.landing
def test_the_readme_s_lines_run_on_the_wheel(built: Path, tmp_path: Path) -> None:
    """In an environment of its own, which has what the wheel depends on from the present one, and not this checkout."""
    [wheel] = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "clean")], check=True)
    python = str(tmp_path / "clean" / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PL_"))}
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, cwd=tmp_path, env=environment, check=True)
    [site] = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    (tmp_path / "quickstart.py").write_text(f"{code}print('from', __import__('lightning_fed').__file__)\n")
    command = [python, "quickstart.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(re.search(r"tensor\((\d\.\d+)", done.stdout)[1]) > 0.9
    assert f"from {site}/lightning_fed/" in done.stdout
