"""What the arguments of a FederatedTrainer come to: all checked together, sorted into the server's and the clients'."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed import checks
from lightning_fed.callbacks import RichRoundBar, RoundPrinter
from lightning_fed.callbacks.progress import is_terminal
from lightning_fed.client.local.work import ClientState, LocalOptions
from lightning_fed.engines import ENGINES, Engine, made
from lightning_fed.seeding import run_seed
from lightning_fed.server import arguments
from lightning_fed.server.inputs import Settings
from lightning_fed.values import by_round

Vectorize = bool | int | Literal["require"]
LocalEpochs = int | Sequence[int] | Callable[[int], int] | None


@dataclass
class Given:
    """The arguments of a ``FederatedTrainer`` as they were given.

    Attributes:
        trainer: Those of ``lightning.pytorch.Trainer``; all others have the names that the user knows.
    """

    max_rounds: int | None
    num_clients: int | None
    local_epochs: LocalEpochs
    local_steps: int | None
    engine: str | Engine
    num_workers: int | None
    clients_per_device: int | None
    vectorize_clients: Vectorize
    compile_clients: bool
    client_callbacks: list[Callback] | Callback | None
    client_state: ClientState
    local_validation: bool
    seed: int | None
    timeout: float
    max_examples: float
    client_storage: str | os.PathLike[str]
    callbacks: list[Callback] | Callback | None
    trainer: dict[str, Any]

    def numbers(self) -> dict[str, int | None]:
        """Return those that count something, by name."""
        return {
            "max_rounds": self.max_rounds,
            "num_clients": self.num_clients,
            "local_epochs": 1 if by_round.changes(self.local_epochs) else cast(int | None, self.local_epochs),
            "local_steps": self.local_steps,
            "num_workers": self.num_workers,
            "clients_per_device": self.clients_per_device,
        }


@dataclass
class RunPlan:
    """What a trainer runs.

    Attributes:
        callbacks: Those of the server, with a progress bar unless none is wanted.
        server: Arguments for the server's own ``Trainer``, but for its callbacks.
        local: What all local fits have in common.
        engine: Where clients run.
        num_clients: Short for an IID partition.
        vectorize: How many clients to train at once, as ``vectorize_clients=`` was given.
        compiles: Whether to compile their step.
        settings: What all fits have in common.
        dev_run: The rounds of a ``fast_dev_run``, or 0.
    """

    callbacks: list[Callback]
    server: dict[str, Any]
    local: LocalOptions
    engine: Engine
    num_clients: int | None
    vectorize: Vectorize
    compiles: bool
    settings: Settings
    dev_run: int


def resolve(given: Given) -> RunPlan:
    """Return what the arguments come to; say where some have less effect than one might think.

    Raises:
        ConfigurationError: If arguments contradict each other or have no meaning in a federation; all faults together.
    """
    own, for_clients = checks.listed(given.callbacks), checks.listed(given.client_callbacks)
    _refuse(given, own, for_clients)
    if given.trainer.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in own):
        own.append(RichRoundBar() if is_terminal() else RoundPrinter())
    counts = {name: None if number is None else int(number) for name, number in given.numbers().items()}
    server, dev_run = dict(given.trainer), int(given.trainer.get("fast_dev_run") or 0)
    cuda = arguments.cuda_devices(server.get("accelerator", "auto"), server.get("devices", "auto"))
    epochs = _epochs(given.local_epochs, counts["max_rounds"])
    clients = arguments.take_client_arguments(server, cuda, epochs if isinstance(epochs, int) else max(epochs))
    server["max_epochs"] = -1 if counts["max_rounds"] is None else counts["max_rounds"]
    if dev_run:
        epochs, counts["local_steps"] = 1, None
        told = True if dev_run == 1 else dev_run  # as Lightning's own attribute
        clients |= {"fast_dev_run": told, "limit_train_batches": dev_run, "limit_val_batches": dev_run}
    engine = made(given.engine, cuda, counts["num_workers"], counts["clients_per_device"] or 1)
    _choose_device(engine, cuda, given.trainer.get("devices", "auto"), clients)
    local = LocalOptions(
        trainer=clients,
        epochs=None if counts["local_steps"] else epochs,
        epochs_by=getattr(given.local_epochs, "__qualname__", None),
        steps=counts["local_steps"],
        callbacks=for_clients,
        client_state=given.client_state,
        local_validation=given.local_validation,
    )
    seed, max_clients = int(run_seed(given.seed)), 2 if dev_run else None
    folder = None if given.client_storage == "memory" else Path(given.client_storage).absolute()
    settings = Settings(seed, given.timeout, given.max_examples, max_clients, folder)
    arguments.say_what_is_logged(server.get("log_every_n_steps"))
    how = given.vectorize_clients, given.compile_clients
    return RunPlan(own, server, local, engine, counts["num_clients"], *how, settings, dev_run)


def _epochs(given: LocalEpochs, rounds: int | None) -> int | tuple[int, ...]:
    """Return the local epochs of a round, or those of each, of which the last goes on."""
    if not by_round.changes(given):
        return int(cast(int | None, given) or 1)
    rounds = len(given) if isinstance(given, Sequence) else rounds or 1
    return by_round.table("FederatedTrainer(local_epochs=...)", given, rounds, *arguments.EPOCHS)


def _refuse(given: Given, callbacks: list[Any], client_callbacks: list[Any]) -> None:
    numbers, trainer = given.numbers(), given.trainer
    arguments.refuse(
        arguments.unknown_faults(trainer, [field.name for field in fields(given) if field.name != "trainer"]),
        arguments.refusals(trainer),
        arguments.placement_faults(callbacks, client_callbacks, given.num_clients),
        arguments.limit_faults(numbers, endless=bool(trainer.get("max_time") or trainer.get("fast_dev_run"))),
        arguments.epochs_faults(given.local_epochs, numbers["max_rounds"]),
        checks.number_faults({"seed": given.seed}),
        checks.positive_faults("timeout", given.timeout, "a number of seconds above 0"),
        checks.positive_faults("max_examples", given.max_examples, "a number above 0; float('inf') is no limit"),
        checks.path_faults("client_storage", given.client_storage, '"memory", or a folder'),
        checks.switch_faults({"compile_clients": given.compile_clients, "local_validation": given.local_validation}),
        arguments.engine_faults(given.engine, ENGINES, numbers),
        arguments.vectorize_faults(given.vectorize_clients, given.compile_clients is True, given.engine),
        arguments.choice_faults("client_state", given.client_state, get_args(ClientState)),
    )


def _choose_device(engine: Engine, cuda: list[int], devices: Any, clients: dict[str, Any]) -> None:
    """Write into the clients' arguments which CUDA device they use, where the engine decides that."""
    if cuda and engine.shows_one_device:
        clients["devices"] = [0]
    elif engine.uses_first_device and len(cuda) > 1 and devices != "auto":
        rank_zero_warn(
            f"devices={devices!r}: clients train in this process one after the other, on cuda:{cuda[0]}. Write"
            " engine='processes' to use all."
        )
