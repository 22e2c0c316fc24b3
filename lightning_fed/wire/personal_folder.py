"""A folder with what each client has of its own, and once what all share: written as a whole, read for one client.

The index names the save's own subfolder, so a save that replaces another, or did not end, mixes with nothing::

    folder/
      personal_modules.pt                  which clients there are, and the shared model's tensors
      clients-4f0c9a31d2be8876/client-3.pt  client 3's own tensors
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_fed import checks
from lightning_fed.errors import ConfigurationError, FederationError
from lightning_fed.values import weights
from lightning_fed.values.weights import Weights
from lightning_fed.views import user_class
from lightning_fed.wire.checkpoint_file import differing_tensors, look_at
from lightning_fed.wire.kept_file import write_whole

AnyModule = TypeVar("AnyModule", bound=LightningModule)

_INDEX, _KIND = "personal_modules.pt", "lightning_fed.personal_modules"
_CLIENTS = re.compile(r"clients-[0-9a-f]{16}")
_AGAIN = "Save it again: trainer.save_personal_modules(folder)."
_SHOWN = 10


def write_personal(folder: Path, module: str, shared: Weights, each: Iterable[tuple[int, Weights]]) -> None:
    """Write a folder; one save that is there already is replaced as a whole, when all of the new one is written.

    Args:
        folder: Made if it is not there.
        module: The name of the module's class.
        shared: The shared model's tensors, all of them.
        each: The clients, each with its own tensors; asked for one after the other, those without any left out.

    Raises:
        ConfigurationError: If no client has tensors of its own, or the folder cannot be written.
    """
    save = uuid.uuid4().hex[:16]
    part, clients = folder / f"clients-{save}", []
    try:
        try:
            part.mkdir(parents=True)
            for client, own in each:
                if own:
                    write_whole(part / f"client-{client}.pt", {"save": save, "client": client, "own": _held(own)})
                    clients.append(client)
            if not clients:
                raise ConfigurationError(
                    f"save_personal_modules({str(folder)!r}): no client has tensors of its own, all have the server's"
                    " model. Save that with trainer.save_checkpoint(path)."
                )
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        index = {"kind": _KIND, "save": save, "module": module, "clients": clients, "shared": _held(shared)}
        write_whole(folder / _INDEX, index)
    except FederationError:
        raise
    except (OSError, RuntimeError) as error:  # torch has its own for a disk that is full
        raise ConfigurationError(
            f"save_personal_modules({str(folder)!r}): {error}. Name a folder of your own; is the disk full?"
        ) from error
    for other in folder.iterdir():  # what is replaced, and saves that did not end
        if other != part and _CLIENTS.fullmatch(other.name) and other.is_dir():
            shutil.rmtree(other, ignore_errors=True)


def _held(tensors: Weights) -> Weights:
    """Return tensors with memory of their own, and no more: of a view torch would write all that it looks at."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def load_personal_module(module: AnyModule, folder: str | os.PathLike[str], client: int | None) -> AnyModule:
    """Load a client's own model, as ``trainer.save_personal_modules(folder)`` wrote it, into a module.

    Its tensors are then those of ``trainer.personal_module(client)``, bit for bit. Layers that ``configure_model``
    builds are built. Files are read with ``weights_only=True``: tensors, numbers and names.

    Args:
        module: Built as for the fit; it is changed in place.
        folder: The folder.
        client: Which client; ``None`` for the shared model, with which a client begins that has nothing of its own.

    Returns:
        The module.

    Raises:
        ConfigurationError: If the folder is none of these or damaged, has nothing of the client, or is of a module that
            has other tensors.

    >>> import tempfile
    >>> from torch.utils.data import DataLoader
    >>> from lightning_fed import FederatedTrainer
    >>> from lightning_fed.callbacks import FedPer
    >>> from lightning_fed.testing import ToyModule, toy_data
    >>> quiet = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    >>> trainer = FederatedTrainer(max_rounds=1, num_clients=3, callbacks=[FedPer("net.2")], logger=False, **quiet)
    >>> trainer.fit(ToyModule(), DataLoader(toy_data(24), batch_size=8))
    >>> folder = tempfile.mkdtemp()
    >>> trainer.save_personal_modules(folder)
    >>> own = load_personal_module(ToyModule(), folder, client=2)
    >>> bool((own.net[2].bias == trainer.personal_module(2).net[2].bias).all())
    True
    """
    if not isinstance(module, LightningModule):
        raise ConfigurationError(
            f"load_personal_module({checks.as_typed(module)}, ...): its first argument is the LightningModule that the"
            " client's tensors are loaded into; torch.compile comes after."
        )
    name, found = _read(Path(folder), client)
    if is_overridden("configure_model", module):
        module.configure_model()
    here = weights.read(module, copy=False)
    differing = (
        differing_tensors(found, here)
        or [
            f"{one!r} is {tensor.dtype} there and {here[one].dtype} here"
            for one, tensor in found.items()
            if tensor.dtype != here[one].dtype
        ][:1]
    )
    if differing:
        own = user_class(module).__name__
        raise ConfigurationError(
            f"{folder} has the models of another module than this {own}{'' if own == name else f', of a {name}'}:"
            f" {'; '.join(differing)}. Build the module as it was for the fit; one that was trained in another"
            " precision is first brought to it, as by module.double() or module.bfloat16()."
        )
    weights.load(module, found)
    return module


