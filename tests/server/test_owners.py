"""Who decides what: here, with how many clients a run begins."""

from collections.abc import Sequence
from typing import Any

import pytest
from flwr_datasets.partitioner import NaturalIdPartitioner
from lightning.pytorch import Callback

from lightning_fed.callbacks import (
    ClientData,
    FedDyn,
    FederatedCallback,
    FedProx,
    PartialParticipation,
    Partition,
    Scaffold,
)
from lightning_fed.server import owners


@pytest.mark.parametrize(
    ("callbacks", "least"),
    [
        ([ClientData(lambda client: [], num_clients=5)], 5),
        ([Partition(4), PartialParticipation(0.5)], 4),
        ([Partition(4), PartialParticipation(min_available_clients=2)], 2),
        ([Partition(NaturalIdPartitioner("writer"))], 1),  # only the data tells how many there are
    ],
)
def test_a_run_begins_with_all_clients_unless_a_callback_says_fewer(callbacks: Sequence[Any], least: int) -> None:
    assert owners.build(callbacks, None).least_clients() == least


class Other(FederatedCallback):
    def local_callbacks(self) -> Sequence[Callback]:
        return [Callback()]


def test_terms_of_the_objective_come_before_what_reads_gradients_and_all_else_stays_in_order() -> None:
    methods = owners.build([Other(), Scaffold(), FedProx(0.1), FedDyn()], 2).training()
    names = [type(callback).__name__ for callback in owners.local_callbacks(methods)]
    assert names == ["ProximalTerm", "DynamicTerm", "Callback", "ControlVariates"]
