"""Who decides what in a run: the federated callbacks, and defaults for what none of them decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast, get_args

from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import Strategy
from lightning.pytorch import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_fed.callbacks import FedAvg, Partition
from lightning_fed.callbacks.base import (
    CohortOwner,
    Decision,
    FailureOwner,
    FederatedCallback,
    PartitionOwner,
    Stage,
)
from lightning_fed.client.local.data_pass import BEFORE
from lightning_fed.client.local.method import named
from lightning_fed.errors import ConfigurationError
from lightning_fed.strategies import ServerOptimizer
from lightning_fed.values.staying import Staying, staying
from lightning_fed.values.weights import parameter_names

STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass
class Owners:
    """Who decides what, and all federated callbacks in the user's order."""

    partition: PartitionOwner
    cohorts: CohortOwner
    failures: FailureOwner
    callbacks: Sequence[FederatedCallback]

    def mods(self) -> dict[str, Sequence[Mod]]:
        """Return the client mods of all methods by stage, outermost first."""
        return {stage: [mod for method in self.callbacks for mod in method.client_mods(stage)] for stage in STAGES}

    def build_strategy(self, module: nn.Module) -> Strategy:
        """Return the strategy of the run: that of the owner of the aggregation, as the other methods wrap it.

        Raises:
            ConfigurationError: If a callback gives none.
        """

        def built(callback: FederatedCallback, before: Strategy | None) -> Strategy:
            strategy = callback.server_strategy(before)
            if strategy is None:
                raise ConfigurationError(f"{type(callback).__name__}.server_strategy() gave no strategy.")
            if isinstance(strategy, ServerOptimizer) and strategy.parameters is None:
                strategy.parameters = parameter_names(module)
            return strategy

        owner, *others = sorted(self.callbacks, key=lambda callback: "aggregation" not in callback.decides)
        strategy = built(owner, None)
        for callback in others:
            strategy = built(callback, strategy)
        return strategy

    def staying(self, module: nn.Module) -> Staying:
        """Return which tensors of the module do not travel; raises as ``staying``."""
        return staying(module, [callback.stays for callback in self.callbacks])

    def of_a_second_fit(self) -> list[FederatedCallback]:
        """Return those that let clients train a model of their own beside the global one; there is one at most."""
        return trains_a_second(self.callbacks)

    def check_cohort(self, clients: int, max_clients: int | None) -> None:
        """Check who takes part in a round.

        Args:
            clients: How many clients there are.
            max_clients: Truncates cohorts.

        Raises:
            ConfigurationError: If there can be no cohort, or never as many good replies as a round needs.
        """
        cohort, _ = (self.cohorts.size(stage, clients) for stage in STAGES)
        cohort = min(cohort, max_clients or cohort)
        if (needed := self.failures.min_results(cohort)) > cohort:
            raise ConfigurationError(
                f"{type(self.failures).__name__}(min_results={needed}) can never be met: {cohort} clients train"
                " in a round."
            )

    def known_clients(self) -> int | None:
        """Return how many clients there are; with some partitioners only the data tells, which a server may lack."""
        try:
            return self.partition.num_clients
        except ConfigurationError:
            return None

    def client_names(self) -> list[str]:
        """Return what the data calls the clients, by number, where it has names for them."""
        return list(map(str, getattr(self.partition, "client_names", None) or ()))

    def least_clients(self) -> int:
        """Return with how many clients a run begins: all that there is data for, unless a callback says fewer."""
        if (least := self.cohorts.min_available_clients) > 1:
            return least
        return self.known_clients() or least

    def training(self) -> dict[str, FederatedCallback]:
        """Return those that have a part in local training, each under a name that is its own in this run.

        Only these go to the clients, who may be in other processes, where a logger or a progress bar cannot be sent.
        """
        named: dict[str, FederatedCallback] = {}
        for callback in self.callbacks:
            if is_overridden("local_callbacks", callback, FederatedCallback) and callback.has_local_part:
                kind = type(callback).__name__
                alike = sum(type(other).__name__ == kind for other in named.values())
                named[f"{kind}-{alike + 1}" if alike else kind] = callback
        return named


def local_callbacks(methods: Mapping[str, FederatedCallback]) -> list[Callback]:
    """Return new callbacks of all methods for one client's local fit, those that add to the objective first."""
    built = [callback for name, method in methods.items() for callback in named(name, method.local_callbacks())]
    return sorted(built, key=lambda callback: not getattr(callback, "adds_to_objective", False))


def pass_callbacks(methods: Mapping[str, FederatedCallback]) -> list[Callback]:
    """Return new callbacks for a pass over a client's data: the terms of the objective, and who makes use of it."""
    terms = [callback for callback in local_callbacks(methods) if getattr(callback, "adds_to_objective", False)]
    parts = [named(f"{name}{BEFORE}", method.pass_before()) for name, method in methods.items()]
    return [*terms, *chain.from_iterable(parts)]


def trains_a_second(callbacks: Sequence[FederatedCallback]) -> list[FederatedCallback]:
    """Return the callbacks that let clients train a model of their own beside the global one."""
    return [callback for callback in callbacks if is_overridden("second_fit", callback, FederatedCallback)]


def of(decision: Decision, callbacks: Sequence[FederatedCallback]) -> list[FederatedCallback]:
    """Return the callbacks that decide one thing; more than one is a fault."""
    return [callback for callback in callbacks if decision in callback.decides]


def owner_faults(federated: Sequence[FederatedCallback], num_clients: int | None) -> list[str]:
    """Return a sentence for each thing that two want to decide, and for what nobody decides and has no default."""
    found = []
    for decision in ("partition", "cohort", "aggregation", "failures"):
        names = [type(callback).__name__ for callback in of(decision, federated)]
        if len(names) > 1:
            found.append(f"{' and '.join(names)} both decide the {decision}: keep one of them.")
    if len(names := [type(callback).__name__ for callback in trains_a_second(federated)]) > 1:
        found.append(f"{' and '.join(names)} both train a second model of each client: keep one of them.")
    deals = of("partition", federated)
    found += [
        f"{type(one).__name__} decides the partition: derive it from lightning_fed.callbacks.base.PartitionOwner."
        for one in deals
        if not isinstance(one, PartitionOwner)
    ]
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
    """Return who decides what; defaults for what no callback decides.

    Args:
        federated: The federated callbacks, in the user's order.
        num_clients: Short for an IID partition.
    """

    def owner(decision: Decision) -> Any:
        return next(iter(of(decision, federated)), None)

    partition = owner("partition") or Partition(num_clients or 1)
    own = (aggregation for callback in federated if (aggregation := callback.aggregation()) is not None)
    aggregation = owner("aggregation") or next(own, None) or FedAvg()
    cohorts = owner("cohort") or CohortOwner()
    failures = owner("failures") or FailureOwner()
    defaults = [c for c in (partition, aggregation, cohorts, failures) if c not in federated]
    return Owners(partition, cohorts, failures, [*federated, *cast(list[FederatedCallback], defaults)])
