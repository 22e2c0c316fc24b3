"""The tensors of methods: what goes to each client beside the weights, and what comes back, checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from lightning_fed.callbacks.base import ClientReport, FederatedCallback
from lightning_fed.client.local.method import of_method
from lightning_fed.errors import ClientError, FederationError, RoundError
from lightning_fed.tracebacks import words
from lightning_fed.values.weights import Weights, as_global, check_update, size_of
from lightning_fed.views import overrides
from lightning_fed.wire.extras import attach_methods
from lightning_fed.wire.messages import pack

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer

_HOOKS = ("tensors_to_client", "tensors_from_client")


class Methods:
    """The federated callbacks that have tensors.

    Args:
        named: All federated callbacks with a part in local training, by name.
        trainer: The server's trainer, handed to their hooks.
    """

    def __init__(self, named: Mapping[str, FederatedCallback], trainer: FederatedTrainer) -> None:
        self._trainer = trainer
        self._methods = {
            name: method
            for name, method in named.items()
            if any(overrides(method, FederatedCallback, hook) for hook in _HOOKS)
        }

    def states(self) -> dict[str, Any]:
        """Return copies of what these have in a checkpoint, by ``state_key``."""
        return {method.state_key: copy.deepcopy(method.state_dict()) for method in self._methods.values()}

    def to_client(self, round: int, client: int) -> Weights:
        """Return what goes to a client, by ``"method/name"``.

        Raises:
            RoundError: If a method raises, or gives something else.
        """
        sent: Weights = {}
        for name, method in self._methods.items():
            with _asking(name, "tensors_to_client", round, client):
                given = dict(method.tensors_to_client(self._trainer, round, client))
                for key, tensor in given.items():
                    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                        raise TypeError(f"{key!r} is a {type(tensor).__name__} and no (dense) tensor")
            sent.update({f"{name}/{key}": tensor for key, tensor in given.items()})
        return sent

    def check(self, round: int, client: int, sent: Weights, came: Weights) -> Weights:
        """Return what came of a client for its methods, in the order and the dtypes that they expect.

        Raises:
            ClientError: If it is not what has to come back.
            RoundError: If a method raises something else.
        """
        expected: Weights = {}
        for name, method in self._methods.items():
            with _asking(name, "tensors_expected", round, client):
                like = dict(method.tensors_expected(of_method(sent, name)))
            expected.update({f"{name}/{key}": tensor for key, tensor in like.items()})
        check_update(came, expected, "its method", "Every client must run the same callbacks.")
        came = as_global(came, expected)
        for name, method in self._methods.items():
            with _asking(name, "check_tensors", round, client, may_refuse=True):
                method.check_tensors(of_method(came, name))
        return came

    def take(self, round: int, report: ClientReport, came: Weights) -> None:
        """Give methods what came of a client.

        Raises:
            RoundError: If one raises.
        """
        for name, method in self._methods.items():
            with _asking(name, "tensors_from_client", round, report.client):
                method.tensors_from_client(self._trainer, round, report, of_method(came, name))


@contextmanager
def _asking(name: str, hook: str, round: int, client: int, may_refuse: bool = False) -> Iterator[None]:
    """Say of what a method raises in the block where that was; where it may refuse, a ``ClientError`` stays one."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FederationError) and (may_refuse or not isinstance(error, ClientError)):
            raise
        said = f"Round {round}: {name}.{hook}() failed for client {client}: {words(error)}"
        raise RoundError(said, round=round, client=client, stage="train") from error


class MethodTensors:
    """The tensors of methods in one round.

    Args:
        methods: Those of the run.
        round: The round.
    """

    def __init__(self, methods: Methods, round: int) -> None:
        self._methods, self._round = methods, round
        self._sent: dict[int, Weights] = {}

    def attach(self, messages: Sequence[Message], client_of: Callable[[int], int]) -> None:
        """Put each client's beside what the strategy sends it; the same tensors are one record."""
        records: dict[tuple[tuple[str, int], ...], ArrayRecord] = {}
        for message in messages:
            client = client_of(message.metadata.dst_node_id)
            self._sent[client] = sent = self._methods.to_client(self._round, client)
            if sent:
                key = tuple((name, id(tensor)) for name, tensor in sent.items())
                if key not in records:
                    # Copies: a method may write into its own before the last client has worked.
                    records[key] = pack({name: tensor.detach().clone().cpu() for name, tensor in sent.items()})
                attach_methods(message, records[key])

    def bytes_to(self, client: int) -> int:
        """Return how many bytes went to a client."""
        return size_of(self._sent[client])

    def take(self, report: ClientReport, came: Weights) -> None:
        """Check what came of a client, and give it to the methods; raises as ``Methods.check`` and ``Methods.take``."""
        came = self._methods.check(self._round, report.client, self._sent[report.client], came)
        self._methods.take(self._round, report, came)
