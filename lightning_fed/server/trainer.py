"""A Trainer as the server's views, its federation and its callbacks need it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed._compat.lightning import results_of, shown_metrics
from lightning_fed.callbacks.base import CLIENT_METRICS
from lightning_fed.client.local.logged import use_logged_values
from lightning_fed.server.client_results import ClientResults
from lightning_fed.server.client_tests import each_on_its_own
from lightning_fed.server.exchange import About
from lightning_fed.server.federation import Federation
from lightning_fed.server.owners import Owners
from lightning_fed.server.roles import Roles
from lightning_fed.values.data import ClientLoaders
from lightning_fed.values.metrics import logged_names
from lightning_fed.wire.checkpoint_file import is_there


class ServerTrainer(Trainer):
    """What the server's fit asks its trainer for, beyond Lightning.

    Attributes:
        federation: What one fit holds together.
        seems_automatic: Whether the server seems to optimize automatically. It steps by hand; while a callback must not
            know, this is true.
    """

    callbacks: list[Callback]
    log_every_n_steps: int
    federation: Federation
    seems_automatic = False
    _roles: Roles
    _names_of_clients: frozenset[str] = frozenset()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._shown: dict[str, dict[str, bool | None]] = {}
        super().__init__(*args, **kwargs)
        use_logged_values(self)

    @property
    def owners(self) -> Owners:
        """Who decides what in the run."""
        return self._roles.owners

    @property
    def current_round(self) -> int:
        """The round that runs, or that would run next, from 1."""
        return self.current_epoch + 1

    @property
    def num_clients(self) -> int:
        """How many clients the run has, from ``on_federation_start`` on."""
        return self.federation.session.num_clients

    def node_of(self, client: int) -> int:
        """Return a client's address in the run: the ``src_node_id`` of its replies, where a strategy reads them."""
        return self.federation.session.rounds.roster.node_of(client)

    @property
    def personal(self) -> frozenset[str]:
        """The module's names of the parameters that are each client's own, from ``on_federation_start`` on."""
        return self.federation.session.staying.personal_parameters

    def personal_module(self, client: int) -> LightningModule:
        """Return a copy of the module with a client's own tensors in it (``Personal``), and the others' as they are.

        During a fit or after it. A client that has not trained yet has none: its module is the server's.

        Raises:
            ConfigurationError: If there has been no fit, there is no such client, or it is somewhere else.
        """
        return self.federation.personal_module(client)

    def client_data(self, client: int) -> ClientLoaders:
        """Return what a client trains on (``train``) and evaluates on (``val``): loaders, or its ``datamodule``.

        During a fit or after it. The loaders are made anew: those of ``Partition``, over the client's own examples, or
        what ``ClientData`` gives. What is not there is ``None``.

        Raises:
            ConfigurationError: If there has been no fit, there is no such client, or clients are elsewhere.
        """
        return self.federation.client_data(client, max(1, self.global_step))

    def save_personal_modules(self, folder: str | os.PathLike[str]) -> None:
        """Save what each client has of its own, and once what all share, for ``lightning_fed.load_personal_module``.

        During a fit or after it. A client that has nothing of its own yet is not in the folder. An earlier save in the
        folder is replaced as a whole, once all of the new one is written. Clients are read one after the other.

        Raises:
            ConfigurationError: If there has been no fit, no client has anything of its own, the folder cannot be
                written, or clients are elsewhere.
        """
        self.federation.save_personal_modules(folder)

    def test_clients(
        self,
        clients: Iterable[int] | int | None = None,
        dataloaders: Callable[[int], Any] | Sequence[Any] | None = None,
    ) -> ClientResults:
        """Test each client's own model on the client's own data, after ``fit``; ``test_step`` is the module's.

        A client's model is that of ``personal_module``. Its data is what its datamodule gives as ``test_dataloader``
        (``ClientData``), else what is held out of its own (``Partition(val_fraction=...)``, the second of a pair). A
        client without any is left out, and named. ``accelerator``, ``precision``, ``limit_test_batches`` and the like
        are the trainer's; client callbacks hear of it. The module is as before afterwards.

        Args:
            clients: Some of them, by number; all by default.
            dataloaders: Other data to test on: for each client a loader, a list of loaders, a datamodule, or ``None``
                for none; a list of them, by client, or a function of a client's index.

        Raises:
            ConfigurationError: If there has been no fit, the module has no ``test_step``, no client has data to test
                on, or clients are elsewhere.
        """
        return each_on_its_own(self, clients, dataloaders)

    @property
    def global_step(self) -> int:
        """How many times the server has taken new weights over. Also after ``fit``, when the view is off."""
        return self.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed

    @property
    def clients_validate(self) -> bool:
        """Whether the round's validation is the clients': they evaluated, and the server has nothing to validate on."""
        batches = self.num_val_batches
        at_server = sum(batches) if isinstance(batches, list) else batches
        return not at_server and any(name.startswith(CLIENT_METRICS) for name in self.round_metrics)

    @property
    def round_about(self) -> About:
        """What is known of the names of the last round's metrics."""
        return self.federation.about

    @property
    def round_metrics(self) -> dict[str, float]:
        """What the clients of the last round gave, by the names that it is logged under."""
        return self.federation.metrics

    @contextmanager
    def logging_every_round(self) -> Iterator[None]:
        """Log every round in the block, a fit, unless the user wants nothing logged of training.

        Outside of fits ``log_every_n_steps`` counts batches of ``validate``, ``test`` and ``predict``, as in Lightning.
        """
        every = self.log_every_n_steps
        self.log_every_n_steps = min(1, every)
        try:
            yield
        finally:
            self.log_every_n_steps = every

    def where_shown(self, name: str) -> dict[str, bool | None]:
        """Return whether a name goes to the progress bar and to loggers, as arguments of ``log``.

        As in the first round that has it, for Lightning does not allow that one name is logged in two ways. ``None`` is
        its default for loggers: to those that there are.
        """
        about = self.round_about
        # Where nobody chose for the bar, it shows all: a round is long.
        bar = name in about.on_bar or not about.on_bar
        return self._shown.setdefault(name, {"prog_bar": bar, "logger": False if name in about.unlogged else None})

    def forget_earlier(self, names: Iterable[str], evaluated: bool) -> None:
        """Forget what clients logged in earlier rounds under names that this round has not.

        Lightning keeps each value until the next of its name. Clients' evaluation stays for rounds without one, as the
        server's validation does.

        Args:
            names: The round's.
            evaluated: Whether clients have evaluated in it.
        """
        now = frozenset(names)
        earlier = self._names_of_clients - now
        gone = {name for name in earlier if evaluated or not name.startswith(CLIENT_METRICS)}
        self._names_of_clients = now | (earlier - gone)
        for kept in shown_metrics(self):
            for name in gone & kept.keys():
                del kept[name]

    def claim_names(self) -> None:
        """Claim for the server what its validation has just logged; called by the server view of the module."""
        self._names_of_clients -= logged_names(results_of(self))

    def run_round(self) -> None:
        """Run one round; called by the server view of the module."""
        self.federation.run_round()

    def apply_weights(self) -> None:
        """Take the server optimizer's step; called by the server view of the module."""
        self.federation.apply_weights()

    def save_checkpoint(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Do as ``Trainer.save_checkpoint``; in the middle of a round it saves what the round began with.

        A run that fails before it began, or went on, leaves a file that is there as it is.
        """
        if not self.federation.has_begun and is_there(filepath):
            rank_zero_warn(f"{filepath} stays as it is: the run has not begun, and there is nothing to save of it.")
            return
        with self.federation.saving(str(filepath)):
            super().save_checkpoint(filepath, *args, **kwargs)

    def place_callbacks(self, given: Sequence[Callback]) -> list[Callback]:
        """Return which of the module's own callbacks are for the server; called by the server view of the module."""
        return self._roles.place(given)

    def adopt_callbacks(self) -> None:
        """Adopt the module's own callbacks, which have joined the list; called by the federation."""
        self._roles.begin(self.callbacks)
        self.federation.owners = self.owners
