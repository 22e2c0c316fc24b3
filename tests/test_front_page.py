"""What the front page says has its source, and its first lines run as they are copied."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMPARISON = (ROOT / "docs" / "comparison.md").read_text()
# By project what each of its sources in the comparison has: a version, or a commit.
PROJECTS = {
    "Flower": ("1.42.0", "fdef7afb"),
    "NVIDIA FLARE": ("2.9.0", "f3b7c1bf"),
    "pfl-research": ("0.6.0", "c9d1f32f"),
    "FL4Health": ("0.4.2",),
    "FedJAX": ("0.0.17",),
}


def rows(table: str) -> list[list[str]]:
    """The cells of a table's rows, its head first."""
    lines = [line for line in table.splitlines() if line.startswith("|") and not re.fullmatch(r"[|\-]+", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quickstart() -> str:
    return re.search(r"```python\n(.*?)```", README, re.S)[1]


def test_the_quickstart_is_twenty_lines_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = quickstart()
    assert len([line for line in code.splitlines() if line]) <= 20
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), names)
    assert float(names["trainer"].callback_metrics["val_acc"]) > 0.9


def test_the_first_screen_comes_before_everything_else() -> None:
    first = README.split("\n## ")[0]
    order = ["```diff", "![", "```bash\npip install lightning_fed\n```", "```python", "- **", "- **", "- **"]
    places, at = [], 0
    for what in order:
        at = first.index(what, at) + 1
        places.append(at)
    assert places == sorted(places)
    assert first.count("\n- ") == 3


def test_the_picture_is_there_and_small() -> None:
    [picture] = re.findall(r"!\[[^\]]*\]\((.*?)\)", README)
    content = (ROOT / picture).read_bytes()
    assert content[:4] == b"\x89PNG"
    assert len(content) < 120_000


def test_links_within_the_repository_lead_somewhere() -> None:
    pages = ["README.md", *(f"docs/{name}.md" for name in re.findall(r"\(docs/([\w/]+)\.md\)", README))]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), (page, target)


def test_figures_of_speed_are_those_of_the_results() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    [claim] = re.findall(r"- \*\*Faster than Flower.*?\n\n", README, re.S)
    page = (ROOT / "docs" / "performance.md").read_text().split("## Beside Flower on Ray\n")[1].split("\n## ")[0]
    cells = [cell for row in rows(page)[1:] for cell in row[3:]]
    assert len(cells) == 14
    assert [cell for cell in cells if f"| {cell} |" not in results] == []
    figures = re.findall(r"\d+\.\d+", claim)
    assert len(figures) == 5
    assert [figure for figure in figures if not any(cell.startswith(f"{figure} (") for cell in cells)] == []


def test_each_cell_of_the_comparison_has_its_source() -> None:
    [table] = re.findall(r"\n\n(\| \| lightning_fed .*?)\n\n", README, re.S)
    head, *body = rows(table)
    assert head[2:] == list(PROJECTS)
    sections = dict(part.split("\n", 1) for part in COMPARISON.split("\n## ")[1:])
    assert [row[0] for row in body] == list(sections)[1:]  # the first says where others are ahead
    for title, *cells in body:
        sources = {row[0]: row for row in rows(sections[title])[1:]}
        assert list(sources) == ["lightning_fed", *PROJECTS]
        assert all(cells)
        for project, marks in PROJECTS.items():
            _, what, source = sources[project]
            assert what
            assert any(mark in source for mark in marks), (title, project)
