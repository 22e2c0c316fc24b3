"""Which of the Trainer's arguments goes to the server, which to the clients, and which is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.accelerators import Accelerator, CUDAAccelerator

from lightning_fed.callbacks.base import Decision, FederatedCallback
from lightning_fed.errors import ConfigurationError

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

# Callbacks that act on training, which happens on the clients.
_LOCAL = ("GradientAccumulationScheduler", "BaseFinetuning", "ModelPruning", "SpikeDetection")
_NOWHERE = ("StochasticWeightAveraging", "WeightAveraging", "LearningRateFinder", "BatchSizeFinder")


def refusals(arguments: dict[str, Any]) -> list[str]:
    """A sentence for each argument that a federation cannot take."""
    faults = []
    for name, (silent, instead) in REFUSED.items():
        if name in arguments and not any(arguments[name] is v or arguments[name] == v for v in silent):
            faults.append(
                f"{name}={arguments[name]!r} is not for a FederatedTrainer. {instead.format(arguments[name])}."
            )
    return faults


def refuse(*found: Sequence[str]) -> None:
    """Reports all faults together.

    Raises:
        ConfigurationError: If there are any.
    """
    faults = [fault for some in found for fault in some]
    if faults:
        raise ConfigurationError("FederatedTrainer cannot start:\n" + "\n".join(f"  - {fault}" for fault in faults))


def split(arguments: dict[str, Any], cuda: list[int], local_epochs: int) -> dict[str, Any]:
    """Takes the clients' arguments out of ``arguments``, which then are the server's, and returns them.

    A server trains nothing: what steers training is the clients' alone, what steers numerics is for both.

    Args:
        arguments: Those of a ``Trainer``, by name.
        cuda: The CUDA devices that they ask for.
        local_epochs: The epochs of a client in a round.
    """
    for name in REFUSED:
        arguments.pop(name, None)
    # The server's fit has one device, and so has each client's.
    custom = isinstance(arguments.get("accelerator"), Accelerator)
    arguments["devices"] = cuda[:1] or (arguments.get("devices", "auto") if custom else 1)
    clients = {name: arguments.pop(name) for name in CLIENTS if name in arguments}
    clients.update({name: arguments[name] for name in BOTH if name in arguments})
    if every := clients.get("reload_dataloaders_every_n_epochs"):  # the server's are validation loaders
        arguments["reload_dataloaders_every_n_epochs"] = max(1, every // local_epochs)
    return clients


def cuda_devices(accelerator: str | Accelerator, devices: Any) -> list[int]:
    """The CUDA devices asked for, by index; none if something else was asked for.

    Args:
        accelerator: As ``Trainer`` takes it.
        devices: As ``Trainer`` takes it.
    """
    if accelerator in ("cuda", "gpu") or (accelerator == "auto" and torch.cuda.is_available()):
        return CUDAAccelerator.parse_devices(-1 if devices == "auto" else devices) or []
    return []


def misplaced(callbacks: Sequence[Callback], client_callbacks: Sequence[Callback]) -> list[str]:
    """A sentence for each Lightning callback that cannot do its work where it was put."""
    faults = []
    for callback in callbacks:
        if _is_one_of(callback, _LOCAL):
            name = type(callback).__name__
            faults.append(f"{name} acts on training, which the clients do: write client_callbacks=[{name}(...)].")
    for callback in (*callbacks, *client_callbacks):
        if _is_one_of(callback, _NOWHERE):
            faults.append(
                f"{type(callback).__name__} takes over the training loop (an epoch of its own over the train loader, or"
                " trial steps), which a round cannot give it: leave it out."
            )
    for callback in client_callbacks:
        if isinstance(callback, FederatedCallback):
            faults.append(
                f"{type(callback).__name__} is a federated callback: write callbacks=[...], not client_callbacks."
            )
    return faults


def _is_one_of(callback: Callback, names: Sequence[str]) -> bool:
    return any(isinstance(callback, getattr(lightning_callbacks, name, ())) for name in names)


def engine_faults(engine: object, known: Iterable[str], numbers: dict[str, int | None]) -> list[str]:
    """A sentence for each fault in ``engine=`` and what goes with it.

    Args:
        engine: A name or an ``Engine``.
        known: The names that there are.
        numbers: As in ``faults``, with ``num_workers`` and ``clients_per_device``.
    """
    found = []
    if isinstance(engine, str) and engine not in known:
        found.append(f"engine={engine!r} is unknown: write one of {sorted(known)}, or pass an Engine.")
    for name in ("num_workers", "clients_per_device"):
        if numbers[name] is not None and engine not in ("processes", "ray"):
            found.append(
                f"{name}={numbers[name]} is for engine='processes' and engine='ray': write one of them, or leave {name}"
                " out."
            )
    return found


def choice_faults(name: str, value: object, known: Iterable[str]) -> list[str]:
    """A sentence if an argument is none of the words that it may be."""
    return [] if value in (words := tuple(known)) else [f"{name}={value!r} is unknown: write one of {words}."]


def vectorize_faults(vectorize: object, compiles: bool, on_ray: bool) -> list[str]:
    """A sentence for each fault in ``vectorize_clients=`` and ``compile_clients=``."""
    if vectorize is False:
        alone = "compile_clients=True compiles clients that are trained as one: write vectorize_clients=True, too."
        return [alone] if compiles else []
    counts = isinstance(vectorize, int) and vectorize > 1
    if not (vectorize is True or vectorize == "require" or counts):
        return [f"vectorize_clients={vectorize!r}: write True, 'require', or how many at once, at least 2."]
    if on_ray:
        return [
            "vectorize_clients= is for engine='in_process' and engine='processes'; Ray's actors train one at a time."
        ]
    return []


def owners_of(decision: Decision, callbacks: Sequence[FederatedCallback]) -> list[FederatedCallback]:
    """The callbacks that decide one thing; more than one is a fault."""
    return [callback for callback in callbacks if decision in callback.decides]


def double_owners(callbacks: Sequence[FederatedCallback]) -> list[str]:
    """A sentence for each thing that two callbacks want to decide."""
    faults = []
    for decision in ("partition", "cohort", "aggregation", "failures"):
        names = [type(callback).__name__ for callback in owners_of(decision, callbacks)]
        if len(names) > 1:
            faults.append(f"{' and '.join(names)} both decide the {decision}: keep one of them.")
    return faults


def faults(numbers: dict[str, int | None], federated: Sequence[FederatedCallback], endless: bool) -> list[str]:
    """A sentence for each fault in the arguments of ``FederatedTrainer``'s own.

    Args:
        numbers: ``max_rounds``, ``num_clients``, ``local_epochs``, ``local_steps``, ``num_workers`` and
            ``clients_per_device``, ``None`` where not given.
        federated: The federated callbacks.
        endless: Whether something else limits the run.
    """
    found = []
    if numbers["max_rounds"] is None and not endless:
        found.append("Say how long to train: max_rounds=10, or max_rounds=-1 with max_time= or EarlyStopping.")
    if numbers["local_epochs"] is not None and numbers["local_steps"] is not None:
        found.append("local_epochs= and local_steps= contradict each other: keep one.")
    for name, value in numbers.items():
        if value is not None and value < 1 and not (name == "max_rounds" and value == -1):
            found.append(f"{name}={value} must be at least 1.")
    owners = owners_of("partition", federated)
    if not owners and numbers["num_clients"] is None:
        found.append(
            "Say who the clients are: num_clients=10 deals the train set out at random, callbacks=[Partition(...)] by"
            " any flwr-datasets partitioner, callbacks=[ClientData(...)] takes data that is already apart."
        )
    if owners and numbers["num_clients"] is not None:
        found.append(
            f"num_clients={numbers['num_clients']} is short for an IID Partition, and {type(owners[0]).__name__}"
            " decides the partition already: leave num_clients out."
        )
    return found
