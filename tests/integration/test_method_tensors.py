"""Methods of the user's own with tensors: each client has its own, and one that failed has done nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from flwr.serverapp import strategy as flower
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer, FederationError
from lightning_fed.callbacks import (
    ClientData,
    FaultTolerance,
    FedAdam,
    FedAvg,
    FedDyn,
    FederatedCallback,
    FlowerStrategy,
    LocalMethod,
    PartialParticipation,
    Partition,
    Personal,
    Scaffold,
    TrainableOnly,
)
from lightning_fed.wire.messages import memory_in
from tests.callbacks.rounds import WAYS, loaders, sgd
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

ALL = {"in process": {}, **WAYS}


def fit(*callbacks: Any, rounds: int = 3, sizes: Any = (8, 12, 8), module: Any = None, **how: Any) -> FederatedTrainer:
    data = [ClientData(loaders(sizes))]
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=[*data, *callbacks], **{**QUIET, **how})
    trainer.fit(module or Classifier(network(torch.float64), sgd))
    return trainer


class Echo(LocalMethod):
    """Sends back what came, and counts its fits."""

    acts_elementwise = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        before = self.memory.get("fits")
        one = next(iter(self.received.values()))
        self.memory = {"fits": torch.ones_like(one) if before is None else before + 1}
        self.sent = {**self.received, "fits": self.memory["fits"]}


class OwnTensors(FederatedCallback):
    """Sends each client its own number, under a name of its own where asked to; writes into it when it comes back."""

    def __init__(self, names: bool = False) -> None:
        self.names, self.shared, self.came = names, torch.zeros(()), {}

    def local_callbacks(self) -> list[Any]:
        return [Echo()]

    def tensors_to_client(self, trainer: Any, round: int, client: int) -> dict[str, torch.Tensor]:
        own = torch.tensor(float(10 * round + client))
        return {f"own {client}" if self.names else "own": own, "shared": self.shared}

    def tensors_expected(self, sent: Any) -> Any:
        return {**sent, "fits": torch.zeros(())}

    def tensors_from_client(self, trainer: Any, round: int, report: Any, tensors: Any) -> None:
        self.shared += 1  # in place, before the others have worked
        self.came[round, report.client] = {name: float(tensor) for name, tensor in tensors.items()}


AGGREGATIONS = {
    "FedAvg": FedAvg,
    "FedAdam": FedAdam,
    "FedDyn": FedDyn,
    "Flower's FedAvg": lambda: FlowerStrategy(flower.FedAvg(min_train_nodes=1, min_available_nodes=1)),
    "Krum": lambda: FlowerStrategy(flower.Krum(min_train_nodes=1, min_available_nodes=1)),
}


@pytest.mark.parametrize("way", ALL)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_each_client_gets_its_own_tensors(aggregation: str, way: str) -> None:
    """Flower's strategies give all messages one content."""
    method = OwnTensors()
    fit(AGGREGATIONS[aggregation](), method, **ALL[way])
    assert {key: came["own"] for key, came in method.came.items()} == {
        (round, client): 10 * round + client for round in (1, 2, 3) for client in range(3)
    }
    assert {key: came["shared"] for key, came in method.came.items()} == {
        (round, client): 3 * (round - 1) for round in (1, 2, 3) for client in range(3)
    }


@pytest.mark.parametrize("way", ["in process", "processes"])
def test_under_names_of_its_own_too(way: str) -> None:
    method = OwnTensors(names=True)
    fit(method, rounds=1, **ALL[way])
    assert [came[f"own {client}"] for (_, client), came in method.came.items()] == [10, 11, 12]


class First(PartialParticipation):
    """Client 0 comes in the second round."""

    def size(self, stage: str, num_clients: int) -> int:
        return 2

    def sample(self, stage: str, round: int, num_clients: int, seed: int) -> list[int]:
        return [1, 2] if round == 1 else [0, 1, 2]


@pytest.mark.parametrize("how", [{}, {"vectorize_clients": "require"}, {"vectorize_clients": 3}])
def test_what_a_client_remembers_counts_beside_one_that_remembers_nothing(how: dict[str, Any]) -> None:
    method = OwnTensors()
    fit(First(), method, sizes=(8, 8, 8), **how)
    fits = {key: came["fits"] for key, came in method.came.items()}
    assert fits == {(1, 1): 1, (1, 2): 1, (2, 0): 1, (2, 1): 2, (2, 2): 2, (3, 0): 2, (3, 1): 3, (3, 2): 3}


# ---------------------------------------------------------------------------------------------- a client that failed


class Refuses(FederatedCallback):
    """Another method of the run, which refuses client 1 in the second round."""

    def local_callbacks(self) -> list[Any]:
        return [Echo()]

    def tensors_to_client(self, trainer: Any, round: int, client: int) -> dict[str, torch.Tensor]:
        return {"bad": torch.tensor(float(round == 2 and client == 1))}

    def tensors_expected(self, sent: Any) -> Any:
        return {**sent, "fits": torch.zeros(())}

    def check_tensors(self, tensors: Any) -> None:
        if tensors["bad"]:
            raise ClientError("sent what is bad.")


