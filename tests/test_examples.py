"""Every example runs to its end in ``--fast`` mode, prints its result and draws what it promises."""

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import PartialParticipation, Partition
from lightning_fed.testing import ToyModule
from tests.helpers import QUIET, real_data

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
    "personalization": (True, r"Ditto +0\.\d{4} +0\.\d{4} +\d\.\d{4}\n", ["personalization.png"]),
    "drift": (True, r"FedDyn +0\.\d{4} +0\.\d{4}\n", ["drift.png"]),
    "front_page": (False, r"federated, 10 clients +test accuracy 0\.\d{3}\n", ["front.png"]),
    "regression": (
        False,
        r"one function +federated +\d+\.\d\d .* \d+\.\d\d, \d+\.\d\d, \d+\.\d\d\n",
        ["regression.png"],
    ),
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


HELPED = """
import runpy, sys
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {"torch", "lightning", "matplotlib"} & sys.modules.keys()
"""


@pytest.mark.parametrize("script", [*EXAMPLES, "deployment/train", "deployment/make_keys"])
def test_help_does_not_wait_for_imports(script):
    command = [sys.executable, "-c", HELPED, str(REPO / "examples" / f"{script}.py")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "usage: " in ended.stdout


def shakespeare(monkeypatch):
    """The reader, which is no package's."""
    monkeypatch.syspath_prepend(REPO / "examples")
    monkeypatch.delitem(sys.modules, "shakespeare", raising=False)
    return importlib.import_module("shakespeare")


def test_a_line_with_a_name_after_an_empty_one_begins_a_speech(monkeypatch):
    text = "Romeo:\nMy ears\nhave not:\n\nJuliet:\nHow cam'st thou\n\nRomeo:\nBy love.\n"
    said = shakespeare(monkeypatch).words_of_speakers(text)
    assert said == {"Romeo": "My ears\nhave not:\nBy love.", "Juliet": "How cam'st thou"}


def test_passages_of_shakespeare_are_a_speaker_s_own_and_their_targets_one_character_later(monkeypatch):
    passages = shakespeare(monkeypatch).Passages({"A": "abcdefgh", "B": "hgf", "C": "cdefg"}, "abcdefgh", 3)
    assert passages.speaker == ["A", "A", "C"]
    assert [(x.tolist(), y.tolist()) for x, y in passages] == [
        ([0, 1, 2], [1, 2, 3]),
        ([3, 4, 5], [4, 5, 6]),
        ([2, 3, 4], [3, 4, 5]),
    ]


class Letters(ToyModule):
    """Tells the next character from the present one."""

    def __init__(self):
        super().__init__()
        self.net = nn.Embedding(65, 65)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", Letters.training_step(self, batch, batch_idx))


def test_speakers_of_shakespeare_are_clients(monkeypatch):
    reader = shakespeare(monkeypatch)
    folder = real_data("shakespeare").parent
    said = reader.words_of_speakers((folder / "shakespeare" / "input.txt").read_text())
    assert [len(said), *(sum(len(own) >= least for own in said.values()) for least in (1000, 5000))] == [309, 141, 64]
    partition = Partition(by="speaker")
    trainer = FederatedTrainer(
        max_rounds=1, callbacks=[partition, PartialParticipation(0.05)], limit_train_batches=2, **QUIET
    )
    torch.manual_seed(0)
    trainer.fit(Letters(), datamodule=reader.ShakespeareData(folder, batch_size=8))
    assert partition.num_clients == 141
    assert partition.client_names == sorted(name for name, own in said.items() if len(own) >= 1000)
    assert trainer.callback_metrics["train_loss"] > 3
