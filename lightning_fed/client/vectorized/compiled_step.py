"""The steps of vectorized clients, compiled: losses, gradients and logged values in one graph, and SGD.

``torch.compile`` guards on whatever the user's code reads (the epoch, an attribute of the module) and compiles another
graph where that changes. Before a graph runs for the first time the step runs uncompiled once, which tells what is
logged and which parameters a loss reaches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_fed._compat.torch import allow_saved_tensor_hooks, dynamo, inductor, lookup_backend, tree_flatten
from lightning_fed.client.vectorized.log import Entry
from lightning_fed.client.vectorized.step_function import Here, SgdUpdate, step_of_all, update_of_all
from lightning_fed.client.vectorized.weights import Stack

# Shapes of batches beyond these are not compiled: clients of ever new sizes would compile for ever.
MOST_SHAPES = 8


@dataclass
class _Known:
    """What is known of a graph: what is logged, the parameters that a loss reaches, and whether gradients lie apart."""

    entries: list[Entry]
    reached: list[str]
    are_apart: bool | None = None


@dataclass
class Ran:
    """A compiled step that ran.

    Attributes:
        loss: The sum of the clients' losses, which autograd knows nothing of.
        gradients: The parameters that it reaches, with their gradients.
        are_apart: Whether each gradient has memory of its own, so that it can be written to.
        entries: What was logged.
        values: Its values, each (clients,).
    """

    loss: Tensor
    gradients: list[tuple[Tensor, Tensor]]
    are_apart: bool
    entries: list[Entry]
    values: list[Tensor]

    def differentiable(self) -> Tensor:
        """Return the loss, as one whose backward pass hands the gradients over."""
        parameters, gradients = zip(*self.gradients, strict=True)
        return _Given.apply(self.loss, gradients, *parameters)


class CompiledStep:
    """One step of a module's clients; for all rounds of a run.

    Args:
        backend: That of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self._shapes: set[Any] = set()
        self._known: dict[int, _Known] = {}
        self._is_off = False
        self._here = Here()
        self._compiled: dict[bool, Any] = {}  # whether updates are in it
        self._updated: Any = None  # the options of the updates that are
        self._graphs = 0
        self._graph: int | None = None  # the last one that was called

    def __getstate__(self) -> dict[str, Any]:
        return {"_backend": self._backend}  # another process compiles for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        CompiledStep.__init__(self, state["_backend"])

    def learn(self, stack: Stack, batch: Any, entries: Sequence[Entry], total: Tensor) -> None:
        """Take note of a step that ran uncompiled."""
        if self._is_off or len({entry.name for entry in entries}) < len(entries):
            return
        shape = _shape(batch)
        if shape not in self._shapes:
            if len(self._shapes) < MOST_SHAPES:
                self._shapes.add(shape)
            return
        if self._graph is None:
            return
        leaves = _leaves_of(total)
        reached = [name for name, parameter in stack.parameters.items() if id(parameter) in leaves]
        self._known[self._graph] = _Known(list(entries), reached)
        if len(reached) < sum(parameter.requires_grad for parameter in stack.parameters.values()):
            self._updated = _NEVER  # an optimizer leaves out what has no gradient

    @staticmethod
    @contextmanager
    def configured() -> Iterator[None]:
        """Configure a fit: static shapes, as ``compile(dynamic=False)``, which takes as long as guards at each call.

        Kernels are compiled by as many processes as this one has threads: each imports torch, which costs a worker that
        has one core more than it gains.
        """
        processes = min(inductor.compile_threads or 1, torch.get_num_threads())
        with (
            dynamo.patch(automatic_dynamic_shapes=False, assume_static_by_default=True),
            inductor.patch(compile_threads=processes),
        ):
            yield

    def can_update(self, update: SgdUpdate | None) -> bool:
        """Return whether whole updates are compiled: not where options change, for each graph is made for some."""
        if self._is_off or update is None or self._updated is _NEVER:
            return False
        if self._updated is None:
            self._updated = update.groups
        if not update.is_current() or update.groups != self._updated:
            self._updated = _NEVER
        return self._updated is not _NEVER

    def run(self, stack: Stack, step: Any, batch: Any, batch_idx: int, update: SgdUpdate | None = None) -> Ran | None:
        """Run one step; ``None`` where it has to run uncompiled.

        Args:
            stack: The clients' weights.
            step: The user's ``training_step``, as a function of module, batch and its index.
            batch: Every leaf a tensor with the clients in front.
            batch_idx: Its index.
            update: What also steps the weights, if that is compiled, too.
        """
        self._here.batch_idx, self._graph = batch_idx, None
        if self._is_off or _shape(batch) not in self._shapes:
            return None
        trained = {name: value.detach() for name, value in stack.parameters.items() if value.requires_grad}
        fixed = {name: value.detach() for name, value in stack.parameters.items() if not value.requires_grad}
        fixed.update(stack.buffers)
        momenta = () if update is None else (update.momenta,)
        try:
            with torch.no_grad():
                compiled = self._of(stack.module, step, update)
                stack.module.__dict__["_here"] = self._here
                gradients, loss, values, buffers = compiled(trained, fixed, batch, *momenta)
        except _Unknown:
            return None
        except Exception as error:
            self._broke_off(error, update)
            return None
        finally:
            stack.module.__dict__.pop("_here", None)
        assert self._graph is not None
        known = self._known[self._graph]
        for name, buffer in stack.buffers.items():
            buffer.copy_(buffers[name])
        pairs = [(stack.parameters[name], gradients[name]) for name in known.reached]
        if known.are_apart is None:
            known.are_apart = _are_apart([gradient for _, gradient in pairs])
        return Ran(loss, pairs, known.are_apart, known.entries, [values[entry.name] for entry in known.entries])

    def _broke_off(self, error: Exception, update: SgdUpdate | None) -> None:
        """Compiles less from now on.

        Raises:
            Exception: The error, if the step had begun to update weights.
        """
        allow_saved_tensor_hooks()  # which a transform that broke off leaves disabled
        self._updated = _NEVER  # gradients alone may be compiled
        if update is not None and self._graph in self._known:
            raise error
        if update is None or _is_too_often(error):
            self._turn_off(_reason(error))

    def _turn_off(self, reason: str) -> None:
        self._is_off = True
        rank_zero_warn(f"compile_clients: clients train uncompiled: {reason}.")

    def _numbered(self, graph: Any, inputs: Any) -> Any:
        """Compile a graph, as a backend of ``torch.compile``; it says when it is called, and runs once it is known."""
        made = lookup_backend(self._backend)(graph, inputs)
        number = self._graphs
        self._graphs += 1

        def run(*args: Any) -> Any:
            self._graph = number
            if number not in self._known:
                raise _Unknown
            return made(*args)

        return run

    def _of(self, module: nn.Module, step: Any, update: SgdUpdate | None) -> Any:
        updates = update is not None
        if updates not in self._compiled:
            if update is None:
                function = step_of_all(module, step, self._here)
            else:
                function = update_of_all(module, step, self._here, update.groups)
            # torch counts the graphs of a piece of code, of whichever run they are: each run's is a piece of its own.
            function.__code__ = function.__code__.replace()
            self._compiled[updates] = torch.compile(function, backend=self._numbered, fullgraph=True)
        return self._compiled[updates]


