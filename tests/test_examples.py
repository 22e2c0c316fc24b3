"""Every example runs to its end in ``--fast`` mode, prints its result and draws what it promises."""

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from flwr.app import ArrayRecord
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import PartialParticipation, Partition
from lightning_fed.seeding import seed_all, seed_for
from lightning_fed.testing import ToyModule
from tests.callbacks.listening import Listens
from tests.helpers import QUIET, real_data

REPO = Path(__file__).parents[1]

# Script -> (the data it needs, what it prints, what it draws).
EXAMPLES = {
    "quickstart": (None, r"federated, 10 clients +test accuracy 0\.\d{3}\n", ["quickstart.png"]),
    "fashion_mnist": ("FashionMNIST", r"FedAvg, 10 of 10 clients +test accuracy 0\.\d{4}\n", ["fashion_mnist.png"]),
    "partial_participation": (
        "FashionMNIST",
        r"FedAvg, 5 of 10 clients +test accuracy 0\.\d{4}\n",
        ["partial_participation.png"],
    ),
    "label_shards": ("FashionMNIST", r"test accuracy 0\.\d{4}\n", ["label_shards.png", "label_shards_partition.png"]),
    "label_skew": (None, r"\n0\.1 .* points +0\.\d{3}\n", ["label_skew.png"]),
    "personalization": ("FashionMNIST", r"Ditto +0\.\d{4} +0\.\d{4} +\d\.\d{4}\n", ["personalization.png"]),
    "drift": ("FashionMNIST", r"FedDyn +0\.\d{4} +0\.\d{4}\n", ["drift.png"]),
    "stragglers": (
        "FashionMNIST",
        r"FedBuff +\d+ +\d+ +0\.\d{4} +not reached\n",
        ["stragglers.png", "stragglers_work.png"],
    ),
    "front_page": (None, r"federated, 10 clients +test accuracy 0\.\d{3}\n", ["front.png"]),
    "language_model": ("shakespeare", r"federated +\d\.\d{4}\n", ["language_model.png"]),
    "lora": ("shakespeare", r"FFA-LoRA +\d\.\d{4} +18,432\n", ["lora.png"]),
    "regression": (
        None,
        r"one function +federated +\d+\.\d\d .* \d+\.\d\d, \d+\.\d\d, \d+\.\d\d\n",
        ["regression.png"],
    ),
    "bring_your_own_strategy": (None, r"Krum, attacked +test accuracy 0\.\d{3}\n", ["bring_your_own_strategy.png"]),
}
NEEDS = {"lora": ("peft", "transformers")}  # what is only there with an extra


def test_every_example_is_tested():
    scripts = {path.stem for path in (REPO / "examples").glob("*.py") if "__main__" in path.read_text()}
    assert scripts == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path, monkeypatch, capsys):
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason='pip install "lightning_fed[lora]"')
    data, printed, pictures = EXAMPLES[name]
    script = REPO / "examples" / f"{name}.py"
    command = [str(script), "--fast", "--output-dir", str(tmp_path / "out")]
    if data:
        command += ["--data-dir", str(real_data(data).parent)]
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


WITHOUT_IMPORTS = """
import runpy, sys
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {"torch", "lightning", "matplotlib"} & sys.modules.keys()
"""


