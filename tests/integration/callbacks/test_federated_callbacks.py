"""Federated callbacks are taken up wherever they come from, and second owners are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.tuner import Tuner

from lightning_fed import ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    ClientMetrics,
    FedAdam,
    FedAvg,
    FederatedCallback,
    FedProx,
    History,
    PartialParticipation,
    Partition,
)
from lightning_fed.testing import ToyModule
from tests.helpers import QUIET
from tests.integration.callbacks.runs import ENGINES, federated, loader, toy

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


def values(module: ToyModule) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def from_module(trainer: FederatedTrainer, module: Any, *callbacks: Callback) -> None:
    module.configure_callbacks = lambda: list(callbacks)


def appended(trainer: FederatedTrainer, module: Any, *callbacks: Callback) -> None:
    trainer.callbacks.extend(callbacks)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", [from_module, appended])
def test_federated_callbacks_are_taken_up_wherever_they_come_from(how, engine):
    def methods() -> list[Callback]:
        return [FedProx(mu=5.0), FedAdam(learning_rate=0.05), PartialParticipation(fraction_train=0.5)]

    expected, module, history = toy(), toy(), History()
    federated(*methods(), engine=engine).fit(expected, loader())
    plain = toy()
    federated(engine=engine).fit(plain, loader())
    trainer = federated(engine=engine)
    how(trainer, module, *methods(), history, ClientMetrics())
    trainer.fit(module, loader())
    pairs = list(zip(values(module), values(expected), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(values(module), values(plain), strict=True))
    assert len(history.rows) == 2
    assert "train_loss/min" in history.names


def test_a_partition_of_the_modules_own_takes_the_place_of_the_users():
    trainer, history = FederatedTrainer(max_rounds=1, callbacks=[Partition(2)], **QUIET), History(per_client=True)
    trainer.fit(toy(Partition(3), history), loader())
    assert [row["client"] for row in history.clients] == [0, 1, 2]
    with pytest.raises(ConfigurationError, match="Partition and ClientData both decide the partition"):
        federated(rounds=1).fit(toy(ClientData([loader()])), loader())


def test_a_partition_beside_num_clients_is_refused_wherever_it_comes_from():
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, **QUIET)
    with pytest.raises(ConfigurationError, match="num_clients=2 is short for an IID Partition, and Partition decides"):
        trainer.fit(toy(Partition(3)), loader())


@pytest.mark.parametrize("how", [from_module, appended])
def test_a_second_owner_is_refused_wherever_it_comes_from(how):
    trainer, module = federated(FedAvg()), toy()
    how(trainer, module, FedAdam())
    with pytest.raises(ConfigurationError, match="FedAvg and FedAdam both decide the aggregation"):
        trainer.fit(module, loader())


def test_a_callback_of_an_entry_point_is_taken_up(monkeypatch):
    from lightning.pytorch.trainer.connectors import callback_connector

    history = History()
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda group: [history])
    federated().fit(toy(), loader())
    assert len(history.rows) == 2


@pytest.mark.parametrize("how", [from_module, appended])
def test_a_method_of_ones_own_has_all_its_parts_wherever_it_comes_from(how):
    said = []

    class Method(FederatedCallback):
        def local_callbacks(self) -> list[Callback]:
            said.append("local")
            return []

        def client_mods(self, stage: str) -> list[Any]:
            said.append("mods")

            def mod(message: Any, context: Any, call_next: Any) -> Any:
                said.append("wire")
                return call_next(message, context)

            return [mod] if stage == "train" else []

        def server_strategy(self, strategy: Any) -> Any:
            said.append("server")
            return strategy

        def on_federation_start(self, trainer: Any) -> None:
            said.append("start")

    trainer, module = federated(rounds=1), toy()
    how(trainer, module, Method())
    trainer.fit(module, loader())
    assert [said.count(part) for part in ("server", "start", "mods", "wire")] == [1, 1, 2, 2]
    assert said.count("local") >= 2


def test_the_client_app_of_a_site_has_the_methods_that_its_module_brings():
    said = []

    class Method(FederatedCallback):
        def client_mods(self, stage: str) -> list[Any]:
            said.append(stage)
            return []

    trainer = federated()
    trainer.client_app(toy(Method()), loader())
    assert {"train", "evaluate"} <= set(said)


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_the_tuner_is_refused_and_leaves_the_trainer_as_it_was(search):
    trainer, module = federated(rounds=1), toy()
    module.lr = module.batch_size = 1
    before = list(trainer.callbacks)
    with pytest.raises(ConfigurationError, match=r"(LearningRateFinder|BatchSizeFinder) replaces the training loop"):
        getattr(Tuner(trainer), search)(module, loader())
    assert trainer.callbacks == before
    trainer.fit(module, loader())
    assert trainer.global_step == 1
