"""Every engine trains every kind of module to the same weights, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_fed.callbacks import FedAdam, FedProx, FlowerStrategy
from lightning_fed.engines import Processes
from tests.helpers import sweep
from tests.integration import modules
from tests.integration.checkpointing.resume_script import ROUNDS, run, stopped_run
from tests.integration.modules import MODULES, assert_same, federated, trained

ENGINES = {
    "fork": lambda: Processes(num_workers=2, start_method="fork"),
    "forkserver": lambda: Processes(num_workers=2, start_method="forkserver"),
}


# What is sent to a worker once and what comes back each round differ; a clean process builds the module anew.
FEW = [
    *(("fork", name) for name in ("GAN", "step schedule", "dropout", "bf16", "built in setup", "compiled inside")),
    *(("forkserver", name) for name in ("tied", "metric objects")),
]


@pytest.mark.parametrize(("engine", "name"), sweep(itertools.product(ENGINES, MODULES), FEW))
def test_processes_train_a_module_as_one_process_does(name: str, engine: str) -> None:
    expected = trained(MODULES[name])
    assert_same(trained(MODULES[name], engine=ENGINES[engine]()), expected)


@pytest.mark.landing
def test_processes_train_a_resnet_as_one_process_does() -> None:
    def resnet(engine: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = modules.ResNet()
        data = TensorDataset(
            torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 2
        )
        federated(module, data=data, rounds=1, engine=engine)
        return {name: value.clone() for name, value in module.state_dict().items()}

    torch.testing.assert_close(resnet(ENGINES["fork"]()), resnet("in_process"), rtol=0, atol=0)


@pytest.mark.parametrize("method", sweep(["FedAdam", "FedProx", "Krum"], ["FedProx"]))  # acts on both sides
def test_processes_run_any_method(method: str) -> None:
    from flwr.serverapp.strategy import Krum

    build = {"FedAdam": FedAdam, "FedProx": lambda: FedProx(0.1), "Krum": lambda: FlowerStrategy(Krum())}[method]
    assert_same(trained(modules.Dropping, build(), engine=ENGINES["fork"]()), trained(modules.Dropping, build()))


def test_processes_take_as_many_workers_as_there_are_cores_and_no_more_than_clients(monkeypatch: Any) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(7)))
    assert Processes().num_workers == 7


@pytest.mark.parametrize("moment", sweep(["client trained", "client evaluated"], ["client trained"]))
def test_a_run_on_processes_goes_on_as_if_never_interrupted(tmp_path: Path, moment: str) -> None:
    """FedAdam, partial participation, clients that keep their optimizers: to the bits of one process."""
    engine = ENGINES["fork"]
    expected, expected_history, _ = run(tmp_path / "whole")
    stopped_run(tmp_path / "stopped", moment, engine=engine())
    module, history, trainer = run(tmp_path / "stopped", ckpt_path="last", engine=engine())
    torch.testing.assert_close(dict(module.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    assert history.rows == expected_history.rows
    assert trainer.current_epoch == ROUNDS


def test_the_same_run_on_another_number_of_workers_is_the_same() -> None:
    one, other = (trained(modules.Dropping, engine="processes", num_workers=n) for n in (1, 3))
    assert_same(one, other)
