"""Which of the Trainer's arguments goes to the server, which to the clients, and which is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from flwr.serverapp.strategy import Strategy
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import Accelerator, CUDAAccelerator
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_fed import checks
from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.checks import number_faults
from lightning_fed.engines import ENGINES, Engine
from lightning_fed.errors import ConfigurationError
from lightning_fed.server import owners, placement
from lightning_fed.values import by_round

CLIENTS = (
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "limit_train_batches",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
)
BOTH = (
    "accelerator",
    "devices",
    "precision",
    "deterministic",
    "benchmark",
    "detect_anomaly",
    "inference_mode",
    "plugins",
)

# Argument -> (the values that say nothing, what to write instead).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_epochs": (
        (None,),
        "A federation counts rounds: write max_rounds={0}, and local_epochs= for a client's epochs",
    ),
    "max_steps": (
        (-1, None),
        "A federation counts rounds: write max_rounds=, and local_steps={0} for a client's steps",
    ),
    "min_steps": ((None, 0), "A federation counts rounds: write min_epochs={0}, which here counts them"),
    "strategy": (("auto", None), "Clients are not processes of one training: leave strategy out and choose an engine="),
    "num_nodes": ((1, None), "One machine runs the server: leave num_nodes out"),
    "val_check_interval": (
        (None, 1.0),
        "The server validates after rounds: write check_val_every_n_epoch={0} for every"
        " n-th round, and local_validation=True to validate in local fits",
    ),
    "barebones": ((False, None), "Rounds need checkpoints and metrics: leave barebones out"),
    "sync_batchnorm": ((False, None), "A client trains on one device: leave sync_batchnorm out"),
}


def refusals(arguments: dict[str, Any]) -> list[str]:
    """Return a sentence for each argument that a federation cannot take."""
    faults = []
    for name, (silent, instead) in REFUSED.items():
        value = arguments.get(name)
        if name not in arguments or any(value is v or value == v for v in silent):
            continue
        if name == "strategy" and isinstance(value, Strategy):
            kind = type(value).__name__
            faults.append(
                f"strategy={kind}(...) is a Flower strategy, which is a callback here: write"
                f" callbacks=[FlowerStrategy({kind}(...))]."
            )
            continue
        number = value if checks.is_number(value, whole=True) else "n"
        faults.append(f"{name}={value!r} is not for a FederatedTrainer. {instead.format(number)}.")
    return faults + _accumulation_faults(arguments.get("accumulate_grad_batches"))


def unknown_faults(given: dict[str, Any], own: Sequence[str]) -> list[str]:
    """Return a sentence if there are arguments that nobody knows.

    Args:
        given: Those that are not the federation's own, by name.
        own: The names of the federation's.
    """
    theirs = inspect.signature(Trainer).parameters.keys() - {"callbacks", *REFUSED}
    unknown = [name for name in given if name not in theirs and name not in REFUSED]
    if not unknown:
        return []
    written = ", ".join(f"{name}={given[name]!r}" for name in unknown)
    return [
        f"{written}: a FederatedTrainer does not know {'these' if len(unknown) > 1 else 'this'}. It takes"
        f" {', '.join(own)}, and of a Trainer's arguments {', '.join(sorted(theirs))}."
    ]


def _accumulation_faults(value: Any) -> list[str]:
    if value is None or (checks.is_number(value, whole=True) and value >= 1):
        return []
    instead = "write a whole number, at least 1"
    if isinstance(value, dict):
        instead = (
            f"write client_callbacks=[GradientAccumulationScheduler({value!r})] for a number that changes by epoch"
        )
    return [f"accumulate_grad_batches={value!r}: {instead}."]


def refuse(*found: Sequence[str]) -> None:
    """Report all faults together.

    Raises:
        ConfigurationError: If there are any.
    """
    faults = [fault for some in found for fault in some]
    if faults:
        raise ConfigurationError("FederatedTrainer cannot start:\n" + "\n".join(f"  - {fault}" for fault in faults))


def take_client_arguments(arguments: dict[str, Any], cuda: list[int], local_epochs: int) -> dict[str, Any]:
    """Take the clients' arguments out of ``arguments``, which then are the server's, and return them.

    A server trains nothing: what steers training is the clients' alone, what steers numerics is for both.

    Args:
        arguments: Those of a ``Trainer``, by name.
        cuda: The CUDA devices that they ask for.
        local_epochs: The epochs of a client in a round; the most where they change.
    """
    for name in REFUSED:
        arguments.pop(name, None)
    # The server's fit has one device, and so has each client's.
    custom = isinstance(arguments.get("accelerator"), Accelerator)
    arguments["devices"] = cuda[:1] or (arguments.get("devices", "auto") if custom else 1)
    clients = {name: arguments.pop(name) for name in CLIENTS if name in arguments}
    clients.update({name: arguments[name] for name in BOTH if name in arguments})
    if clients.get("plugins") is not None:  # clients save no checkpoints
        plugins = clients["plugins"] if isinstance(clients["plugins"], Iterable) else [clients["plugins"]]
        clients["plugins"] = [plugin for plugin in plugins if not isinstance(plugin, CheckpointIO)]
    if every := clients.get("reload_dataloaders_every_n_epochs"):  # the server's are validation loaders
        arguments["reload_dataloaders_every_n_epochs"] = max(1, every // local_epochs)
    return clients


def cuda_devices(accelerator: str | Accelerator, devices: Any) -> list[int]:
    """Return the CUDA devices asked for, by index; none if something else was asked for.

    Args:
        accelerator: As ``Trainer`` takes it.
        devices: As ``Trainer`` takes it.
    """
    if accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available()):
        return CUDAAccelerator.parse_devices(-1 if devices == "auto" else devices) or []
    return []


def placement_faults(callbacks: Sequence[Any], client_callbacks: Sequence[Any], num_clients: int | None) -> list[str]:
    """Return a sentence for each callback that is none, is in the wrong place, or decides what another one decides.

    Args:
        callbacks: What was given for the server.
        client_callbacks: What was given for the clients.
        num_clients: Short for an IID partition.
    """
    own, local = ([c for c in given if isinstance(c, Callback)] for given in (callbacks, client_callbacks))
    return [
        *checks.callback_faults("callbacks", callbacks),
        *checks.callback_faults("client_callbacks", client_callbacks),
        *placement.misplaced(own, local),
        *owners.owner_faults([callback for callback in own if isinstance(callback, FederatedCallback)], num_clients),
    ]


def say_what_is_logged(steps: int | None) -> None:
    """Say of ``log_every_n_steps`` that the server, to whom a round is a step, logs every round.

    Args:
        steps: What the user gave.
    """
    if steps is not None and steps > 1:
        rank_zero_info(
            f"log_every_n_steps={steps} counts a client's steps, which are not logged one by one: the server logs every"
            " round."
        )


def engine_faults(engine: object, known: Iterable[str], numbers: dict[str, int | None]) -> list[str]:
    """Return a sentence for each fault in ``engine=`` and what goes with it.

    Args:
        engine: A name or an ``Engine``.
        known: The names that there are.
        numbers: As in ``faults``, with ``num_workers`` and ``clients_per_device``.
    """
    found = []
    if inspect.isclass(engine):
        found.append(f"engine={engine.__name__} is a class: write {engine.__name__}().")
    elif engine not in (known := sorted(known)) and not isinstance(engine, Engine):
        found.append(f"engine={engine!r} is unknown: write one of {known}, or pass an Engine.")
    for name in ("num_workers", "clients_per_device"):
        if numbers[name] is not None and engine not in ("processes", "ray"):
            found.append(
                f"{name}={numbers[name]} is for engine='processes' and engine='ray': write one of them, or leave {name}"
                " out."
            )
    return found


def choice_faults(name: str, value: object, known: Iterable[str]) -> list[str]:
    """Return a sentence if an argument is none of the words that it may be."""
    return [] if value in (words := tuple(known)) else [f"{name}={value!r} is unknown: write one of {words}."]


def vectorize_faults(vectorize: object, compiles: bool, engine: object) -> list[str]:
    """Return a sentence for each fault in ``vectorize_clients=`` and ``compile_clients=``, with this ``engine=``."""
    if vectorize is False:
        alone = "compile_clients=True compiles vectorized clients: write vectorize_clients=True, too."
        return [alone] if compiles else []
    counts = isinstance(vectorize, int) and vectorize > 1
    if not (vectorize is True or vectorize == "require" or counts):
        return [f"vectorize_clients={vectorize!r}: write True, 'require', or how many at once, at least 2."]
    made = ENGINES.get(engine) if isinstance(engine, str) else engine
    if not getattr(made, "can_vectorize", True):
        return [
            "vectorize_clients= is for engine='in_process' and engine='processes'; with this engine each client trains"
            " by itself."
        ]
    return []


# What is good for the local epochs of a round.
EPOCHS: tuple[Callable[[float], bool], str] = (lambda number: number >= 1, "a whole number, at least 1")


def epochs_faults(given: Any, rounds: int | None) -> list[str]:
    """Return a sentence for each fault in local epochs by round; ``limit_faults`` looks at one number for all."""
    if callable(given) and (not isinstance(rounds, Integral) or rounds < 1):
        return ["local_epochs= is a function of the round: say how many rounds there are, max_rounds=10."]
    found = by_round.faults("local_epochs", given, *EPOCHS, whole=True) if by_round.changes(given) else []
    return [f"{fault}." for fault in found]


def limit_faults(numbers: dict[str, int | None], endless: bool) -> list[str]:
    """Return a sentence for each fault in the numbers that ``FederatedTrainer`` takes.

    Args:
        numbers: ``max_rounds``, ``num_clients``, ``local_epochs``, ``local_steps``, ``num_workers`` and
            ``clients_per_device``, ``None`` where not given.
        endless: Whether something else limits the run.
    """
    found = number_faults(numbers)
    if numbers["max_rounds"] is None and not endless:
        found.append("Say how long to train: max_rounds=10, or max_rounds=-1 with max_time= or EarlyStopping.")
    if numbers["local_epochs"] is not None and numbers["local_steps"] is not None:
        found.append("local_epochs= and local_steps= contradict each other: keep one.")
    for name, value in numbers.items():
        if isinstance(value, Integral) and value < 1 and not (name == "max_rounds" and value == -1):
            found.append(f"{name}={value} must be at least 1.")
    return found
