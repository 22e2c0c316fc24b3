"""A checkpoint file that cannot be taken: what it is, and what to do about it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_fed.errors import ConfigurationError

# The key of the federation's state among a checkpoint's callbacks.
FEDERATION = "lightning_fed.Federation"
_SHOWN = 3
_IS_FOLDER = 0x10  # MS-DOS attribute, by which torch's reader goes


def explain_errors(trainer: Trainer) -> None:
    """Let ``trainer`` say of every checkpoint that it cannot take what it is and what to do."""
    strategy = trainer.strategy
    strategy.load_checkpoint = partial(_read, trainer, strategy.load_checkpoint)  # type: ignore[method-assign]
    strategy.load_model_state_dict = partial(_load_weights, trainer, strategy.load_model_state_dict)  # type: ignore[method-assign]


def is_there(path: Any) -> bool:
    """Return whether there is a file, on any file system, that a checkpoint would overwrite."""
    return bool(get_filesystem(path).exists(path))


def _read(
    trainer: Trainer, load: Callable[..., dict[str, Any]], checkpoint_path: Any, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Do as ``Strategy.load_checkpoint``.

    Raises:
        ConfigurationError: If the file is no checkpoint of Lightning's, or none that a federation can go on from.
    """
    try:
        checkpoint = load(checkpoint_path, *args, **kwargs)
    except Exception as error:
        if (found := look_at(checkpoint_path)) is None:
            if "weights_only" in str(error):
                error.add_note("If you trust the file: pass weights_only=False to fit, validate, test or predict.")
            raise
        raise ConfigurationError(f"{checkpoint_path} {found} {_way_out(trainer, checkpoint_path)}") from error
    if (found := _changed(checkpoint_path)) is not None:
        raise ConfigurationError(f"{checkpoint_path} {found} {_way_out(trainer, checkpoint_path)}")
    if (found := _what_is(checkpoint)) is not None:
        raise ConfigurationError(f"{checkpoint_path} {found}")
    if trainer.state.fn == TrainerFn.FITTING:
        _require_rounds(trainer, checkpoint, checkpoint_path)
    return checkpoint


def look_at(path: Any) -> str | None:
    """Return what a file is that torch did not write so; ``None`` if it looks whole, or if it cannot be looked at."""
    try:
        files = get_filesystem(path)
        if files.isdir(path):
            return "is a folder, not a checkpoint file."
        size = files.size(path)
        with files.open(path, "rb") as file:
            begin = file.read(16)
            whole = zipfile.is_zipfile(file)
            names, damaged = _parts(file) if whole else ([], None)
    except Exception:
        return None
    if size == 0:
        return "is empty (0 bytes): whoever wrote it was stopped, or the disk was full."
    if damaged is not None:
        return f"is damaged: {damaged!r} among its {size:,} bytes is not what was written."
    if whole:
        is_torch = any(name.endswith("/data.pkl") for name in names)
        return None if is_torch else f"is a zip archive of {size:,} bytes that torch did not write."
    if begin.startswith(b"PK"):
        return f"is truncated: {size:,} bytes are there, and its end is missing."
    if begin.startswith(b"\x80"):
        return f"is a pickle of {size:,} bytes that is damaged, or that torch did not write."
    return f"is no file of torch's: its {size:,} bytes begin with {begin!r}."


def _changed(path: Any) -> str | None:
    """Return what of a file here is not what was written, which torch does not look at; ``None`` if all is."""
    here = Path(str(path))
    return look_at(here) if here.is_file() and zipfile.is_zipfile(here) else None


def _parts(file: Any) -> tuple[list[str], str | None]:
    """Return the names of an archive's parts, and the first that is not what was written.

    Where no part has its checksum, none is named: ``torch.serialization.set_crc32_options(False)`` writes such files.

    Raises:
        OSError: If the file cannot be read.
    """
    try:
        archive = zipfile.ZipFile(file)
    except OSError:
        raise
    except Exception:
        return [], "the index"
    parts = archive.infolist()
    damaged = [part.filename for part in parts if not _is_whole(archive, part)]
    return [part.filename for part in parts], damaged[0] if 0 < len(damaged) < len(parts) else None


