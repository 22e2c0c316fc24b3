"""A metric whose states are in the state dict is averaged like weights, and writes into nobody else's."""

import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule, toy_data

SIZES = (8, 24, 40)  # 1, 3 and 5 batches
ROUNDS = 2


class Counting(ToyModule):
    """Counts its steps in a metric that is saved with the weights, and so goes on from client to server and back."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.steps = SumMetric()
        self.both = MetricCollection({"sum": SumMetric(), "mean": MeanMetric()})
        self.steps.persistent(True)
        self.both.persistent(True)

    def training_step(self, batch, batch_idx):
        self.steps.update(1.0)
        self.both.update(1.0)
        return super().training_step(batch, batch_idx)


def counted(engine, quiet) -> dict[str, float]:
    torch.manual_seed(0)
    module = Counting()
    loaders = [DataLoader(toy_data(size), batch_size=8) for size in SIZES]
    FederatedTrainer(max_rounds=ROUNDS, callbacks=[ClientData(loaders)], engine=engine, seed=0, **quiet).fit(module)
    return {name: value.item() for name, value in module.state_dict().items() if not name.startswith("net")}


@pytest.mark.parametrize(
    "engine",
    ["in_process", Processes(1, start_method="fork"), Processes(2, start_method="fork")],
    ids=["in_process", "one", "two"],
)
def test_states_that_are_saved_are_the_mean_of_what_the_clients_counted_on_every_engine(engine, quiet):
    each_round = sum(size * (size // 8) for size in SIZES) / sum(SIZES)
    expected = {"steps.sum_value": ROUNDS * each_round, "both.sum.sum_value": ROUNDS * each_round}
    found = counted(engine, quiet)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["both.mean.weight"] == pytest.approx(ROUNDS * each_round)
