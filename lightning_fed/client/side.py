"""All that a client app needs to serve any client, whatever asks it to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from lightning_fed.client.local.data_pass import data_pass
from lightning_fed.client.local.fit import local_fit, set_up
from lightning_fed.client.local.look_ahead import LookAhead
from lightning_fed.client.local.method import named, of_method
from lightning_fed.client.local.run import LocalResult
from lightning_fed.client.local.work import LocalOptions, LocalTask, LocalWork
from lightning_fed.client.vectorized.dispatch import Dispatcher
from lightning_fed.seeding import random_states_kept
from lightning_fed.values.data import ClientLoaders
from lightning_fed.values.staying import Staying
from lightning_fed.values.weights import Weights, read

# The name under which a client's memory has its own weights, beside the names of methods.
_PERSONAL = "its personal tensors"
# The same, behind the name of the method that trains it, of a second model of its own.
_OWN = "its own model"
# The same of what the method keeps of that one's fit.
_SECOND = "its own model's fit"
# The same of that fit's optimizers and schedules, and of its callbacks, as bytes.
_SECOND_STATE = "its own model's fit state"


class DataSource(Protocol):
    """Where clients' data comes from."""

    def __call__(self, client: int, round: int) -> ClientLoaders:
        """Return a client's loaders in a round."""

    def roots(self) -> dict[str, Any]:
        """Return what clients' data depends on, by name."""