def _is_whole(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> bool:
    """Return whether a part is what its checksum says, to torch's reader as well as to Python's."""
    if part.external_attr & _IS_FOLDER:
        return False
    read = 0
    try:
        with archive.open(part) as content:
            while chunk := content.read(1 << 20):
                read += len(chunk)
    except OSError:
        raise
    except Exception:  # a changed header may be anything: a name that is no text, a compression that is none
        return False
    is_stored = part.compress_type == zipfile.ZIP_STORED
    return read == part.file_size and (not is_stored or read == part.compress_size)


def _way_out(trainer: Trainer, path: Any) -> str:
    """Other checkpoints beside it, the newest first."""
    here = Path(str(path))
    others = [p for p in here.parent.glob("*.ckpt") if p.name != here.name and p.is_file() and p.stat().st_size]
    others.sort(key=lambda p: -p.stat().st_mtime)
    named = f"Name another checkpoint as ckpt_path: {_listed([p.name for p in others])} are beside it" if others else ""
    named = named.replace("are beside", "is beside") if len(others) == 1 else named
    if trainer.state.fn != TrainerFn.FITTING:
        return f"{named}." if others else "Name another file as ckpt_path."
    return f"{named}; or delete it to begin anew." if others else "Delete it, or leave ckpt_path out, to begin anew."


def _what_is(checkpoint: Any) -> str | None:
    """Return what a file of torch's holds if it is no checkpoint of Lightning's."""
    if not isinstance(checkpoint, dict):
        return f"holds a {type(checkpoint).__name__}, and is no checkpoint of Lightning's."
    lacking = [name for name in ("state_dict", "pytorch-lightning_version") if name not in checkpoint]
    if not lacking:
        return None
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return (
            f"holds weights alone ({_listed(list(checkpoint))}), and is no checkpoint of Lightning's. Load them with"
            " module.load_state_dict(torch.load(path)), and leave ckpt_path out."
        )
    return (
        f"is no checkpoint of Lightning's: it has no {' and no '.join(map(repr, lacking))}, it has"
        f" {_listed(list(map(repr, checkpoint))) or 'nothing'}."
    )


def _require_rounds(trainer: Trainer, checkpoint: Mapping[str, Any], path: Any) -> None:
    """Check that a checkpoint has a federated run to go on with.

    Raises:
        ConfigurationError: If it has none, or one that has done more rounds.
    """
    module = type(trainer.lightning_module).__name__
    weights = f"Begin with its weights: {module}.load_from_checkpoint({str(path)!r}), and fit that without ckpt_path."
    optimizers = checkpoint.get("optimizer_states")
    if optimizers is None:
        raise ConfigurationError(
            f"{path} holds weights only (save_weights_only=True): nothing of the rounds before is there to go on"
            f" from. {weights}"
        )
    if not (checkpoint.get("callbacks") or {}).get(FEDERATION):
        if not _is_server_s(optimizers):
            raise ConfigurationError(
                f"{path} is a checkpoint of a plain Trainer after epoch {checkpoint.get('epoch', 0)}, and no run of a"
                " FederatedTrainer to go on with: it has no rounds, no state of a strategy and none of clients."
                f" {weights}"
            )
        rank_zero_warn(
            f"{path} has no {FEDERATION!r} among its callbacks: the state of the strategy (moments of a server"
            " optimizer), what clients keep (client_state='carry') and the run's seed are missing, and begin anew."
        )
    if (found := _wrong_counts(checkpoint)) is not None:
        raise ConfigurationError(f"{path} is damaged, or was changed: {found}. {weights}")
    done, asked = checkpoint["global_step"], trainer.max_epochs
    if asked is not None and asked != -1 and done > asked:
        raise ConfigurationError(
            f"{path} has done {done} rounds, and this run is to end after {asked}. Raise"
            " FederatedTrainer(max_rounds=...), or resume a checkpoint of an earlier round."
        )


def _wrong_counts(checkpoint: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the numbers that say in which round a run goes on; Lightning takes what is there."""
    try:
        fit = checkpoint["loops"]["fit_loop"]
        steps = fit["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
        counts = [checkpoint["global_step"], steps, fit["epoch_progress"]["current"]["completed"]]
    except (KeyError, TypeError) as error:
        return f"of the numbers that say how many rounds it has done, there is no {error}"
    done, stepped, epochs = counts
    if not all(type(count) is int and count >= 0 for count in counts) or done != stepped or done - epochs not in (0, 1):
        return f"it says that it has done {done!r} rounds ('global_step'), {stepped!r} (steps) and {epochs!r} (epochs)"
    return None


def _is_server_s(optimizers: Any) -> bool:
    """Return whether these are the states of the server's one optimizer, whose one parameter stands for all weights."""
    groups = [group for state in optimizers for group in state.get("param_groups", ())]
    return len(groups) == 1 and set(groups[0]) <= {"lr", "weight_decay", "params"} and len(groups[0]["params"]) == 1


def _load_weights(
    trainer: Trainer, load: Callable[..., None], checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any
) -> None:
    """Do as ``Strategy.load_model_state_dict``.

    Raises:
        ConfigurationError: If the weights are another module's.
    """
    try:
        load(checkpoint, *args, **kwargs)
    except RuntimeError as error:
        module = trainer.lightning_module
        found = differing_tensors(checkpoint["state_dict"], module.state_dict())
        if not found:
            raise
        name = type(module).__name__
        arguments = _differing_arguments(checkpoint.get("hyper_parameters"), dict(module.hparams))
        raise ConfigurationError(
            f"{trainer.ckpt_path} is a checkpoint of another module than this {name}: {'; '.join(found)}."
            f"{arguments} Build the module as it was then, as {name}.load_from_checkpoint(path) does with the"
            " arguments that save_hyperparameters() kept."
        ) from error


def differing_tensors(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return what two state dicts have different: names and shapes."""
    missing, foreign = [n for n in here if n not in there], [n for n in there if n not in here]
    shapes = [
        f"{name!r} is {tuple(there[name].shape)} there and {tuple(here[name].shape)} here"
        for name in here
        if isinstance(here[name], Tensor) and isinstance(there.get(name), Tensor)
        if there[name].shape != here[name].shape
    ]
    found = [f"it has no {_listed(list(map(repr, missing)))}"] if missing else []
    found += [f"it has {_listed(list(map(repr, foreign)))}, which this one has not"] if foreign else []
    return found + ([_listed(shapes)] if shapes else [])


def _differing_arguments(there: Any, here: Mapping[str, Any]) -> str:
    simple = (bool, int, float, str, type(None))
    pairs = {name: (value, here[name]) for name, value in (there or {}).items() if name in here}
    differing = [
        f"{name}={then!r} (here {now!r})"
        for name, (then, now) in pairs.items()
        if isinstance(then, simple) and isinstance(now, simple) and then != now
    ]
    return f" It was built with {_listed(differing)}." if differing else ""


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:_SHOWN])} and {more} more"
