"""The documentation builds without a warning, has every public name, and no link within it leads nowhere."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from lightning.pytorch import Trainer

from lightning_fed import FederatedTrainer
from lightning_fed.server import arguments
from tests.code_blocks import ROOT

# What of other projects a page of ours links to, where a build has their lists: each list has this one name here.
ELSEWHERE = {
    "torch": ("torch.Tensor", "https://docs.pytorch.org/docs/stable/"),
    "lightning": ("lightning.pytorch.core.LightningModule", "https://lightning.ai/docs/pytorch/stable/"),
    "flwr": ("flwr.serverapp.strategy.Strategy", "https://flower.ai/docs/framework/"),
    "python": ("RuntimeError", "https://docs.python.org/3/"),
    "numpy": ("numpy.ndarray", "https://numpy.org/doc/stable/"),
}
PUBLIC = ["lightning_fed", *(f"lightning_fed.{room}" for room in ("callbacks", "engines", "strategies"))]


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links |= {given[name] for name in ("href", "src") if name in given}


def broken_links(site: Path) -> list[str]:
    """Each link to a file, or a place in it, that a built site does not have."""
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    found = []
    for path, page in sorted(pages.items()):
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            there = target in pages and unquote(parts.fragment) in pages[target].anchors
            if not (there or (target not in pages and target.is_file())):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def an_inventory(project: str, name: str) -> bytes:
    """A list of names as Sphinx writes it (``objects.inv``), with one class."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: 1\n# The rest is compressed using zlib.\n"
    return head.encode() + zlib.compress(f"{name} py:class 1 {project}.html#$ -\n".encode())


def build(to: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", f"{to}.read", "docs", str(to)]
    known = {name: value for name, value in os.environ.items() if name != "LIGHTNING_FED_INTERSPHINX"}
    done = subprocess.run(command, cwd=ROOT, env={**known, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("furo", reason='needs pip install -e ".[docs]"')
    build(folder := tmp_path_factory.mktemp("site").resolve() / "html")
    return folder


@pytest.mark.landing
def test_no_link_within_the_site_leads_nowhere(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 30
    assert broken_links(site) == []


@pytest.mark.landing
@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_has_an_entry(package: str, site: Path) -> None:
    html = "".join(path.read_text() for path in (site / "reference").rglob("*.html"))
    there = set(re.findall(r'<dt class="[^"]*"\s+id="([\w.]+)"', html))
    names = [name for name in importlib.import_module(package).__all__ if name[0] != "_"]
    assert [name for name in names if f"{package}.{name}" not in there] == []


@pytest.mark.landing
def test_names_of_others_are_links_where_their_lists_are_there(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason='needs pip install -e ".[docs]"')
    for project, (name, _) in ELSEWHERE.items():
        (tmp_path / f"{project}.inv").write_bytes(an_inventory(project, name))
    build(tmp_path / "html", LIGHTNING_FED_INTERSPHINX=str(tmp_path))
    links = set.union(*(Page(path.read_text()).links for path in (tmp_path / "html" / "reference").rglob("*.html")))
    for project in ("torch", "lightning", "flwr", "python"):
        name, where = ELSEWHERE[project]
        assert f"{where}{project}.html#{name}" in links


def test_a_crawler_finds_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a id="i" href="#i"></a><a href="b.html#x"></a><a href="c.html"></a>')
    (tmp_path / "b.html").write_text('<a href="a.html#there"></a><a href="https://example.org/no"></a>')
    assert broken_links(tmp_path.resolve()) == ["a.html: b.html#x", "a.html: c.html", "b.html: a.html#there"]


def test_messages_that_the_page_of_errors_quotes_are_those_of_the_code() -> None:
    table = (ROOT / "docs" / "reference" / "errors.md").read_text().split("\n## By its words\n")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| `(.*?)` \| `(\w+)`", table, re.M)
    files = (ROOT / "lightning_fed").rglob("*.py")
    code = re.sub(
        r"[\"']\s*\n\s*f?[\"']", "", "".join(path.read_text() for path in files)
    )  # of sentences over several lines
    assert len(quoted) > 15
    assert [words for words, _ in quoted if words not in code] == []
    assert {error for _, error in quoted} < set(importlib.import_module("lightning_fed").__all__)


def test_the_table_of_arguments_has_them_all() -> None:
    sections = (ROOT / "docs" / "reference" / "arguments.md").read_text().split("\n## ")
    listed = [re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", part, re.M))) for part in sections[1:]]
    own, server, clients, both, refused = (set(names) for names in listed)
    parameters = inspect.signature(FederatedTrainer).parameters
    assert own == {name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY} - {"callbacks"}
    assert clients == set(arguments.CLIENTS)
    assert both == set(arguments.BOTH)
    assert refused == set(arguments.REFUSED)
    since_2_6_6 = {"enable_autolog_hparams", "model_registry"}  # older releases of Lightning have fewer
    assert server - since_2_6_6 == set(inspect.signature(Trainer).parameters) - clients - both - refused - since_2_6_6
