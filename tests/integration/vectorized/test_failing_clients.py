"""A vectorized client that fails is named, and spoils nobody else."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    FaultTolerance,
    FederatedCallback,
    History,
)
from lightning_fed.errors import ClientError
from tests.helpers import QUIET
from tests.integration.vectorized.runs import CASES, Counter, Lit, assert_close, data, mlp, run


class Failing(TensorDataset):
    """Data that cannot be read while it is broken."""

    broken = False

    def __getitem__(self, index: Any) -> Any:
        if self.broken:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


class Breaks(FederatedCallback):
    """Breaks a data set in round 2."""

    def __init__(self, data: Failing) -> None:
        self.data = data

    def on_round_start(self, trainer: Any, round: int, stage: Any, cohort: Any) -> None:
        self.data.broken = round == 2


def failing() -> dict[str, Any]:
    loaders = [train for train, _ in data(sizes=(16, 16, 16))]
    broken = Failing(*loaders[1].dataset.tensors)
    return {"loaders": [loaders[0], DataLoader(broken, batch_size=8, shuffle=True), loaders[2]], "broken": broken}


def test_a_client_that_fails_is_named_and_the_others_go_on() -> None:
    case = failing()
    with pytest.raises(ClientError, match=r"(?s)Round 2, train: client 1 raised OSError: the disk is gone"):
        run(CASES["MLP"], Breaks(case["broken"]), vectorize_clients="require", loaders=case["loaders"])
    case = failing()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        own = FaultTolerance(min_results=2), Breaks(case["broken"])
        as_one = run(CASES["MLP"], *own, vectorize_clients="require", loaders=case["loaders"])
    assert any(re.search("in round 2 clients train one after the other: OSError", str(w.message)) for w in said)
    assert all(torch.isfinite(value).all() for value in as_one[0].values())


def test_data_that_cannot_be_opened_for_the_trial_is_the_clients_own_failure() -> None:
    loaders = [train for train, _ in data(sizes=(16, 16, 16))]

    def client(number: int) -> Any:
        if number == 0:
            raise OSError("no disk")
        return loaders[number]

    history = History()
    callbacks = [ClientData(client, num_clients=3), FaultTolerance(min_results=2), history]
    with pytest.warns(UserWarning, match="one after the other: OSError: no disk"):
        FederatedTrainer(max_rounds=1, vectorize_clients=True, callbacks=callbacks, **QUIET).fit(Lit(mlp()))
    assert len(history.rows) == 1


def test_a_client_whose_numbers_explode_spoils_nobody_else(counter: Counter) -> None:
    def loaders() -> list[Any]:
        made = [train for train, _ in data(sizes=(16, 16, 16))]
        made[1].dataset.tensors[0].mul_(1e30)
        return made

    def options() -> dict[str, Any]:
        return {"loaders": loaders(), "max_rounds": 1}

    as_one = run(CASES["MLP"], FaultTolerance(min_results=2), vectorize_clients="require", **options())
    assert_close(as_one, run(CASES["MLP"], FaultTolerance(min_results=2), **options()))
