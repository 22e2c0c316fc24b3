"""Any module, with any data, of a list of bad habits: the same bits wherever and in whatever order clients train."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FederatedCallback, History, PartialParticipation, Partition
from lightning_fed.engines import Engine, InProcess, Processes, Ray
from lightning_fed.testing import toy_data
from lightning_fed.values.weights import Weights, read
from tests.habits import DATA_HABITS, LOADERS, MODULE_HABITS, Data, Habitual, go_together
from tests.helpers import QUIET, LastFirst

ROUNDS = 3


class Shared(LightningDataModule):
    def __init__(self, habits: tuple[str, ...]) -> None:
        super().__init__()
        self.data = Data(toy_data(40), habits)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, 8, shuffle=True)


@dataclass(frozen=True)
class Case:
    """A module and its data."""

    module_habits: tuple[str, ...]
    data_habits: tuple[str, ...]
    data: str
    client_state: str

    def build(self) -> tuple[Habitual, Any, dict[str, Any]]:
        torch.manual_seed(0)
        module = Habitual(self.module_habits)
        if self.data == "a loader":
            data = DataLoader(Data(toy_data(40), self.data_habits), 8, shuffle=True)
            return module, Partition(3, val_fraction=0.25), {"train_dataloaders": data}
        if self.data == "a datamodule":
            return module, Partition(3, val_fraction=0.25), {"datamodule": Shared(self.data_habits)}
        how = LOADERS[self.data.partition(": ")[2]]
        own = [Data(toy_data(size, seed=size), self.data_habits) for size in (24, 16, 9)]
        if self.data.startswith("made"):
            return module, ClientData(lambda client: how(own[client]), num_clients=3), {}
        return module, ClientData([how(data) for data in own]), {}


CASES = st.builds(
    Case,
    st.lists(st.sampled_from(sorted(MODULE_HABITS)), max_size=4, unique=True).filter(go_together).map(tuple),
    st.lists(st.sampled_from(sorted(DATA_HABITS)), max_size=2, unique=True).map(tuple),
    st.sampled_from(["a loader", "a datamodule", *(f"{when}: {how}" for when in ("kept", "made") for how in LOADERS)]),
    st.sampled_from(["global", "reset", "carry"]),
)


class Stop(FederatedCallback):
    """Breaks off in the middle of a round, as SIGKILL would."""

    def on_client_end(self, trainer: Any, round: int, stage: Any, report: Any) -> None:
        if round == 2 and stage == "train":
            raise KeyboardInterrupt


def run(case: Case, engine: Engine, folder: Path | None = None, stops: bool = False, **options: Any) -> Any:
    module, owner, data = case.build()
    history, callbacks = History(per_client=True), [Stop()] if stops else []
    if folder is not None:
        options |= {"enable_checkpointing": True}
        callbacks.append(ModelCheckpoint(folder, save_last=True))
    trainer = FederatedTrainer(
        max_rounds=ROUNDS,
        seed=5,
        engine=engine,
        client_state=case.client_state,
        callbacks=[owner, PartialParticipation(fraction_train=0.7), history, *callbacks],
        **{**QUIET, **options},
    )
    if stops:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(module, **data)
        return None
    last = None if folder is None else str(folder / "last.ckpt")
    trainer.fit(module, **data, ckpt_path=last)
    return read(module), history.rows, history.clients


def resumed(case: Case) -> Any:
    folder = Path(tempfile.mkdtemp())
    try:
        run(case, InProcess(), folder, stops=True)
        return run(case, InProcess(), folder)
    finally:
        shutil.rmtree(folder)


def close(one: Weights, other: Weights) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=2e-3, atol=2e-4, equal_nan=True)


def holds(case: Case) -> None:
    expected = run(case, InProcess())
    places: dict[str, Callable[[], Any]] = {
        "again": lambda: run(case, InProcess()),
        "the last first": lambda: run(case, LastFirst()),
        "in one worker": lambda: run(case, Processes(1, start_method="fork")),
        "in two workers": lambda: run(case, Processes(2, start_method="fork")),
        "in three workers": lambda: run(case, Processes(3)),  # clean processes: the tests' own has threads
        "killed and resumed": lambda: resumed(case),
    }
    for place, there in places.items():
        weights, rows, clients = there()
        torch.testing.assert_close(weights, expected[0], rtol=0, atol=0, msg=lambda text, at=place: f"{at}: {text}")
        assert (rows, clients) == expected[1:], place
    close(expected[0], run(case, InProcess(), vectorize_clients=3)[0])


def _examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 100,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


@_examples(4)
@given(CASES)
def test_a_client_s_work_depends_on_nothing_but_its_own(case: Case) -> None:
    holds(case)


@pytest.mark.landing
@_examples(40)
@given(CASES)
def test_a_client_s_work_depends_on_nothing_but_its_own_forty_times(case: Case) -> None:
    holds(case)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@_examples(500)
@given(CASES)
def test_a_client_s_work_depends_on_nothing_but_its_own_five_hundred_times(case: Case) -> None:
    holds(case)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
@_examples(25)
@given(CASES)
def test_nor_does_it_in_actors_of_ray(one_ray: None, case: Case) -> None:
    """Each run starts actors, which import for seconds: fewer examples."""
    expected, there = run(case, InProcess()), run(case, Ray(2))
    torch.testing.assert_close(there[0], expected[0], rtol=0, atol=0)
    assert there[1:] == expected[1:]
