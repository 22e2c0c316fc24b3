"""Vectorized clients get the weights and metrics of clients trained one after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torchvision
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    FedAdam,
    FedProx,
    FlowerStrategy,
    Partition,
)
from lightning_fed.engines import Engine, InProcess, Processes
from tests.helpers import QUIET, sweep
from tests.integration.vectorized.runs import (
    CASES,
    ROUNDS,
    SIZES,
    Counter,
    Encoder,
    Lit,
    TwoGroupsByEpoch,
    assert_close,
    data,
    mlp,
    momentum,
    run,
)

# Of the optimizers that step as a stack those of which clients share a count of steps, or adapt more than one moment.
FEW = (
    *("MLP", "CNN with BatchNorm", "transformer", "AdamW, two groups, schedule by step", "buffers"),
    *("tied, frozen and unused weights", "dropout", "Adam"),
)


@pytest.mark.parametrize("name", sweep(CASES, FEW))
def test_clients_trained_as_one_get_what_each_gets_alone(name: str, counter: Counter) -> None:
    alone = run(CASES[name], dtype=torch.float64)
    assert counter.train == 0
    as_one = run(CASES[name], dtype=torch.float64, vectorize_clients="require")
    assert counter.train == ROUNDS * 5  # the two whose numbers of batches nobody shares train alone
    assert counter.evaluate == ROUNDS * 7
    assert_close(as_one, alone, torch.float64)


OPTIONS: dict[str, dict[str, Any]] = {
    "clipping by norm": {"gradient_clip_val": 0.2},
    "clipping by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "accumulation": {"accumulate_grad_batches": 2},
    "steps": {"local_epochs": None, "local_steps": 4},
    "few batches": {"limit_train_batches": 2},
    "global schedule": {"client_state": "global"},
    "three at once": {"vectorize_clients": 3},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "processes": {"engine": Processes(2, start_method="fork")},
}


@pytest.mark.parametrize(
    "name", sweep(OPTIONS, ("clipping by norm", "accumulation", "steps", "three at once", "processes"))
)
def test_options_of_local_fits(name: str, counter: Counter) -> None:
    options = OPTIONS[name]
    plain = {key: value for key, value in options.items() if key not in ("vectorize_clients", "engine")}
    build = (lambda: TwoGroupsByEpoch(mlp())) if name == "global schedule" else CASES["MLP"]
    dtype = torch.float32 if name == "bf16-mixed" else torch.float64
    alone = run(build, dtype=dtype, **plain)
    as_one = run(build, dtype=dtype, **{"vectorize_clients": "require", **options})
    assert name == "processes" or counter.train > 0
    if name == "bf16-mixed":
        torch.testing.assert_close(as_one[0], alone[0], rtol=0.02, atol=0.002)
    else:
        assert_close(as_one, alone, dtype)


@pytest.mark.parametrize(
    "name",
    sweep(["MLP", "CNN with BatchNorm", "transformer", "AdamW, two groups, schedule by step"], ["CNN with BatchNorm"]),
)
def test_in_single_precision(name: str) -> None:
    assert_close(run(CASES[name], vectorize_clients="require"), run(CASES[name]))


def resnet(dtype: torch.dtype, rounds: int, **options: Any) -> Any:
    loaders = data(dtype, sizes=(16, 13, 16), shape=(3, 32, 32))
    net = partial(torchvision.models.resnet18, num_classes=3)
    return run(
        lambda: Lit(net(), partial(momentum, lr=0.01)), dtype=dtype, loaders=loaders, max_rounds=rounds, **options
    )


@pytest.mark.landing
def test_a_resnet(counter: Counter) -> None:
    as_one = resnet(torch.float64, 3, vectorize_clients="require")
    assert counter.train == 9
    assert_close(as_one, resnet(torch.float64, 3), torch.float64)


@pytest.mark.landing
def test_a_resnet_in_single_precision_is_as_near_to_the_truth_as_one_trained_alone() -> None:
    """With few examples BatchNorm amplifies rounding far beyond 1e-4, whoever rounds."""
    truth = resnet(torch.float64, 1)[0]

    def error(**options: Any) -> float:
        found = resnet(torch.float32, 1, **options)[0]
        return float(sum((found[n].double() - truth[n]).square().sum() for n in truth if truth[n].is_floating_point()))

    assert error(vectorize_clients="require") < 2 * error()


@pytest.mark.parametrize(
    "method",
    [lambda: FedProx(mu=0.5), lambda: FedAdam(learning_rate=0.1), lambda: FlowerStrategy(_krum())],
    ids=["FedProx", "FedAdam", "Krum"],
)
def test_methods(method: Callable[[], Any], counter: Counter) -> None:
    alone = run(CASES["MLP"], method(), dtype=torch.float64)
    as_one = run(CASES["MLP"], method(), dtype=torch.float64, vectorize_clients="require")
    assert counter.train == ROUNDS * 5
    assert_close(as_one, alone, torch.float64)


def _krum() -> Any:
    from flwr.serverapp.strategy import Krum

    return Krum(num_malicious_nodes=1)


@pytest.mark.parametrize("engine", [InProcess(), Processes(2, start_method="fork")], ids=["in process", "processes"])
@pytest.mark.parametrize("name", sweep(["CNN with BatchNorm", "dropout"], ["dropout"]))
def test_the_same_run_twice_gives_the_same_bits(name: str, engine: Engine) -> None:
    one, other = (run(CASES[name], vectorize_clients="require", engine=engine) for _ in range(2))
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert repr([{k: v for k, v in row.items() if k != "seconds"} for row in one[1]]) == repr(
        [{k: v for k, v in row.items() if k != "seconds"} for row in other[1]]
    )


@pytest.mark.parametrize(
    "build",
    [CASES["dropout"], pytest.param(lambda: Lit(Encoder(dropout=0.2)), marks=pytest.mark.landing)],
    ids=["MLP", "transformer"],
)
def test_a_clients_dropout_does_not_depend_on_who_else_is_there(build: Callable[[], L.LightningModule]) -> None:
    many = run(build, dtype=torch.float64, vectorize_clients="require", max_rounds=1)
    loaders = data(torch.float64)
    few = run(
        build,
        dtype=torch.float64,
        vectorize_clients="require",
        max_rounds=1,
        loaders=[*loaders[:2], loaders[3]],
    )
    for client in (0, 1):
        mine, theirs = ([row for row in clients if row["client"] == client] for clients in (many[2], few[2]))
        assert mine[0]["train_loss"] == pytest.approx(theirs[0]["train_loss"], rel=1e-12)


class Augmented(Dataset[Any]):
    """Noise from all three generators in each example."""

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, 6, generator=torch.Generator().manual_seed(size)).double()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        import random

        import numpy as np

        noise = torch.randn(6).double() + random.random() + np.random.rand()
        return {"x": self.x[index] + 0.1 * noise, "y": torch.tensor(index % 3), "name": "same for all"}


class OfDicts(Lit):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return {"loss": super().training_step((batch["x"], batch["y"]), 0), "more": batch["name"]}


def test_examples_that_draw_and_batches_of_dicts(counter: Counter) -> None:
    loaders = [DataLoader(Augmented(size), batch_size=8, shuffle=True) for size in SIZES]
    options: dict[str, Any] = {"dtype": torch.float64, "loaders": loaders}
    as_one = run(lambda: OfDicts(mlp()), vectorize_clients="require", **options)
    assert counter.train == ROUNDS * 5
    assert_close(as_one, run(lambda: OfDicts(mlp()), **options), torch.float64)


def test_a_partition_of_one_data_set(counter: Counter) -> None:
    def trained(**options: Any) -> Any:
        torch.manual_seed(0)
        module = Lit(mlp())
        generator = torch.Generator().manual_seed(1)
        whole = TensorDataset(
            torch.randn(120, 6, generator=generator), torch.randint(0, 3, (120,), generator=generator)
        )
        trainer = FederatedTrainer(max_rounds=2, callbacks=[Partition(5, val_fraction=0.2)], **QUIET, **options)
        trainer.fit(module, DataLoader(whole, batch_size=8, shuffle=True))
        return {name: value.clone() for name, value in module.state_dict().items()}

    as_one = trained(vectorize_clients="require")
    assert counter.train == 10
    torch.testing.assert_close(as_one, trained(), rtol=1e-4, atol=1e-6)
