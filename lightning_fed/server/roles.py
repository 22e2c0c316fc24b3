"""Who of a trainer's callbacks does what: kept up to date, wherever a callback came from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.callbacks.learning_rates import LearningRates
from lightning_fed.client.local.work import LocalOptions
from lightning_fed.server import arguments, owners, placement
from lightning_fed.server.callback_views import TrainsOnClients, views_of
from lightning_fed.views import viewed_as


class Roles:
    """The callbacks of one trainer: those that decide something, those that act at the server, those of the clients.

    Callbacks join the list after the trainer is made, too: appended, by entry points, or from the module's own
    ``configure_callbacks``.

    Args:
        callbacks: Those that the user gave.
        options: Those of local fits, which this keeps up to date; its callbacks are the user's for the clients.
        num_clients: Short for an IID partition.
    """

    def __init__(self, callbacks: Sequence[Callback], options: LocalOptions, num_clients: int | None) -> None:
        self._options, self._num_clients = options, num_clients
        self._for_clients = list(options.callbacks)
        self._of_module: list[Callback] = []
        self._moved: list[Callback] = []
        self._federated: list[FederatedCallback] | None = None
        self.owners: owners.Owners
        self.views = ExitStack()
        self.adopt(callbacks)

    def without_moved(self, callbacks: Sequence[Callback]) -> list[Callback]:
        """Return the list before a fit: without what an earlier one added to it for the clients of another module."""
        return [callback for callback in callbacks if callback not in self._moved]

    def misplaced(self, callbacks: Sequence[Callback]) -> list[str]:
        """Return a sentence for each callback that came to the list since and cannot do its work there."""
        return placement.misplaced([callback for callback in callbacks if callback not in self._of_module], ())

    def adopt(self, callbacks: Sequence[Callback]) -> None:
        """Take up the callbacks that are in the list by now.

        Raises:
            ConfigurationError: If two federated ones want to decide the same.
        """
        federated = [callback for callback in callbacks if isinstance(callback, FederatedCallback)]
        if federated != self._federated:
            arguments.refuse(owners.owner_faults(federated, self._num_clients))
            self._federated, self.owners = federated, owners.build(federated, self._num_clients)
        monitors = [callback for callback in callbacks if isinstance(callback, LearningRateMonitor)]
        training = self.owners.training()
        methods = {**training, **({"learning rates": LearningRates(monitors)} if monitors else {})}
        self._options.method_callbacks = partial(owners.local_callbacks, methods)
        passes = any(method.pass_before() for method in training.values())
        self._options.pass_before = partial(owners.pass_callbacks, training) if passes else None
        second = self.owners.of_a_second_fit()
        self._options.second_fit = second[0].second_fit if second else None

    def begin(self, callbacks: Sequence[Callback]) -> None:
        """Begin the server's fit; the list of its callbacks is whole."""
        self.adopt(callbacks)
        for callback in callbacks:
            for view in views_of(callback):
                self.views.enter_context(viewed_as(callback, view))
        for said in placement.once_a_round([c for c in callbacks if c not in self._of_module]):
            rank_zero_warn(said)

    def place(self, given: Sequence[Callback]) -> list[Callback]:
        """Return which of the callbacks that the module's ``configure_callbacks`` gave are for the server.

        Those that act on training have copies on the clients; at the server they validate, test and predict.
        """
        self._of_module = list(given)
        stay = [callback for callback in given if not placement.is_local(callback)]
        for callback in self.move(given):
            if callback in stay:
                self.views.enter_context(viewed_as(callback, TrainsOnClients))
        return stay

    def move(self, given: Sequence[Callback]) -> list[Callback]:
        """Give the clients copies of those of the module's callbacks that act on training, and tell which."""
        moved = [callback for callback in given if placement.acts_on_clients(callback)]
        # As in Lightning, they take the place of the user's of their kind.
        kept = [c for c in self._for_clients if not any(isinstance(one, type(c)) for one in moved)]
        self._options.callbacks, self._moved = [*kept, *moved], moved
        self._options.module_callbacks = len(moved)
        return moved
