"""The scripts of the federation that benchmarks/reliability.py runs: server, sites, and all in one process to compare.

Module and data are those of tests/deployment/federation.py: BatchNorm, Dropout, FedAdam, optimizers that clients carry.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks import hostile
from lightning_fed.callbacks import FaultTolerance, FederatedCallback
from lightning_fed.engines import SuperLink
from lightning_fed.wire import messages
from tests.deployment.federation import Net, data, module, trainer

EVALUATE = 10  # clients evaluate after every tenth round


class Notes(FederatedCallback):
    """Writes down when rounds begin and end, and who fails in them; a resumed server writes on."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / "notes.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def _note(self, what: str, round: int, *more: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([what, round, time.time(), *more]) + "\n")

    def on_round_start(self, trainer: Any, round: int, stage: str, cohort: Sequence[int]) -> None:
        if stage == "train":
            self._note("start", round)

    def on_client_error(self, trainer: Any, round: int, stage: str, error: Any) -> None:
        self._note("failed", round, stage, error.client, str(error).splitlines()[0][:300])

    def on_round_end(self, trainer: Any, round: int, metrics: dict[str, float]) -> None:
        self._note("end", round)


class Hangs(Net):
    """A client that does nothing for a while in some rounds."""

    def __init__(self, rounds: Sequence[int], seconds: float) -> None:
        super().__init__()
        self.hangs_in, self.seconds = rounds, seconds

    def on_train_epoch_start(self) -> None:
        if self.trainer.current_round in self.hangs_in:
            time.sleep(self.seconds)


class FailsAgain(FederatedCallback):
    """Clients fail in the rounds in which they did: before they train, or (``refused``) by what they send then."""

    def __init__(self, failed: Sequence[Sequence[int]], refused: bool) -> None:
        self.failed, self.refused = {(round, client) for round, client in failed}, refused

    def client_mods(self, stage: str) -> Sequence[Any]:
        return [self._fail] if stage == "train" else []

    def _fail(self, message: Message, context: Context, call_next: Any) -> Message:
        config = messages.first(message.content, ConfigRecord)
        assert config is not None
        if (config[messages.ROUND], context.node_config[messages.CLIENT]) not in self.failed:
            return call_next(message, context)
        if not self.refused:
            raise RuntimeError("failed then, too")
        reply = call_next(message, context)
        record = messages.first(reply.content, MetricRecord)
        assert record is not None
        record[messages.NUM_EXAMPLES] = float("inf")
        return reply


def server(
    address: str, root: str, rounds: int, clients: int, resume: bool = False, timeout: float = 3600.0, **kwargs: Any
) -> None:
    checkpoint = ModelCheckpoint(root, save_last=True, save_on_train_epoch_end=True)
    callbacks = (Notes(root), FaultTolerance(on_error="ignore"), checkpoint)
    fit = trainer(
        SuperLink(address, **kwargs),
        rounds,
        callbacks,
        clients=clients,
        timeout=timeout,
        check_val_every_n_epoch=EVALUATE,
        enable_checkpointing=True,
        default_root_dir=root,
    )
    model = module()
    fit.fit(model, ckpt_path="last" if resume else None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.save({"weights": model.state_dict(), "peak": peak}, Path(root) / "end.pt")


def site(
    address: str,
    root: str,
    client: int,
    rounds: int,
    clients: int,
    wait: str = "",
    hangs: dict[str, Any] | None = None,
    sends: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Join; when the file ``wait`` is there, with pauses as in ``Hangs``, and as a site of ``hostile.py``."""
    here = trainer("in_process", rounds, clients=clients, default_root_dir=root)
    train, val = data(client)
    if sends:
        hostile.become(**sends)
    while wait and not Path(wait).exists():
        time.sleep(0.05)
    here.join(address, Hangs(**hangs) if hangs else module(), train, val, client=client, **kwargs)


def alone(root: str, rounds: int, clients: int, failed: Sequence[Sequence[int]], refused: bool) -> None:
    callbacks = (FaultTolerance(on_error="ignore"), *([FailsAgain(failed, refused)] if failed else []))
    model = module()
    given = {"default_root_dir": root, "check_val_every_n_epoch": EVALUATE}
    fit = trainer("in_process", rounds, callbacks, clients=clients, **given)
    fit.fit(model)
    Path(root).mkdir(parents=True, exist_ok=True)
    torch.save({"weights": model.state_dict()}, Path(root) / "end.pt")
