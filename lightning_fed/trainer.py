"""FederatedTrainer: wires callbacks, hands the server's main function to the engine."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Unpack

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.compile import from_compiled

from lightning_fed import checks
from lightning_fed._compat.signatures import signatures_known
from lightning_fed._compat.torch import OptimizedModule
from lightning_fed.client.app import build_client_app
from lightning_fed.client.local.work import ClientState
from lightning_fed.client.side import ClientSide
from lightning_fed.client.vectorized.compiled_step import CompiledStep
from lightning_fed.client.vectorized.dispatch import Dispatcher
from lightning_fed.engines import Engine
from lightning_fed.errors import FederationError
from lightning_fed.seeding import seed_for, seeded
from lightning_fed.server import arguments, placement
from lightning_fed.server.alone import alone
from lightning_fed.server.deal import Deal, own_data
from lightning_fed.server.environment import defaults_from_environment, taken_from_environment
from lightning_fed.server.federation import Federation
from lightning_fed.server.plan import Given, LocalEpochs, resolve
from lightning_fed.server.roles import Roles
from lightning_fed.server.rounds import quiet_flower
from lightning_fed.server.trainer import ServerTrainer
from lightning_fed.server.view import RoundLoader, ServerView
from lightning_fed.server.wording import speaking_of_rounds
from lightning_fed.tracebacks import shorten
from lightning_fed.values.data import gathering
from lightning_fed.views import viewed_as
from lightning_fed.wire.checkpoint_file import explain_errors

if TYPE_CHECKING:
    from lightning_fed.site.join import Joining


@dataclass
class _Task:
    """What one call of ``fit`` works on."""

    module: LightningModule
    datamodule: LightningDataModule | None
    val_dataloaders: Any
    deal: Deal
    side: ClientSide


class FederatedTrainer(ServerTrainer):
    """A Lightning Trainer whose epochs are federated rounds: the same LightningModule, trained by many clients.

    Callbacks, loggers, checkpoints, ``max_time`` and validation act at the server, per round; gradient clipping,
    accumulation and ``limit_train_batches`` act in the clients' local fits; accelerator and precision in both.

    >>> from torch.utils.data import DataLoader
    >>> from lightning_fed.testing import ToyModule, toy_data
    >>> quiet = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    >>> trainer = FederatedTrainer(max_rounds=2, num_clients=3, logger=False, **quiet)
    >>> trainer.fit(ToyModule(), DataLoader(toy_data(24), batch_size=8))
    """

    @defaults_from_environment
    def __init__(
        self,
        *,
        max_rounds: int | None = None,
        num_clients: int | None = None,
        local_epochs: LocalEpochs = None,
        local_steps: int | None = None,
        engine: str | Engine = "in_process",
        num_workers: int | None = None,
        clients_per_device: int | None = None,
        vectorize_clients: bool | int | Literal["require"] = False,
        compile_clients: bool = False,
        client_callbacks: list[Callback] | Callback | None = None,
        client_state: ClientState = "global",
        local_validation: bool = False,
        seed: int | None = None,
        timeout: float = 3600.0,
        max_examples: float = 1e9,
        client_storage: str | os.PathLike[str] = "memory",
        callbacks: list[Callback] | Callback | None = None,
        **kwargs: Any,
    ) -> None:
        """Set a federation up; nothing is trained before ``fit``.

        Args:
            max_rounds: How many rounds to train; -1 for no limit (with ``max_time`` or ``EarlyStopping``).
            num_clients: Short for ``Partition(num_clients)``, an IID partition of the train set.
            local_epochs: How many epochs a client trains in a round; 1 by default. A list has one number for each
                round, of which the last goes on; a function gives that of a round, from 1.
            local_steps: How many optimizer steps a client trains in a round, in place of ``local_epochs``.
            engine: Where clients run: ``"in_process"``, one after the other; ``"processes"``, several at a time on all
                cores; ``"ray"``, in actors of a Ray cluster; or an ``Engine``, ``engines.SuperLink(...)`` over a
                network.
            num_workers: How many processes or actors these start; by default one for each core, on CUDA
                ``clients_per_device`` for each device.
            clients_per_device: How many clients they train at a time on one CUDA device; 1 by default.
            vectorize_clients: Vectorize clients, their weights stacked, where module and callbacks allow for it: at
                most so many at once, or ``True`` for a number that fits memory, and only where that is expected to be
                faster. Else clients train one after the other, and one line says why; with ``"require"`` that is an
                error.
            compile_clients: Compile the step of vectorized clients; takes some seconds at the run's start.
            client_callbacks: Lightning callbacks for the clients' trainers; each local fit gets copies.
            client_state: ``"global"`` begins each round with new optimizers and with schedules where one long local fit
                would be, ``"carry"`` keeps optimizers and schedules with the client, ``"reset"`` begins both anew.
            local_validation: Validate in local fits, on the client's held-out part.
            seed: The run's seed; by default that of ``seed_everything``, else 0.
            timeout: Seconds to wait for the replies of one stage of a round.
            max_examples: More examples than any client has: one that reports more has failed.
            client_storage: Where simulated clients keep what they keep: ``"memory"``, or a folder for more than that
                holds.
            callbacks: Lightning callbacks for the server, and federated ones.
            **kwargs: The other arguments of ``lightning.pytorch.Trainer``.

        Raises:
            ConfigurationError: If arguments contradict each other or have no meaning in a federation; all faults
                together.
        """
        plan = resolve(
            Given(
                max_rounds=max_rounds,
                num_clients=num_clients,
                local_epochs=local_epochs,
                local_steps=local_steps,
                engine=engine,
                num_workers=num_workers,
                clients_per_device=clients_per_device,
                vectorize_clients=vectorize_clients,
                compile_clients=compile_clients,
                client_callbacks=client_callbacks,
                client_state=client_state,
                local_validation=local_validation,
                seed=seed,
                timeout=timeout,
                max_examples=max_examples,
                client_storage=client_storage,
                callbacks=callbacks,
                trainer=kwargs,
            )
        )
        self.engine, self.seed, self.local_options = plan.engine, plan.settings.seed, plan.local
        self._vectorize, self._compile = plan.vectorize, plan.compiles
        self._roles = Roles(plan.callbacks, plan.local, plan.num_clients)
        self.federation = Federation(self.owners, plan.settings)
        kwargs = plan.server  # by this name, for LightningCLI reads here that a Trainer's arguments are ours, too
        with taken_from_environment(type(self)), speaking_of_rounds(clients_validate=False):
            super().__init__(callbacks=[self.federation, *plan.callbacks], **kwargs)
        plan.local.trainer["default_root_dir"] = self.default_root_dir
        self.strategy.process_dataloader = gathering  # type: ignore[assignment, method-assign]
        explain_errors(self)
        if plan.dev_run:  # Lightning's own makes n batches of it; here they are n rounds
            self.fit_loop.max_epochs, self.fit_loop.epoch_loop.max_steps = plan.dev_run, -1
        if isinstance(self.precision_plugin, MixedPrecision):
            self.precision_plugin.scaler = None  # the server has no gradients to scale

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train the module over the clients; arguments as in ``Trainer.fit``.

        The train data is dealt out among the clients, the validation data is the server's. ``ckpt_path`` resumes a run:
        its end is that of a run never interrupted, bit for bit.

        Raises:
            ConfigurationError: If module, data and callbacks do not fit together; before anything is trained.
            ClientError: If a client fails and no ``FaultTolerance`` allows for it.
            RoundError: If a round has too few good replies, or gives no usable weights.
        """
        task = self._task(model, train_dataloaders, val_dataloaders, datamodule)
        try:
            self.engine.run(
                lambda grid: self._fit_on(grid, task, ckpt_path, weights_only, self.engine.name),
                build_client_app(task.side),
                lambda: self.owners.partition.num_clients,
            )
        except FederationError as error:
            raise shorten(error)  # noqa: B904  it is the same error

    def server_app(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> ServerApp:
        """Return a Flower ServerApp that does as ``fit``, in any of Flower's runtimes; arguments as ``fit``."""
        task, app = self._task(model, train_dataloaders, val_dataloaders, datamodule), ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            self._fit_on(grid, task, ckpt_path, weights_only, f"Flower's {type(grid).__name__}")

        return app

    def client_app(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
    ) -> ClientApp:
        """Return the Flower ClientApp of ``fit``; the node config's ``partition-id`` says which client it is."""
        task = self._task(model, train_dataloaders, None, datamodule)
        return build_client_app(self._without_server(task))

    def join(
        self,
        address: str,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        *,
        client: int,
        **kwargs: Unpack[Joining],
    ) -> None:
        """Join a federation as one of its clients, and stay until Ctrl-C or SIGTERM.

        The server is a script that calls ``fit`` with ``engine=engines.SuperLink(...)``; both build the same module.
        The data given here is this site's own, and all of it is the client's; without any, a ``ClientData`` of the
        trainer gives it. What comes here is weights and numbers, and nothing is unpickled.

        Args:
            address: The SuperLink's ``"host:port"``.
            model, train_dataloaders, val_dataloaders, datamodule: As for ``fit``; ``val_dataloaders`` serves the
                client-side evaluation.
            client: Which client this is, from 0.
            **kwargs: Keys and folders, see ``lightning_fed.site.join.Joining``.

        Raises:
            ConfigurationError: If the SuperLink does not let it join, or there is no data.
        """
        task = self._task(model, None, None, None)
        side = self._without_server(task)
        task.deal.owner = own_data(datamodule or train_dataloaders, val_dataloaders, client, task.deal.owner)
        from lightning_fed.site.join import join  # and with it Flower's way to a SuperLink

        join(address, side, client, **kwargs)

    def _without_server(self, task: _Task) -> ClientSide:
        """Return what clients need where there is no server in the process, whose fit would ask for callbacks."""
        task.module.trainer = self
        given = checks.listed(task.module.configure_callbacks())
        task.module.trainer = None
        self._roles.move(given)
        self._roles.adopt([*self.callbacks, *given])
        side = task.side
        task.deal.owner = self.owners.partition
        side.mods, side.methods = self.owners.mods(), list(self.owners.training().values())
        side.is_set_up, side.dispatcher, side.staying_of = False, None, self.owners.staying
        return side

    def _task(self, model: Any, train: Any, val: Any, datamodule: LightningDataModule | None) -> _Task:
        module = from_compiled(model) if isinstance(model, OptimizedModule) else model
        arguments.refuse(checks.fit_faults(module, train, datamodule))
        # What came to the list of callbacks since it was made: appended, or by the Tuner.
        self.callbacks = self._roles.without_moved(self.callbacks)
        if faults := self._roles.misplaced(self.callbacks):  # the Tuner leaves them there
            self.callbacks = [c for c in self.callbacks if not placement.replaces_loop(c)]
            arguments.refuse(faults)
        self._roles.adopt(self.callbacks)
        if isinstance(train, LightningDataModule):
            train, datamodule = None, train
        deal = Deal(self.owners.partition, module, train, datamodule, self.seed, self.local_options)
        self.local_options.rounds = -1 if self.max_epochs is None else self.max_epochs
        side = ClientSide(module, self.local_options, deal, datamodule, is_set_up=True)
        if self._vectorize:
            compiled = CompiledStep() if self._compile else None
            side.dispatcher = Dispatcher(self._vectorize, compiled, self.engine.processes)
        return _Task(module, datamodule, val, deal, side)

    def _fit_on(self, grid: Grid, task: _Task, ckpt_path: Any, weights_only: bool | None, engine: str) -> None:
        """Lightning's own fit over the server views."""
        loaders = {"val_dataloaders": task.val_dataloaders, "datamodule": task.datamodule}
        if task.datamodule is None:
            loaders["train_dataloaders"] = RoundLoader()
        if weights_only is not None:  # an argument since Lightning 2.6
            loaders["weights_only"] = weights_only
        with ExitStack() as stack:
            stack.enter_context(alone())
            # What setup draws (a random split, layers) is the run's, too, and the same in every process.
            stack.enter_context(seeded(seed_for(self.seed, "setup")))
            stack.enter_context(quiet_flower())
            stack.enter_context(speaking_of_rounds(self.owners.partition.can_evaluate()))
            stack.enter_context(viewed_as(task.module, ServerView))
            stack.callback(self.federation.end)
            stack.enter_context(self._roles.views)
            stack.enter_context(self.logging_every_round())
            stack.enter_context(signatures_known())
            self.federation.begin(grid, task.deal, task.side, engine)
            super().fit(task.module, ckpt_path=ckpt_path, **loaders)
