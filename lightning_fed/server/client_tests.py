"""Each client's own model on its own test data, after a fit, in the user's process."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed import checks
from lightning_fed.callbacks.client_data import no_loader
from lightning_fed.client.local.fit import local_test
from lightning_fed.client.local.isolation import making_data
from lightning_fed.client.local.run import LocalResult
from lightning_fed.client.local.work import LocalTask, LocalWork
from lightning_fed.client.side import own_in
from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.seeding import random_states_kept
from lightning_fed.server.alone import alone
from lightning_fed.server.checkpoint import RunState
from lightning_fed.server.client_results import COLUMNS, ClientResults
from lightning_fed.server.inputs import Fitted
from lightning_fed.server.rounds import AVERAGED
from lightning_fed.state.snapshot import DataSnapshot
from lightning_fed.values import metrics, weights
from lightning_fed.values.data import ClientLoaders
from lightning_fed.views import overrides
from lightning_fed.wire.messages import callback_states_in, memory_in

if TYPE_CHECKING:
    from lightning_fed.server.trainer import ServerTrainer

_CALL = "test_clients()"
_SHOWN = 10  # of which something is said
_ELSEWHERE = (
    "Each site has its own: the metrics of clients on their held-out data are the clients/... of"
    " callbacks=[History(per_client=True)], whose .clients has a row a client and round."
)

Given = Callable[[int], Any] | Sequence[Any] | None


def each_on_its_own(trainer: ServerTrainer, clients: Iterable[int] | int | None, given: Given) -> ClientResults:
    """Do as ``FederatedTrainer.test_clients``; arguments and errors as there."""
    federation = trainer.federation
    fitted, state = federation.last_models(_CALL)
    if federation.is_running:
        raise ConfigurationError(f"{_CALL}: a fit is running, in which clients train the module. Call it after fit.")
    state.require_here(_CALL, _ELSEWHERE)
    _require_test_step(fitted.module)
    asked = _asked(clients, state.num_clients)
    if given is not None and not callable(given):
        _require_one_each(given, state.num_clients)
    with alone(), random_states_kept(), _as_it_was(fitted.module) as shared:
        makers = DataSnapshot({"clients": given if callable(given) else None})
        test = _Test(trainer, fitted, state, given, shared, makers)
        found = {client: test.of(client) for client in asked}
    results = {client: result for client, result in found.items() if result is not None}
    without = [client for client in asked if client not in results]
    if without:
        _say_without(without, len(results), given is not None)
    return _results(results, without, fitted.module)


@dataclass
class _Test:
    """What the tests of all clients have in common.

    Attributes:
        trainer: The server's trainer.
        fitted: What the fit has left.
        state: What clients keep.
        given: Data to test on in place of the clients' own, or ``None``.
        shared: The global weights.
        makers: What holds the code that makes the given data.
    """

    trainer: ServerTrainer
    fitted: Fitted
    state: RunState
    given: Given
    shared: weights.Weights
    makers: DataSnapshot

    def of(self, client: int) -> LocalResult | None:
        """Test one client; ``None`` where it has nothing to be tested on.

        Raises:
            ClientError: If it cannot be tested; what the user's code raises is raised, with a note of which client.
        """
        try:
            result = self._run(client)
        except ClientError as error:
            raise ClientError(f"{_CALL}: client {client} {error}", client=client, stage="test") from error
        except Exception as error:
            error.add_note(f"This was client {client} in {_CALL}.")
            raise
        if result is None or not result.num_examples:
            return None
        result.metrics = [
            replace(one, tensors={name: tensor.cpu() for name, tensor in one.tensors.items()})
            for one in metrics.with_own(result.metrics, result.numbers)
        ]
        return result

    def _run(self, client: int) -> LocalResult | None:
        fitted, kept = self.fitted, self.state.kept_by(client)
        memory, options = memory_in(kept), fitted.options
        task = LocalTask(
            client=client,
            round=max(1, self.trainer.global_step),
            seed=self.state.seed,
            weights={**self.shared, **own_in(memory, options)},
            callback_states=callback_states_in(kept),
            memory=memory,
            rounds=options.rounds,
        )
        loaders = self._loaders(task)
        if loaders is None:
            return None
        return local_test(
            LocalWork(fitted.module, fitted.datamodule, loaders, task, options), self.trainer.limit_test_batches
        )

    def _loaders(self, task: LocalTask) -> ClientLoaders | None:
        """Return a client's data, with that to test on as ``val``; ``None`` where there is none."""
        loaders = self.fitted.deal(task.client, task.round)
        if self.given is not None:
            with making_data(self.makers, task.seed, task.client):
                one = self.given(task.client) if callable(self.given) else self.given[task.client]
            if one is not None and (fault := no_loader(one, _WANTED, "tested")):
                raise ConfigurationError(f"test_clients(dataloaders=...): what client {task.client} is given {fault}.")
            own = one if isinstance(one, LightningDataModule) else None
            loaders = ClientLoaders(loaders.train, one if own is None else None, own)
        if loaders.datamodule is not None:
            return loaders if overrides(loaders.datamodule, LightningDataModule, "test_dataloader") else None
        return None if loaders.val is None else loaders


