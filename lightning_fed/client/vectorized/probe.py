"""Whether a module's clients can be vectorized: a look at what is written, and a trial on a few batches.

The trial trains two clients vectorized and each alone, and compares: also code that mixes clients without an error,
such as a norm over all gradients in a callback, is found out.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from lightning_fed._compat.known_lightning import is_known, why_slower
from lightning_fed._compat.lightning import optimizes_automatically
from lightning_fed.client.local.examples import examples_in
from lightning_fed.client.local.fit import local_evaluate, local_fit
from lightning_fed.client.local.own_callbacks import keeps_state
from lightning_fed.client.local.run import LocalResult
from lightning_fed.client.local.work import LocalWork
from lightning_fed.client.vectorized.cost import Kept, StackCost, Written, weight_bytes
from lightning_fed.client.vectorized.data import batches_of
from lightning_fed.client.vectorized.fit import StackOptions, vectorized_evaluate, vectorized_fit
from lightning_fed.client.vectorized.likeness import apart, compare
from lightning_fed.client.vectorized.rng import NotStackable
from lightning_fed.values.data import ClientLoaders
from lightning_fed.values.weights import parameter_names
from lightning_fed.views import overrides

# Hooks that see a stacked batch, a summed loss or all clients' numbers at once.
_HOOKS = {
    "train": (
        *("on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_before_backward", "backward"),
        *("optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "configure_gradient_clipping"),
    ),
    "evaluate": (
        *("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end"),
        *("on_validation_epoch_end", "on_validation_end"),
    ),
}
# Hooks that see stacked parameters and gradients, which is right where they act element by element: who writes them
# says so by ``acts_elementwise = True``. A norm over all clients may be harmless in a trial and wrong later.
_ELEMENTWISE_HOOKS = (
    *("on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start"),
    *("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"),
)
_OF_BOTH = ("configure_model", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "log")
# Trainer arguments that vectorized clients cannot share.
_ARGUMENTS = ("overfit_batches", "reload_dataloaders_every_n_epochs", "plugins", "detect_anomaly")
_BATCHES = 2


@dataclass
class ProbeResult:
    """What was found.

    Attributes:
        reason: Why clients cannot be vectorized, a clause; ``None`` if they can.
        draws: Whether their steps draw random numbers.
        cost: What each client adds to a stack.
    """

    reason: str | None = None
    draws: bool = False
    cost: StackCost = field(default_factory=StackCost)


@dataclass
class Candidate:
    """What is tried.

    Attributes:
        works: What the first two clients work on in the first round, or the only one.
        stage: ``"train"`` or ``"evaluate"``.
        has_mods: Whether there are client mods in this stage.
        must_pay: Refuse also what can be done but is expected to be slower.
    """

    works: Sequence[LocalWork]
    stage: str
    has_mods: bool = False
    must_pay: bool = False

    @property
    def work(self) -> LocalWork:
        """What clients work on, so far as they have it in common."""
        return self.works[0]

    def refuse(self) -> None:
        """Look at what is written.

        Raises:
            NotStackable: If it cannot be done.
        """
        for reason in self._reasons():
            raise NotStackable(reason)

    def _reasons(self) -> Iterator[str]:
        module, datamodule, options = self.work.module, self.work.datamodule, self.work.options
        arguments = options.trainer
        if not is_known():
            yield why_slower().partition(":")[0]
        if self.has_mods:
            yield "client mods work on one client's message"
        name = type(module).__name__
        names = (*_HOOKS[self.stage], *_OF_BOTH)
        yield from (f"{name} writes {hook}" for hook in names if overrides(module, LightningModule, hook))
        if self.stage == "train":
            yield from _undeclared(module, LightningModule, name)
        if datamodule is not None:
            hooks = (hook for hook in _OF_BOTH if hasattr(LightningDataModule, hook))
            kind = type(datamodule).__name__
            yield from (f"{kind} writes {hook}" for hook in hooks if overrides(datamodule, LightningDataModule, hook))
        for child in module.modules():
            if isinstance(child, nn.RNNBase):
                yield f"nn.{type(child).__name__} keeps its weights where they cannot be stacked"
        yield from (f"{argument}={arguments[argument]!r}" for argument in _ARGUMENTS if arguments.get(argument))
        if str(arguments.get("precision")) in ("16", "16-mixed"):
            yield f"precision={arguments['precision']!r} scales the loss of all clients by one number"
        for callback in (*options.callbacks, *options.method_callbacks()):
            yield from self._reasons_of(callback)
        if self.stage == "evaluate":
            return
        if not optimizes_automatically(module):  # the server's view has none
            yield f"{name} optimizes manually"
        if options.client_state == "carry":
            yield "client_state='carry' keeps optimizers apart"
        if options.local_validation:
            yield "local_validation=True"
        if options.pass_before is not None:
            yield "each client passes over its data before it trains"
        if options.second_fit is not None:
            yield "each client trains a second model of its own"

    def _reasons_of(self, callback: Callback) -> Iterator[str]:
        kind = f"the client callback {type(callback).__name__}"
        if self.stage == "train" and isinstance(callback, BaseFinetuning):
            yield f"{kind} freezes and unfreezes layers by epoch"
        if keeps_state(callback):
            yield f"{kind} keeps a state with each client"
        for hook in _HOOKS[self.stage]:
            if hasattr(Callback, hook) and overrides(callback, Callback, hook):
                yield f"{kind} writes {hook}"
        if self.stage == "train":
            yield from _undeclared(callback, Callback, kind)

    def check_cost(self, kept: int = 0) -> StackCost:
        """Return what a client costs, of whom a pass keeps so many bytes.

        Raises:
            NotStackable: If training so is expected to be slower, and it must pay.
        """
        cost = StackCost(weight_bytes(self.work.module), kept)
        reason = cost.why_slower(self.device) if self.must_pay and self.stage == "train" else None
        if reason is not None:
            raise NotStackable(reason)
        return cost

    @property
    def device(self) -> torch.device:
        """Where clients train."""
        trainer: Any = self.work.module.trainer
        return trainer.strategy.root_device


def _undeclared(instance: object, base: type, name: str) -> Iterator[str]:
    if not getattr(instance, "acts_elementwise", False):
        for hook in _ELEMENTWISE_HOOKS:
            if overrides(instance, base, hook):
                yield f"{name} writes {hook}, and does not say acts_elementwise = True"


def run_probe(candidate: Candidate) -> ProbeResult:
    """Try two clients vectorized against each alone, on their first batches."""
    try:
        candidate.refuse()
        candidate.check_cost()
        works = _two(candidate)
        draws, together, kept = _measure(candidate.stage, works)
        cost = candidate.check_cost(kept // 2)
        alone = _run(candidate.stage, works, draws=None)
        weights = candidate.work.task.weights
        try:
            trained = parameter_names(candidate.work.module)
            compare(together, alone, weights, trained)
        except NotStackable:
            if not draws:
                raise
            # The same numbers may be drawn in another order (of a transposed tensor). Nobody else may matter, though.
            other = replace(works[1], loaders=works[0].loaders, task=replace(works[1].task, client=2))
            among_others = _run(candidate.stage, [works[0], other], draws=True)
            compare(together[:1], among_others[:1], weights, trained)
    except Exception as error:
        return ProbeResult(reason=explain(error))
    return ProbeResult(draws=draws, cost=cost)


def _measure(stage: str, works: Sequence[LocalWork], draws: bool = False) -> tuple[bool, list[LocalResult], int]:
    """Return whether steps draw random numbers, two vectorized clients' results, and the bytes a pass keeps."""
    passes = Kept() if stage == "train" else Written()
    try:
        with passes:
            return draws, _run(stage, works, draws), passes.bytes
    except RuntimeError as error:
        if draws or "randomness" not in str(error):
            raise
    return _measure(stage, works, draws=True)