@pytest.mark.parametrize("script", [*EXAMPLES, "deployment/train", "deployment/make_keys"])
def test_help_does_not_wait_for_imports(script):
    command = [sys.executable, "-c", WITHOUT_IMPORTS, str(REPO / "examples" / f"{script}.py"), "--help"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "usage: " in ended.stdout


@pytest.mark.parametrize("script", EXAMPLES)
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_trained(script, tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "outputs")
    command = [sys.executable, "-c", WITHOUT_IMPORTS, str(REPO / "examples" / f"{script}.py"), "--output-dir", folder]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert f"NotADirectoryError: [Errno 20] Not a directory: '{folder}'" in ended.stderr
    assert "AssertionError" not in ended.stderr


def example(monkeypatch, name):
    """A script of the examples, as a module."""
    monkeypatch.syspath_prepend(REPO / "examples")
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def test_a_line_with_a_name_after_an_empty_one_begins_a_speech(monkeypatch):
    text = "Romeo:\nMy ears\nhave not:\n\nJuliet:\nHow cam'st thou\n\nRomeo:\nBy love.\n"
    said = example(monkeypatch, "shakespeare").words_of_speakers(text)
    assert said == {"Romeo": "My ears\nhave not:\nBy love.", "Juliet": "How cam'st thou"}


def test_passages_of_shakespeare_are_a_speaker_s_own_and_their_targets_one_character_later(monkeypatch):
    passages = example(monkeypatch, "shakespeare").Passages({"A": "abcdefgh", "B": "hgf", "C": "cdefg"}, "abcdefgh", 3)
    assert passages.speaker == ["A", "A", "C"]
    assert [(x.tolist(), y.tolist()) for x, y in passages] == [
        ([0, 1, 2], [1, 2, 3]),
        ([3, 4, 5], [4, 5, 6]),
        ([2, 3, 4], [3, 4, 5]),
    ]


def test_shakespeare_that_cannot_be_downloaded_says_where_it_belongs_and_leaves_no_part(monkeypatch, tmp_path):
    reader = example(monkeypatch, "shakespeare")

    def cut_off(url, path):
        Path(path).write_text("First Citizen:\nBefore we")
        raise reader.urllib.error.URLError("no route to host")

    monkeypatch.setattr(reader.urllib.request, "urlretrieve", cut_off)
    data = reader.ShakespeareData(tmp_path)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"input\.txt is not there, and .* cannot be read \(.*no route"):
            data.prepare_data()
    assert not data.path.exists()


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
    reader = example(monkeypatch, "shakespeare")
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


def test_the_gpt_of_one_client_that_has_all_speakers_is_the_central_one(monkeypatch):
    script = example(monkeypatch, "language_model")
    data = script.ShakespeareData(real_data("shakespeare").parent, speakers=slice(3))
    quiet = {**QUIET, "limit_val_batches": 0}  # iterating over a validation loader draws, too
    found = []
    for federated in (False, True):
        torch.manual_seed(0)
        found.append(model := script.CharGPT())
        if federated:
            FederatedTrainer(max_rounds=1, num_clients=1, local_epochs=2, seed=5, **quiet).fit(model, datamodule=data)
        else:
            with isolate_rng():
                seed_all(seed_for(5, "train", round=1, client=0))
                L.Trainer(max_epochs=2, **quiet).fit(model, datamodule=data)
    central, federated = (model.state_dict() for model in found)
    assert [name for name, tensor in central.items() if not torch.equal(tensor, federated[name])] == []
    torch.manual_seed(0)
    assert not torch.equal(central["head.weight"], script.CharGPT().head.weight)


@pytest.mark.parametrize(("way", "trained"), [("federated", ("lora_A", "lora_B")), ("FFA-LoRA", ("lora_B",))])
def test_with_lora_only_adapters_travel(way, trained, monkeypatch):
    for package in NEEDS["lora"]:
        pytest.importorskip(package, reason='pip install "lightning_fed[lora]"')
    script, listens = example(monkeypatch, "lora"), Listens()
    monkeypatch.setattr(script, "QUIET", {**QUIET, "engine": listens})
    module = script.with_adapters(way, script.GPT2LMHeadModel(script.GPT2Config(**script.GPT2)))
    data = script.ShakespeareData(real_data("shakespeare").parent, speakers=slice(48, 56))
    args = SimpleNamespace(rounds=3, every=3, passes=1)
    script.trainer_of(way, args, script.Curve(), script.History()).fit(module, datamodule=data)
    adapters = {name: tensor for name, tensor in module.named_parameters() if any(part in name for part in trained)}
    assert len(adapters) == 8 * len(trained)
    assert len(listens.heard) == 2 * 3  # to one client a round, and back
    for message, _ in listens.heard:
        records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
        sent = {name: tuple(array.shape) for record in records for name, array in record.items()}
        assert sent == {name: tuple(tensor.shape) for name, tensor in adapters.items()}