@dataclass
class ClientSide:
    """All that a client app needs to serve any client.

    Attributes:
        module: The module, which server and clients share within one process.
        options: What all local fits have in common.
        data: ``data(client, round)`` gives a client's loaders.
        datamodule: The server's datamodule, or ``None``.
        mods: Flower client mods by stage, outermost first.
        methods: The federated callbacks that have a part in local training.
        is_set_up: Whether the module has been set up in this process.
        dispatcher: Trains several clients as one stacked model, or ``None``.
        is_stale: Why this process' copies are not as the server's are; empty if they are.
        own: The tensors that do not travel, as a client has them that has none of its own yet.
        staying_of: Tells which these are, where there is no server in the process that does.
    """

    module: LightningModule
    options: LocalOptions
    data: DataSource
    datamodule: LightningDataModule | None = None
    mods: dict[str, Sequence[Callable[..., Any]]] = field(default_factory=dict)
    methods: Sequence[Callback] = ()
    is_set_up: bool = False
    dispatcher: Dispatcher | None = None
    is_stale: str = ""
    own: Weights = field(default_factory=dict)
    staying_of: Callable[[LightningModule], Staying] | None = None

    def take_staying(self, staying: Staying) -> None:
        """Note which tensors do not travel, as the module has them now."""
        self.options.staying = staying
        state = read(self.module, copy=False) if staying else {}
        self.own = {name: tensor.clone() for name, tensor in state.items() if name in staying}

    def roots(self) -> dict[str, Any]:
        """Return what a client's work depends on besides weights and data, by name."""
        return {"module": self.module, "options": vars(self.options), "mods": self.mods}

    def data_roots(self) -> dict[str, Any]:
        """Return what a client's data depends on, likewise."""
        return {"datamodule": self.datamodule, **self.data.roots()}

    def work(self, task: LocalTask) -> LocalWork:
        """Return what a client works on; opens its data, and everybody's generators are the caller's to keep."""
        loaders = self.data(task.client, task.round)
        self.complete(task)
        return LocalWork(self.module, self.datamodule, loaders, task, self.options)

    def set_up(self, work: LocalWork) -> None:
        """Set the module up, if nobody has done so in this process."""
        if not self.is_set_up:
            set_up(work)
            self.is_set_up = True
            if self.staying_of is not None:
                self.take_staying(self.staying_of(self.module))
                self.complete(work.task)

    def complete(self, task: LocalTask) -> LocalTask:
        """Give a client the tensors that did not travel."""
        if self.own:
            task.weights = {**self.own, **personal_in(task.memory, self.options), **task.weights}
        return task

    def train(self, work: LocalWork) -> LocalResult:
        """Return what a client's fit gives, with the pass before it and the fit of a model of its own after it."""
        work.task.received = {**work.task.received, **data_pass(work)}
        result = local_fit(work)
        self._second_fit(work, result)
        return result

    def _second_fit(self, work: LocalWork, first: LocalResult) -> None:
        """Train the client's own model, where it has one, and put what it keeps of it into the first fit's result."""
        if (callbacks := self.options.second_fit) is None:
            return
        method, memory = _second_method(self.options), work.task.memory
        x, own = self.options.staying.shared(work.task.weights), of_method(memory, f"{method}, {_OWN}")
        states = of_method(memory, f"{method}, {_SECOND_STATE}")
        kept = {name: tensor.numpy().tobytes() for name, tensor in states.items()}
        task = replace(
            work.task,
            weights={**work.task.weights, **own},
            state=kept.get("optimizers"),
            callback_states=kept.get("callbacks"),
            received={},
        )
        options = replace(
            self.options,
            callbacks=self.options.callbacks[len(self.options.callbacks) - self.options.module_callbacks :],
            method_callbacks=lambda: named(f"{method}, {_SECOND}", callbacks(x, first.callbacks)),
        )
        second = local_fit(replace(work, task=task, options=options))
        first.own, first.memory = second.weights, {**first.memory, **second.memory}
        for name, state in (("optimizers", second.state), ("callbacks", second.callback_states)):
            if state is not None:  # of bytes, which cannot be written to, frombuffer warns
                first.memory[f"{method}, {_SECOND_STATE}/{name}"] = torch.frombuffer(
                    bytearray(state), dtype=torch.uint8
                )

    def look_ahead(self, weights: Weights, seed: int) -> None:
        """Look, before the first round, at what ``configure_optimizers`` gives; raises as ``LookAhead.look``."""
        with random_states_kept():
            first = LocalWork(
                self.module, self.datamodule, ClientLoaders(), LocalTask(0, 1, seed, weights), self.options
            )
            LookAhead(first, self.data).look()

    def probe_vectorized(self, stages: Sequence[str], tasks: Sequence[LocalTask]) -> None:
        """Find out, before the first round, in which stages clients can be vectorized.

        Args:
            stages: Those that there will be.
            tasks: What the first two clients would do, or the only one.

        Raises:
            ConfigurationError: If that is required and cannot be done.
        """
        if self.dispatcher is not None:
            for stage in stages:
                self.dispatcher.probe(stage, tasks, self.work, bool(self.mods.get(stage)))

    def keep(self, result: LocalResult) -> Weights:
        """Take what does not travel off a result; return what stays with the client, methods' memory with it."""
        staying = self.options.staying
        personal = {f"{_PERSONAL}/{name}": result.weights[name] for name in staying.personal}
        result.weights = staying.shared(result.weights)
        method = _second_method(self.options)
        own = {f"{method}, {_OWN}/{name}": tensor for name, tensor in result.own.items()}
        return {**result.memory, **personal, **own}


def personal_in(memory: Weights, options: LocalOptions) -> Weights:
    """Return the client's own weights in what it keeps, with which it trains what travels.

    What it has kept in another way of training, from before a resume, is not its own in this one.
    """
    return {name: own for name, own in of_method(memory, _PERSONAL).items() if name in options.staying.personal}


def own_in(memory: Weights, options: LocalOptions) -> Weights:
    """Return the client's own weights in what it keeps, with which it evaluates."""
    return {**personal_in(memory, options), **of_method(memory, f"{_second_method(options)}, {_OWN}")}


def _second_method(options: LocalOptions) -> str:
    """Return the name of the method that trains a second model; empty where there is none."""
    fit = options.second_fit
    return "" if fit is None else type(getattr(fit, "__self__", fit)).__name__