class RaisesAfter(FederatedCallback):
    """A mod that raises when client 1 has trained in the second round."""

    def client_mods(self, stage: str) -> list[Any]:
        def mod(message: Any, context: Any, call_next: Any) -> Any:
            reply = call_next(message, context)
            round = message.content["config"]["server-round"]
            if stage == "train" and round == 2 and context.node_config["partition-id"] == 1:
                raise ValueError("too late")
            return reply

        return [mod]


class NaN(L.Callback):
    """Gives client 1 NaN gradients in the second round."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.current_round == 2 and trainer.client_id == 1:
            pl_module.net[0].weight.grad.fill_(torch.nan)


class Controls(FederatedCallback):
    """Keeps SCAFFOLD's controls: the server's is the mean of the clients'."""

    def on_round_end(self, trainer: Any, round: int, metrics: Any) -> None:
        self.server = next(one for one in trainer.callbacks if isinstance(one, Scaffold)).state_dict()["control"]
        states = trainer.federation.session.state._clients.client_states()
        each = [memory_in(states[client]) for client in states]  # one that never was accepted has zeros
        self.apart = max(
            float((c - sum(one[f"Scaffold/{name}"] for one in each) / 3).abs().max())
            for name, c in {**self.server}.items()
        )


HOW_IT_FAILS = {
    "a mod": lambda: ([RaisesAfter()], {}),
    "another method": lambda: ([Refuses()], {}),
    "NaN": lambda: ([], {"client_callbacks": [NaN()]}),
    "NaN, carry": lambda: ([], {"client_callbacks": [NaN()], "client_state": "carry"}),
    "too many examples": lambda: ([], {"max_examples": 10}),
}


@pytest.mark.parametrize("way", ["in process", "processes"])
@pytest.mark.parametrize("how", HOW_IT_FAILS)
def test_a_client_that_failed_keeps_what_it_kept_before(how: str, way: str) -> None:
    callbacks, arguments = HOW_IT_FAILS[how]()
    controls, failures = Controls(), Failures()
    trainer = fit(
        Scaffold(),
        Personal("net.2"),
        *callbacks,
        FaultTolerance(min_results=1),
        controls,
        failures,
        module=Classifier(network(torch.float64), torch.optim.Adam),
        **{**ALL[way], **arguments},
    )
    assert controls.apart < 1e-12
    rounds = (1, 2, 3) if how == "too many examples" else (2,)
    assert failures.seen == [(round, 1) for round in rounds]
    if how == "too many examples":
        own = trainer.personal_module(1).net[2].state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in network(torch.float64)[2].state_dict().items())


class Failures(FederatedCallback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_client_error(self, trainer: Any, round: int, stage: str, error: Any) -> None:
        self.seen.append((round, error.client))


# -------------------------------------------------------------------------------------------------------- faults


class Faulty(OwnTensors):
    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self._fail)

    def _fail(self, *args: Any) -> None:
        raise AssertionError("mine")


@pytest.mark.parametrize("hook", ["tensors_to_client", "tensors_expected", "check_tensors", "tensors_from_client"])
def test_what_a_method_raises_at_the_server_says_where(hook: str) -> None:
    with pytest.raises(FederationError, match=rf"Round 1: Faulty.{hook}\(\) failed for client 0: AssertionError: mine"):
        fit(Faulty(hook))


class Wrong(Echo):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.sent = ["no dict"]  # type: ignore[assignment]


class SendsList(OwnTensors):
    def local_callbacks(self) -> list[Any]:
        return [Wrong()]


def test_what_is_no_dict_of_tensors_is_named() -> None:
    with pytest.raises(FederationError, match=r"client 0 has Wrong.sent of type list: it is a dict"):
        fit(SendsList())


def test_a_local_method_is_no_client_callback() -> None:
    with pytest.raises(ConfigurationError, match=r"Echo is a LocalMethod: .*FederatedCallback.local_callbacks"):
        fit(client_callbacks=[Echo()])
    with pytest.raises(ConfigurationError, match=r"Echo is a LocalMethod"):
        fit(Echo())


class Unfreezes(L.Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda trainer, pl_module, **rest: pl_module.net[0].requires_grad_(True))


@pytest.mark.parametrize("hook", ["setup", "on_train_epoch_start"])
def test_what_is_frozen_has_to_stay_so(hook: str) -> None:
    net = network(torch.float64)
    net[0].requires_grad_(False)
    with pytest.raises(FederationError, match=r"client 0 trains 'net.0.weight', which was frozen when the run began"):
        fit(TrainableOnly(), client_callbacks=[Unfreezes(hook)], module=Classifier(copy.deepcopy(net), sgd))


def test_a_run_that_goes_on_with_other_clients_of_the_same_number_says_so(tmp_path: Path) -> None:
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 3, (30,))
    data = DataLoader(TensorDataset(x, y), batch_size=5)

    def run(values: str, rounds: int, ckpt_path: Any = None) -> None:
        saves = ModelCheckpoint(tmp_path, save_last=True)
        callbacks = [Partition(by=sorted(values * 10)), Personal("net.2"), saves]
        trainer = FederatedTrainer(max_rounds=rounds, callbacks=callbacks, **{**QUIET, "enable_checkpointing": True})
        trainer.fit(Classifier(network(torch.float64), sgd), data, ckpt_path=ckpt_path)

    run("abc", 1)
    with pytest.warns(UserWarning, match="Client 0 was a and is b now, and 2 more are others: what a client kept"):
        run("bcd", 2, tmp_path / "last.ckpt")
