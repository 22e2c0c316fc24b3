"""Every block of code of the documentation runs: a page's blocks in their order, with Lightning's defaults."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from lightning import LightningDataModule
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_fed.callbacks
from lightning_fed import FederatedTrainer
from lightning_fed.engines import InProcess
from lightning_fed.testing import ENGINE_CASES
from tests.code_blocks import PAGES, ROOT, Block, blocks

Names = dict[str, Any]

# What the guides' code runs after: a module and loaders, as a reader has them.
SETUP = "docs/howto/index.md"
# What takes long, with a shorter test of the same elsewhere: long runs, and an engine's processes that start.
MARKED: dict[str, Any] = {
    "docs/howto/ray.md": pytest.mark.ray,
    "docs/howto/gpu.md": pytest.mark.landing,
    "docs/howto/sweeps.md": [pytest.mark.slow, pytest.mark.ray],
    "docs/tutorials/central_to_federated.md": pytest.mark.landing,
}
# What is run by a test of its own, in which it takes server and sites.
COMMANDS_OF_DEPLOYMENT = "docs/deployment.md"
KNOWN = {"python", "pycon", "bash", "toml", "diff", "text", "", "{eval-rst}", "{include}", "{toctree}"}
OF_OTHERS = {"docs/howto/from_nvflare.md": "{code-block}"}  # code of a project that is not installed


def run(block: Block, names: Names) -> None:
    if block.language == "python":
        code = block.padded.replace("max_rounds=50", "max_rounds=3")  # the README's runs are long
        exec(compile(code, block.page, "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(block.code, names, block.page, block.page, block.line - 1)
    doctest.DebugRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False)
    names.update(test.globs)


def of_readme(names: Names) -> None:
    """The README speaks of a module and a datamodule that the reader has."""
    names |= {name: getattr(lightning_fed.callbacks, name) for name in lightning_fed.callbacks.__all__}
    names |= {"FederatedTrainer": FederatedTrainer, "ModelCheckpoint": ModelCheckpoint}
    names["MyModule"] = names["Classifier"]
    names["data"] = LightningDataModule.from_datasets(names["examples"](1000), names["val"].dataset, batch_size=8)
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False)
    trainer.fit(names["model"], names["train"])
    trainer.save_checkpoint("central.ckpt")


def of_contributing(names: Names) -> None:
    names |= {"pytest": pytest, "ENGINE_CASES": ENGINE_CASES, "MyEngine": InProcess}


def of_deployment(names: Names) -> None:
    """Its first lines are those of a server and of two sites, which would wait for a SuperLink."""
    names |= {name: getattr(lightning_fed.callbacks, name) for name in ("ClientData", "FedAdam")}
    names |= {"site_data": lambda client: names["train"], "own": LightningDataModule(), "engine": "in_process"}
    names |= {"FederatedTrainer": WithoutNetwork, "server": ServerApp(), "client": ClientApp()}


def of_sweeps(names: Names) -> None:
    pytest.importorskip("optuna_integration", reason='pip install "lightning_fed[sweeps]"')


class WithoutNetwork(FederatedTrainer):
    def join(self, address: str, model: Any, *data: Any, client: int, **how: Any) -> None:
        assert address == "host:8000"
        assert client == 2


MORE: dict[str, Callable[[Names], None]] = {
    "README.md": of_readme,
    "CONTRIBUTING.md": of_contributing,
    "docs/deployment.md": of_deployment,
    "docs/resume.md": of_readme,
    "docs/howto/sweeps.md": of_sweeps,
}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Names:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_FEDERATEDTRAINER_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONBREAKPOINT", "0")
    torch.manual_seed(0)
    space: Names = {"__name__": "page"}
    [setup] = blocks(SETUP, "python")
    run(setup, space)
    return space


WITH_CODE = [page for page in PAGES if page != SETUP and any(blocks(page, "python", "pycon"))]


@pytest.mark.parametrize("page", [pytest.param(page, marks=MARKED.get(page, ())) for page in WITH_CODE])
def test_the_code_of_a_page_runs(page: str, names: Names, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("ray"):
        request.getfixturevalue("one_ray")
    MORE.get(page, lambda names: None)(names)
    for block in blocks(page, "python", "pycon"):
        run(block, names)


def test_clients_are_the_hospitals(names: Names) -> None:
    run(next(blocks("docs/clients.md", "python")), names)
    assert names["partition"].client_names == ["Ghent", "Lyon", "Umea"]
    assert Path("hospitals.png").stat().st_size > 2000


def test_flowers_apps_and_the_trainer_beside_them_give_the_same_weights(names: Names) -> None:
    class Same(names["Classifier"]):
        def __init__(self) -> None:
            torch.manual_seed(3)
            super().__init__()

    names["Classifier"] = Same
    shorter = {"0.5, 0.5": "1.0, 1.0", "shuffle=True": "shuffle=False", "num_clients=10": "num_clients=4"}
    for block in blocks("docs/howto/from_flower.md", "python"):
        code = block.code
        for written, instead in shorter.items():
            code = code.replace(written, instead)
        code = code.replace("trainer.fit(Classifier())", "trainer.fit(ours := Classifier())")
        code = code.replace("    strategy.start(", "    return strategy.start(")
        run(Block(block.page, block.line, block.language, code), names)
    result = InProcess().run(lambda grid: names["main"](grid, None), names["client"], lambda: 4)
    theirs = result.arrays.to_torch_state_dict()
    for name, tensor in names["ours"].state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(theirs["head.weight"], Same().head.weight, atol=1e-3)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_looked_at(page: str) -> None:
    for block in blocks(page):
        assert block.language in {*KNOWN, OF_OTHERS.get(page)}, f"{page}, line {block.line}"


@pytest.mark.parametrize("page", [p for p in PAGES if p != COMMANDS_OF_DEPLOYMENT and any(blocks(p, "bash"))])
def test_commands_name_what_is_there(page: str) -> None:
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    for block in blocks(page, "bash"):
        for extra in ",".join(re.findall(r'"(?:\.|lightning_fed)\[(.*?)\]"', block.code) or ["test"]).split(","):
            assert re.search(rf"^{extra} = ", extras, re.M), block
        for script in re.findall(r"python ([\w/]+\.py)", block.code):
            assert (ROOT / script).is_file(), block
        for module in re.findall(r"python -m (tests[\w.]+)", block.code):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), block
