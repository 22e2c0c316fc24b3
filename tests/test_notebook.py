"""The practical runs from top to bottom, shows each picture once, and is kept without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import real_data

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebooks" / "federated_learning.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_it_is_kept_without_outputs() -> None:
    assert [cell["outputs"] for cell in cells("code") if cell["outputs"]] == []
    assert {cell["execution_count"] for cell in cells("code")} == {None}


def test_its_contents_lead_to_its_headings() -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells("markdown"))
    headings = {re.sub(r"\s", "-", heading) for heading in re.findall(r"^## (.*)$", text, re.M)}
    links = re.findall(r"\]\(#(.*?)\)", text)
    assert len(links) > 8
    assert set(links) == headings


def executed() -> dict[str, list[Any]]:
    """The outputs of each cell, by its source."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return {cell["source"]: cell["outputs"] for cell in notebook.cells if cell["cell_type"] == "code"}


def pictures(outputs: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


# What draws a picture.
DRAWS = r"(?m)^(?:history\.plot\(|partition\.plot\(|figure, |draw\(|compare\()"


@pytest.mark.landing
@pytest.mark.timeout(900)
def test_it_runs_warns_of_nothing_learns_and_shows_each_picture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_FED_DATA", str(real_data("FashionMNIST").parent))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[2]))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a notebook has its own
    outputs = executed()
    said = {"stdout": "", "stderr": ""}
    for output in (output for cell in outputs.values() for output in cell if output["output_type"] == "stream"):
        said[output["name"]] += output["text"]
    assert said["stderr"] == ""
    # As the scripts have it after as many rounds.
    assert float(re.search(r"central, 4 epochs: test accuracy (\S+)", said["stdout"])[1]) == pytest.approx(
        0.83, abs=0.02
    )
    rounds = re.findall(r"^ +4 +\S+ +\S+ +\S+ +(0\.\d+)", said["stdout"], re.M)
    assert [float(accuracy) for accuracy in rounds] == pytest.approx([0.643, 0.641], abs=0.02)
    drawn = {source: pictures(of_cell) for source, of_cell in outputs.items()}
    assert drawn == {source: len(re.findall(DRAWS, source)) for source in outputs}
    assert sum(drawn.values()) == 12
