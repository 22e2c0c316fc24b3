"""Another method, strategy, optimizer or grid goes on from the weights and says what it cannot go on with."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from flwr.serverapp import strategy as flower

from lightning_fed import ClientError, ConfigurationError
from lightning_fed.callbacks import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FlowerStrategy,
)
from lightning_fed.testing import ToyModule
from tests.helpers import sweep
from tests.integration import plain
from tests.integration.checkpointing.runs import FEDERATION, fit, loader, notes, saved, trainer_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:You defined a `validation_step` but"
)


METHODS = {
    "FedAvg": FedAvg,
    "FedAvgM": FedAvgM,
    "FedAdam": FedAdam,
    "Flower's FedAvg": lambda: FlowerStrategy(flower.FedAvg()),
    "Flower's FedAdam": lambda: FlowerStrategy(flower.FedAdam()),
    "Flower's FedMedian": lambda: FlowerStrategy(flower.FedMedian()),
    "wrapped": lambda: FlowerStrategy(flower.DifferentialPrivacyServerSideFixedClipping(flower.FedAdam(), 0.1, 1.0, 2)),
}


BEFORE = ["FedAvg", "FedAdam", "Flower's FedAdam", "wrapped"]
# With a state before, after, both, of another kind, within another; and the same again.
FEW = [("FedAdam", "FedAvg"), ("FedAvg", "FedAvgM"), ("FedAdam", "FedAvgM"), ("FedAdam", "Flower's FedAdam")]
FEW += [("Flower's FedAdam", "wrapped"), ("wrapped", "wrapped")]


@pytest.mark.parametrize(("before", "after"), sweep(itertools.product(BEFORE, METHODS), FEW))
def test_another_method_goes_on_from_the_weights_with_a_state_of_its_own(tmp_path, before, after):
    fit(tmp_path, METHODS[before](), rounds=1)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "one.ckpt")
    with notes() as said:
        module, trainer = fit(tmp_path, METHODS[after](), rounds=2, ckpt_path=tmp_path / "one.ckpt")
    assert trainer.current_epoch == 2
    told = [line for line in said if line.startswith("The run aggregated with")]
    if before == after:
        assert said == []
        return
    assert len(told) == 1
    assert "begins anew" in told[0]
    # As if that method had begun with these weights in this round.
    checkpoint = saved(tmp_path / "one.ckpt")
    checkpoint["callbacks"][FEDERATION].pop("method")
    checkpoint["callbacks"][FEDERATION].pop("strategy")
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    expected, _ = fit(tmp_path / "bare", METHODS[after](), rounds=2, ckpt_path=tmp_path / "bare.ckpt")
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


class OwnState(flower.FedAvg):
    """A strategy that says itself what its state is."""

    names = ("total",)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.total = torch.zeros(1)

    def aggregate_train(self, server_round, replies):
        self.total += 1
        return super().aggregate_train(server_round, replies)

    def state_dict(self):
        return {name: getattr(self, name) for name in self.names}

    def load_state_dict(self, state):
        for name in self.names:
            setattr(self, name, state[name])


def test_a_strategy_that_cannot_take_its_state_is_named_with_what_the_checkpoint_has(tmp_path):
    fit(tmp_path, FlowerStrategy(OwnState()), rounds=1)
    strategy = OwnState()
    strategy.names, strategy.drift = ("total", "drift"), torch.zeros(1)
    with pytest.raises(
        ConfigurationError,
        match=r"last\.ckpt: OwnState cannot take its state, of which the checkpoint has 'total': KeyError: 'drift'\."
        r" .*MyModule\.load_from_checkpoint",
    ):
        fit(tmp_path, FlowerStrategy(strategy), rounds=2, ckpt_path="last")


class Momentum(ToyModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Adam(ToyModule):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_another_optimizer_cannot_go_on_with_what_clients_kept(tmp_path):
    fit(tmp_path, module=Momentum(), rounds=1, client_state="carry")
    with pytest.raises(
        ClientError, match=r"client 0 has kept the state of SGD, and configure_optimizers now gives Adam"
    ):
        fit(tmp_path, module=Adam(), rounds=2, client_state="carry", ckpt_path="last")
    fit(tmp_path, module=Adam(), rounds=2, client_state="global", ckpt_path="last")


@pytest.mark.parametrize("client_state", ["carry", "reset"])
def test_what_clients_keep_is_named_where_it_cannot_be_given_back(tmp_path, client_state):
    from flwr.app import Context, RecordDict

    fit(tmp_path, rounds=1, client_state=client_state)
    expected = "What clients kept cannot be given back to them on this grid."
    for rounds in (2, 3):  # from a checkpoint that has it, and from one of such a grid, which has not
        server, clients = (trainer_of(tmp_path, rounds=rounds, client_state=client_state) for _ in range(2))
        app = clients.client_app(ToyModule(), loader())
        with notes() as said, plain.flower_identity():
            server.server_app(ToyModule(), ckpt_path=tmp_path / "last.ckpt")(
                plain.ForeignGrid(app, 2), Context(7, 1, {}, RecordDict(), {})
            )
        assert said == ([expected] if client_state == "carry" else [])