def _two(candidate: Candidate) -> list[LocalWork]:
    """Two clients with equally many batches, on few of them and with weights of their own."""
    stage, first = candidate.stage, candidate.work
    counts = [count_batches(one.loaders, stage) for one in candidate.works]
    second = candidate.works[1] if len(counts) == 2 and counts[0] == counts[1] else first
    weights = apart(first.task.weights, stage)
    limit = "limit_train_batches" if stage == "train" else "limit_val_batches"
    given = first.options.trainer.get(limit)
    few = {limit: min(given, _BATCHES) if type(given) is int else _BATCHES}
    steps = first.options.steps and min(first.options.steps, _BATCHES)
    options = replace(first.options, trainer={**first.options.trainer, **few}, steps=steps)
    return [
        replace(one, task=replace(one.task, client=client, weights=own), options=options)
        for client, (one, own) in enumerate(zip((first, second), weights, strict=True))
    ]


def count_batches(loaders: ClientLoaders, stage: str) -> int:
    """Return the batches of an epoch of a client.

    Raises:
        NotStackable: If nothing tells, or there are none.
    """
    if loaders.datamodule is not None:
        raise NotStackable("each client has a datamodule of its own")
    own = loaders.train if stage == "train" else loaders.val
    count = batches_of(own)
    if examples_in(own) is None:
        raise NotStackable("nothing tells how many examples a client has")
    if not count:
        raise NotStackable("a client has no batches")
    return count


def _run(stage: str, works: Sequence[LocalWork], draws: bool | None) -> list[LocalResult]:
    """Two clients' results, vectorized, or each alone where ``draws`` is ``None``."""
    if draws is None:
        alone = local_fit if stage == "train" else local_evaluate
        return [alone(work) for work in works]
    together = vectorized_fit if stage == "train" else vectorized_evaluate
    return together(works, StackOptions(draws, is_trial=True))


def explain(error: Exception) -> str:
    """Return why it cannot be done, with the line of the user's code where that was found out."""
    text = " ".join(str(error).split())
    if "data-dependent control flow" in text:
        text = "what it does depends on the data"
    elif "combined_loader" in text:
        text = "it asks the trainer for a loader, which vectorized clients do not share"
    elif ".item()" in text:
        text = "it calls `.item()` on a per-client value"
    elif not isinstance(error, NotStackable):
        text = f"{type(error).__name__}: {text.split('. ')[0][:200]}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    if not frames:
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: `{frames[-1].line}`)"


def _is_library(filename: str) -> bool:
    own = str(Path(__file__).parents[2])
    return "site-packages" in filename or filename.startswith((own, "<"))