class _Unknown(Exception):
    """A graph that was called for the first time."""


_NEVER = object()


class _Given(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if factor.device.type != "cpu" or float(factor) != 1.0:  # to look at a number on a device is to wait for it
            gradients = [gradient * factor for gradient in gradients]
        return None, None, *gradients


def _are_apart(gradients: Sequence[Tensor]) -> bool:
    memory = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    own = all(stride or size == 1 for one in gradients for stride, size in zip(one.stride(), one.shape, strict=True))
    return own and len(memory) == len(gradients)


def _shape(batch: Any) -> Any:
    if type(batch) is list and all(type(part) is Tensor for part in batch):
        return tuple((part.shape, part.dtype, part.device) for part in batch)
    leaves, tree = tree_flatten(batch)
    return tree, tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else None for leaf in leaves)


def _leaves_of(total: Tensor) -> set[int]:
    """Return the ids of all tensors that a backward pass from here gives gradients to."""
    found, seen, todo = set(), set(), [total.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(following for following, _ in node.next_functions)
    return found


def _is_too_often(error: Exception) -> bool:
    return "RecompileLimit" in type(error).__name__  # FailOnRecompileLimitHit; RecompileLimitExceeded in torch 2.6


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if _is_too_often(error):
        return "the step was compiled too often, for it reads what changes (the epoch, an attribute of the module)"
    if "compiler" in text.lower() and "found" in text.lower():
        return "no C++ compiler was found (install g++ or clang, or set CXX)"
    return f"{type(error).__name__}: {text[:200]}"
