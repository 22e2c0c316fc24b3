"""Data that is already apart: each client brings its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset, IterableDataset

from lightning_fed import checks
from lightning_fed.callbacks.base import PartitionOwner
from lightning_fed.client.local.examples import examples_in
from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.values.data import ClientLoaders


class ClientData(PartitionOwner):
    """Gives each client its own datamodule or train loader, in ``Partition``'s place.

    ``fit(model)`` then needs no train loader. A client's datamodule is set up in the client's own fit, and its
    ``val_dataloader`` serves the client-side evaluation, for which it is set up as for a fit, too. A client weighs as
    much as its train loader yields examples in an epoch, by sampler, ``drop_last`` and ``limit_train_batches``; where
    lengths do not tell, as many as come in a round's first local epoch.

    Args:
        clients: ``fn(client_id)`` for clients ``0..n-1`` (with ``num_clients``), or a list with one entry a client;
            each gives a ``LightningDataModule``, a train loader, or a pair of a train and a val loader.
        num_clients: How many clients a function serves.

    Raises:
        ConfigurationError: If the number of clients is missing, contradicts the list, or is zero, or if an entry of the
            list is no loader (a data set would be trained on example by example).

    >>> ClientData([["a", "b"], ["c"]]).num_clients
    2
    """

    def __init__(self, clients: Callable[[int], Any] | Sequence[Any], num_clients: int | None = None) -> None:
        if not callable(clients) and not isinstance(clients, Sequence):
            raise ConfigurationError(
                f"ClientData({checks.as_typed(clients)}): write a list with one entry a client, or a function of a"
                " client's index and num_clients=."
            )
        faults = checks.number_faults({"num_clients": num_clients})
        if faults:
            raise ConfigurationError(f"ClientData: {faults[0]}")
        known = num_clients if callable(clients) else len(clients)
        if known is None:
            raise ConfigurationError("ClientData(fn) does not tell how many clients there are: add num_clients= to it.")
        if known < 1 or (num_clients is not None and num_clients != known):
            raise ConfigurationError(
                f"ClientData got {known} clients{'' if num_clients is None else f' and num_clients={num_clients}'}:"
                " give one entry for each client, at least one."
            )
        if not callable(clients):
            faults = [f"clients[{i}] {fault}." for i, one in enumerate(clients) if (fault := _fault(one))]
            if faults:
                raise ConfigurationError("\n  - ".join(["ClientData:", *faults]))
        self._clients = clients if callable(clients) else clients.__getitem__
        self._count = known
        self._function = clients if callable(clients) else None

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return self._count

    @property
    def source(self) -> object:
        """The function, if it is one."""
        return self._function

    def client(self, client: int, *, round: int) -> ClientLoaders:
        """See ``PartitionOwner``."""
        given = self._clients(client)
        if fault := _fault(given):
            raise ClientError(f"is given data by ClientData that {fault}.")
        if isinstance(given, LightningDataModule):
            return ClientLoaders(datamodule=given)
        train, val = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        return ClientLoaders(train=train, val=val)

    @property
    def knows_sizes(self) -> bool:
        """Whether they are those of loaders that are there."""
        return self._function is None

    def size_of(self, client: int) -> int | None:
        """Return those of a client's loader, or ``None`` where its length does not tell, or a function makes it."""
        if self._function is not None:
            return None
        given = self._clients(client)
        return examples_in(given[0] if isinstance(given, tuple) else given)

    def can_evaluate(self) -> bool:
        """Return whether a client has data to evaluate on only the client knows."""
        return True


def _fault(given: Any) -> str | None:
    """Return what is wrong with what a client is given: a clause, or ``None``."""
    pair = given if isinstance(given, tuple) and len(given) == 2 else (given,)
    return next((fault for one in pair if (fault := no_loader(one))), None)


_TRAINS = "a train loader, a pair of a train and a val loader, or a LightningDataModule"


def no_loader(one: Any, wanted: str = _TRAINS, used: str = "trained on") -> str | None:
    """Return what is wrong with something in a loader's place: a clause, or ``None``.

    Args:
        one: What a client is given.
        wanted: What to write.
        used: What becomes of it.
    """
    kind = type(one).__name__
    if isinstance(one, LightningDataModule) or one is None:
        return None if one is not None else f"is None: write {wanted}"
    if checks.is_of_another_kind(one):
        return checks.why_not(one)
    table = kind == "Dataset" and type(one).__module__.startswith("datasets.")  # of Hugging Face
    if table or isinstance(one, torch.Tensor) or (isinstance(one, Dataset) and not isinstance(one, IterableDataset)):
        return f"is a {kind}, which would be {used} example by example: write DataLoader(..., batch_size=...)"
    iterable = hasattr(one, "__iter__") or hasattr(one, "__getitem__")
    return None if iterable and not isinstance(one, str) else f"is {checks.as_typed(one)}: write {wanted}"
