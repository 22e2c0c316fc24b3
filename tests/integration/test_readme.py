"""Code of README and docs runs as it stands, on every engine, with all that Lightning does unless told otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FedAvg, FederatedCallback, LocalMethod, PartialParticipation, Scaffold
from lightning_fed.engines import Engine, InProcess, Processes, Ray
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.weights import Weights, read

ROOT = Path(__file__).parents[2]


class Model(ToyModule):
    """What a reader has: a module and a datamodule that train centrally."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("test_acc", (logits.argmax(-1) == batch[1]).float().mean())


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(toy_data(1000), 32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(toy_data(16, seed=9), 8)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()


def block(heading: str, kind: str = "python", page: str = "README.md") -> str:
    """The first block of code below a heading of a page, or below its title."""
    part = (ROOT / page).read_text().split(f"# {heading}\n", 1)[1]
    found = re.search(rf"```{kind}\n(.*?)```", part, re.DOTALL)
    assert found is not None, heading
    return found[1]


def shorter(code: str, rounds: int = 2) -> str:
    """The same on the engine at hand, in less time."""
    code, count = re.subn(r"max_rounds=\d+,", f"max_rounds={rounds}, engine=engine, accelerator='cpu',", code)
    assert count == 1
    return code


def run(code: str, engine: Engine | None, **names: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    space = {"model": Model(), "data": Data(), "engine": engine, **names}
    exec(compile(code, "README.md", "exec"), space)
    return space


ENGINES: dict[str, Callable[[], Engine]] = {
    "in process": InProcess,
    "processes": lambda: Processes(2, start_method="fork"),
    "clean processes": lambda: Processes(2, start_method="forkserver"),
    "ray": lambda: Ray(2),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Weights]:
    known: dict[str, Weights] = {}

    def of(heading: str) -> Weights:
        if heading not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("expected"))
                known[heading] = read(run(shorter(block(heading)), InProcess())["model"])
        return known[heading]

    return of


@pytest.mark.parametrize("engine", [pytest.param("ray", marks=pytest.mark.ray) if e == "ray" else e for e in ENGINES])
def test_the_run_with_more_in_it(
    engine: str,
    expected: Callable[[str], Weights],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if engine == "ray":
        request.getfixturevalue("one_ray")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    heading = "A run with more in it"
    found = run(shorter(block(heading)), ENGINES[engine]())
    assert [row["round"] for row in found["history"].rows] == [1, 2]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert list(tmp_path.rglob("*.ckpt"))
    assert list(tmp_path.rglob("events*")) or list(tmp_path.rglob("metrics.csv"))
    torch.testing.assert_close(read(found["model"]), expected(heading), rtol=0, atol=0)


def test_the_first_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = block("lightning_fed", "diff").splitlines()
    central, federated = ("\n".join(line[1:] for line in lines if line[:1] in kept) for kept in ("- ", "+ "))
    tools = {"ModelCheckpoint": ModelCheckpoint}
    run(central, None, **tools)
    trainer = run(shorter(federated), ENGINES["processes"](), **tools)["trainer"]
    assert trainer.current_epoch == 2
    assert "test_acc" in trainer.callback_metrics


def test_the_run_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("whole", "in two"):
        (tmp_path / folder).mkdir()
    code = block("Resume", page="docs/resume.md")
    monkeypatch.chdir(tmp_path / "whole")
    whole = run(shorter(code, 3), InProcess())["model"]
    monkeypatch.chdir(tmp_path / "in two")
    run(shorter(code, 2), ENGINES["processes"]())
    resumed = run(shorter(code, 3), InProcess())["model"]
    torch.testing.assert_close(read(resumed), read(whole), rtol=0, atol=0)


def test_the_method_of_one_s_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    method = run(block("A method of your own", page="docs/own_methods.md"), None)["NoisyTraining"]
    FederatedTrainer(
        max_rounds=1, num_clients=2, callbacks=[method()], accelerator="cpu", default_root_dir=tmp_path
    ).fit(Model(), Data())
    assert capsys.readouterr().out.count(" sends ") == 2


@pytest.mark.parametrize("engine", ["in process", "processes"])
def test_the_method_with_tensors_and_memory_is_scaffold(engine: str, tmp_path: Path) -> None:
    names = {"torch": torch, "FederatedCallback": FederatedCallback, "LocalMethod": LocalMethod, "FedAvg": FedAvg}
    method = run(block("A method with tensors and memory", page="docs/own_methods.md"), None, **names)["MyScaffold"]

    def fit(scaffold: FederatedCallback, **how: Any) -> Weights:
        torch.manual_seed(0)
        model, callbacks = Model(), [PartialParticipation(0.5), scaffold]
        trainer = FederatedTrainer(
            max_rounds=3, num_clients=4, callbacks=callbacks, accelerator="cpu", default_root_dir=tmp_path, **how
        )
        trainer.fit(model, Data())
        return read(model)

    expected = fit(Scaffold())
    for how in ({"engine": ENGINES[engine]()}, {"engine": ENGINES[engine](), "vectorize_clients": "require"}):
        for name, tensor in fit(method(), **how).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