_WANTED = "a loader, a list of loaders, a LightningDataModule with a test_dataloader, or None for no data"


def _require_test_step(module: LightningModule) -> None:
    if overrides(module, LightningModule, "test_step"):
        return
    name = type(module).__name__
    instead = ""
    if overrides(module, LightningModule, "validation_step"):
        instead = (
            f", but a validation_step. If that is what to test with, let {name}.test_step call it; what it logs keeps"
            " its names"
        )
    raise ConfigurationError(f"{_CALL}: {name} has no test_step{instead or ': write one, as for Trainer.test'}.")


def _asked(clients: Iterable[int] | int | None, count: int) -> list[int]:
    """Return the clients to test, each once, in order.

    Raises:
        ConfigurationError: If one is not there, or none is asked for.
    """
    if clients is None:
        return list(range(count))
    given = list(clients) if isinstance(clients, Iterable) else [clients]
    try:
        asked = sorted({operator.index(client) for client in given})
    except TypeError:
        raise ConfigurationError(
            f"test_clients(clients={checks.as_typed(clients)}): write numbers of clients, from 0, such as [0, 3]."
        ) from None
    if strange := [client for client in asked if not 0 <= client < count]:
        raise ConfigurationError(f"{_CALL}: there is no client {strange[0]}, there are clients 0 to {count - 1}.")
    if not asked:
        raise ConfigurationError("test_clients(clients=[]): name at least one client, or leave it out for all.")
    return asked


def _require_one_each(given: Any, count: int) -> None:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConfigurationError(
            f"test_clients(dataloaders={checks.as_typed(given)}): write a list with one entry a client, or a function"
            " of a client's index. The same test data for all is dataloaders=lambda client: loader."
        )
    if len(given) != count:
        raise ConfigurationError(
            f"test_clients(dataloaders=...) has {len(given)} entries for {count} clients: give one for each, by number,"
            " or None."
        )


@contextmanager
def _as_it_was(module: LightningModule) -> Iterator[weights.Weights]:
    """Give the module's weights; it has them again after the block, on its device, and its gradients."""
    device, before = module.device, weights.read(module)
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        yield before
    finally:
        module.to(device)
        weights.load(module, before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _say_without(without: Sequence[int], others: int, are_given: bool) -> None:
    """Say which clients have no data to test on.

    Raises:
        ConfigurationError: If nobody has any.
    """
    more = f" and {len(without) - _SHOWN} more" if len(without) > _SHOWN else ""
    names = f"client{'s' if len(without) > 1 else ''} {', '.join(map(str, without[:_SHOWN]))}{more}"
    has = "have" if len(without) > 1 else "has"
    if others:
        rank_zero_warn(f"{_CALL} leaves {names} out, which {has} no data to test on.")
        return
    way_out = (
        "dataloaders= gives none of them a batch"
        if are_given
        else "Write Partition(..., val_fraction=...), or ClientData with (train, val) pairs or with datamodules that"
        " have a test_dataloader, or pass test_clients(dataloaders=...), a loader for each client"
    )
    raise ConfigurationError(f"{_CALL}: {names} {has} no data to test on. {way_out}.")


def _results(found: dict[int, LocalResult], without: list[int], module: LightningModule) -> ClientResults:
    merged = metrics.merge([(result.num_examples, result.metrics) for result in found.values()], module)
    values = {name: value for name, value in merged.values.items() if name not in COLUMNS}
    if averaged := sorted(set(merged.averaged) & values.keys()):
        rank_zero_warn(AVERAGED.format(", ".join(map(repr, averaged[:_SHOWN]))))
    if taken := sorted({*COLUMNS} & {name for result in found.values() for name in result.numbers}):
        rank_zero_warn(
            f"{_CALL} does not show the logged {', '.join(map(repr, taken))}: there is a column of its own with that"
            " name. Log it under another."
        )
    rows = [
        {
            **{name: value for name, value in result.numbers.items() if name not in COLUMNS},
            "client": client,
            "num_examples": result.num_examples,
        }
        for client, result in found.items()
    ]
    return ClientResults([{**dict.fromkeys(COLUMNS), **row} for row in rows], values, without)
