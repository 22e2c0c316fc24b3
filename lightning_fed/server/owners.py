"""Who decides what in a run: the federated callbacks, and defaults for what none of them decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from flwr.clientapp.typing import Mod
from lightning.pytorch import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fed.callbacks import FedAvg, Partition
from lightning_fed.callbacks.base import (
    CohortOwner,
    Decision,
    FailureOwner,
    FederatedCallback,
    PartitionOwner,
    Stage,
)


@dataclass
class Owners:
    """Who decides what, and all federated callbacks in the user's order."""

    partition: PartitionOwner
    cohorts: CohortOwner
    failures: FailureOwner
    callbacks: Sequence[FederatedCallback]

    def mods(self) -> dict[str, Sequence[Mod]]:
        """The client mods of all methods by stage, outermost first."""
        stages: tuple[Stage, ...] = ("train", "evaluate")
        return {stage: [mod for method in self.callbacks for mod in method.client_mods(stage)] for stage in stages}

    def training(self) -> list[FederatedCallback]:
        """Those that have a part in local training.

        Only these go to the clients, who may be in other processes, where a logger or a progress bar cannot be sent.
        """
        return [c for c in self.callbacks if is_overridden("local_callbacks", c, FederatedCallback)]


def local_callbacks(methods: Sequence[FederatedCallback]) -> list[Callback]:
    """New callbacks of all methods for one client's local fit."""
    return [callback for method in methods for callback in method.local_callbacks()]


def of(decision: Decision, callbacks: Sequence[FederatedCallback]) -> list[FederatedCallback]:
    """The callbacks that decide one thing; more than one is a fault."""
    return [callback for callback in callbacks if decision in callback.decides]


def faults(federated: Sequence[FederatedCallback], num_clients: int | None) -> list[str]:
    """A sentence for each thing that two want to decide, and for what nobody decides and has no default."""
    found = []
    for decision in ("partition", "cohort", "aggregation", "failures"):
        names = [type(callback).__name__ for callback in of(decision, federated)]
        if len(names) > 1:
            found.append(f"{' and '.join(names)} both decide the {decision}: keep one of them.")
    deals = of("partition", federated)
    if not deals and num_clients is None:
        found.append(
            "Say who the clients are: num_clients=10 deals the train set out at random, callbacks=[Partition(...)] by"
            " any flwr-datasets partitioner, callbacks=[ClientData(...)] takes data that is already apart."
        )
    if deals and num_clients is not None:
        found.append(
            f"num_clients={num_clients} is short for an IID Partition, and {type(deals[0]).__name__} decides the"
            " partition already: leave num_clients out."
        )
    return found


def build(federated: Sequence[FederatedCallback], num_clients: int | None) -> Owners:
    """Who decides what; defaults for what no callback decides.

    Args:
        federated: The federated callbacks, in the user's order.
        num_clients: Short for an IID partition.
    """

    def owner(decision: Decision) -> Any:
        return next(iter(of(decision, federated)), None)

    partition = owner("partition") or Partition(num_clients or 1)
    aggregation = owner("aggregation") or FedAvg()
    cohorts = owner("cohort") or CohortOwner()
    failures = owner("failures") or FailureOwner()
    defaults = [c for c in (partition, aggregation, cohorts, failures) if c not in federated]
    return Owners(partition, cohorts, failures, [*federated, *cast(list[FederatedCallback], defaults)])