def _read(folder: Path, client: int | None) -> tuple[str, Weights]:
    """Return the name of the module's class, and all tensors of a client's model."""
    if not folder.is_dir():
        raise ConfigurationError(
            f"There is no folder {folder}: name one that trainer.save_personal_modules(folder) wrote."
        )
    if not (folder / _INDEX).is_file():
        raise ConfigurationError(
            f"{folder} has no {_INDEX}: it is no folder of trainer.save_personal_modules(folder), or that did not end."
        )
    index = _loaded(folder / _INDEX, {"kind": str, "save": str, "module": str, "clients": list, "shared": dict})
    if index["kind"] != _KIND or not _CLIENTS.fullmatch(f"clients-{index['save']}"):
        raise ConfigurationError(f"{folder / _INDEX} is no index of client's models. {_AGAIN}")
    if client is None:
        return index["module"], index["shared"]
    clients = index["clients"]
    if not checks.is_whole(client) or client not in clients:
        more = f" and {len(clients) - _SHOWN} more" if len(clients) > _SHOWN else ""
        raise ConfigurationError(
            f"{folder} has nothing of client {client!r}; it has clients {', '.join(map(str, clients[:_SHOWN]))}{more}."
            " A client that has nothing of its own begins with the shared model: client=None gives that."
        )
    path = folder / f"clients-{index['save']}" / f"client-{client}.pt"
    if not path.is_file():
        raise ConfigurationError(f"{path} is not there, and {folder / _INDEX} names it. {_AGAIN}")
    kept = _loaded(path, {"save": str, "client": int, "own": dict})
    if (kept["save"], kept["client"]) != (index["save"], client):
        raise ConfigurationError(f"{path} is of another save, or of another client. {_AGAIN}")
    return index["module"], {**index["shared"], **kept["own"]}


def _loaded(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """Return what a file holds.

    Raises:
        ConfigurationError: If it is damaged, or none of these.
    """
    if (found := look_at(path)) is not None:
        raise ConfigurationError(f"{path} {found} {_AGAIN}")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise ConfigurationError(f"{path} cannot be read: {type(error).__name__}: {said} {_AGAIN}") from error
    is_ours = isinstance(held, dict) and all(type(held.get(name)) is kind for name, kind in kinds.items())
    tensors = [one for kind in ("shared", "own") if is_ours for one in held.get(kind, {}).items()]
    if not is_ours or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors):
        raise ConfigurationError(f"{path} holds something else than a client's model. {_AGAIN}")
    return held
