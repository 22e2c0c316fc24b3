"""What is said of a federation when a fit begins: who takes part, and by which method."""

from __future__ import annotations

import os
import socket
from statistics import median

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.callbacks.flower_strategy import FlowerStrategy
from lightning_fed.server.owners import Owners
from lightning_fed.values.staying import Staying
from lightning_fed.values.weights import Weights, size_of

# Beyond so many clients each one's data is not looked at.
_MOST_CLIENTS = 1000


def summary(
    owners: Owners,
    clients: int,
    max_rounds: int | None,
    engine: str,
    evaluates: bool,
    deals: bool = True,
    travels: str = "",
) -> str:
    """Return a few lines.

    Args:
        owners: Who decides what.
        clients: How many there are.
        max_rounds: How many rounds there will be; -1 for no limit.
        engine: The engine, and where it trains.
        evaluates: Whether clients evaluate.
        deals: Whether clients' data is dealt out here, so that its sizes are known.
        travels: Which tensors travel, where not all do.
    """
    train, evaluate = (owners.cohorts.size(stage, clients) for stage in ("train", "evaluate"))
    evaluating = (f", {evaluate} evaluate" if evaluates else "") + (" in the first" if owners.cohorts.varies else "")
    limit = "no limit of rounds" if max_rounds == -1 else f"rounds: {max_rounds}"
    sizes = owners.partition.sizes() if deals and clients <= _MOST_CLIENTS else None
    rows = {
        "clients": f"{clients}{_examples(sizes)}",
        "each round": f"{train} train{evaluating}; {limit}",
        "method": " + ".join(_label(callback) for callback in owners.callbacks if _is_method(callback)),
        **({"travels": travels} if travels else {}),
        "engine": engine,
    }
    return "\n".join(["Federation", *(f"  {name:<10}  {text}" for name, text in rows.items())])


def what_travels(staying: Staying, weights: Weights) -> str:
    """Return a line on the weights that travel, and those that do not; empty where all do."""
    if not staying:
        return ""
    shared = staying.shared(weights)
    parts = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("personal", staying.personal), ("frozen", staying.frozen))
        if names
    ]
    sizes = f"{size_of(shared):,} of {size_of(weights):,} bytes each way"
    return f"{len(shared)} of {len(weights)} tensors, {sizes}; not: {', '.join(parts)}"


def where_results_go(trainer: Trainer) -> str:
    """Return a line that says where a run's results are: of one that another program started nobody knows the folder.

    Args:
        trainer: The server's; its callbacks are set up.
    """
    places = [("logs", trainer.log_dir)] if trainer.loggers else []
    places += [("checkpoints", getattr(callback, "dirpath", None)) for callback in trainer.checkpoint_callbacks]
    told = " and ".join(dict.fromkeys(f"{what} in {_whole(place)}" for what, place in places if place))
    return f"Results on {socket.gethostname()}: {told or 'none are saved, for there is no logger and no checkpoint'}."


def _whole(place: str) -> str:
    return place if "://" in place else os.path.abspath(place)


def _examples(sizes: list[int] | None) -> str:
    if not sizes:
        return ""
    return f" with {min(sizes)} / {median(sizes):g} / {max(sizes)} training examples (min / median / max)"


def _is_method(callback: FederatedCallback) -> bool:
    parts = ("server_strategy", "client_mods", "local_callbacks", "stays", "pass_before", "second_fit")
    return any(is_overridden(part, callback, FederatedCallback) for part in parts)


def _label(callback: FederatedCallback) -> str:
    name = type(callback).__name__
    return f"{name}({type(callback.strategy).__name__})" if isinstance(callback, FlowerStrategy) else name
