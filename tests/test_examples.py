"""Every example runs to its end in ``--fast`` mode, prints its result and draws what it promises."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers import real_data

REPO = Path(__file__).parents[1]

# Script -> (whether it needs Fashion-MNIST, what it prints, what it draws).
EXAMPLES = {
    "quickstart": (False, r"federated, 10 clients +test accuracy 0\.\d{3}\n", ["quickstart.png"]),
    "fashion_mnist": (True, r"FedAvg, 10 of 10 clients +test accuracy 0\.\d{4}\n", ["fashion_mnist.png"]),
    "partial_participation": (
        True,
        r"FedAvg, 5 of 10 clients +test accuracy 0\.\d{4}\n",
        ["partial_participation.png"],
    ),
    "label_shards": (True, r"test accuracy 0\.\d{4}\n", ["label_shards.png", "label_shards_partition.png"]),
    "label_skew": (False, r"\n0\.1 .* points +0\.\d{3}\n", ["label_skew.png"]),
    "regression": (False, r"one function .* \d+\.\d\d -> \d+\.\d\d\n", ["regression.png"]),
    "bring_your_own_strategy": (False, r"Krum, attacked +test accuracy 0\.\d{3}\n", ["bring_your_own_strategy.png"]),
}


def test_every_example_is_tested():
    scripts = {path.stem for path in (REPO / "examples").glob("*.py") if "__main__" in path.read_text()}
    assert scripts == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path, monkeypatch, capsys):
    needs_data, printed, pictures = EXAMPLES[name]
    script = REPO / "examples" / f"{name}.py"
    command = [str(script), "--fast", "--output-dir", str(tmp_path / "out")]
    if needs_data:
        command += ["--data-dir", str(real_data("FashionMNIST").parent)]
    # In this process: a new one would spend ten times as long on its imports as on its work.
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "")  # examples set it; it is restored after the test
    monkeypatch.delenv("PL_GLOBAL_SEED")
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(printed, said), said[-2000:]
    for picture in pictures:
        path = tmp_path / "out" / picture
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.stat().st_size > 10_000, f"{picture} looks empty"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "it left more than its pictures behind"
