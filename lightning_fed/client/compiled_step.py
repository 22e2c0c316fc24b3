"""The steps of clients that are trained as one, compiled: losses, gradients and logged values in one graph.

``torch.compile`` guards on whatever the user's code reads (the epoch, an attribute of the module) and compiles another
graph where that changes. Beside each graph the step runs uncompiled once, which tells what is logged and which
parameters a loss reaches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import config as inductor
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_flatten

from lightning_fed.client.stack import Stack
from lightning_fed.client.stacked_log import Entry
from lightning_fed.client.streams import NotStackable

# Shapes of batches beyond these are not compiled: clients of ever new sizes would compile for ever.
MOST_SHAPES = 8


@dataclass
class _Known:
    """What is known of a graph: what is logged, and by name the parameters that a loss reaches."""

    entries: list[Entry]
    reached: list[str]


class CompiledStep:
    """One step of a module's clients; for all rounds of a run.

    Args:
        backend: That of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self._shapes: set[Any] = set()
        self._known: dict[tuple[int, ...], _Known] = {}
        self._is_off = False
        self._here = _Here()
        self._compiled: Any = None
        self._graphs = 0
        self._ran: tuple[int, ...] = ()  # the graphs that the last call ran

    def __getstate__(self) -> dict[str, Any]:
        return {"_backend": self._backend}  # another process compiles for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        CompiledStep.__init__(self, state["_backend"])

    def learn(self, stack: Stack, batch: Any, entries: Sequence[Entry], total: Tensor) -> None:
        """Takes note of a step that ran uncompiled."""
        if self._is_off or len({entry.name for entry in entries}) < len(entries):
            return
        shape = _shape(batch)
        if shape not in self._shapes:
            if len(self._shapes) < MOST_SHAPES:
                self._shapes.add(shape)
            return
        leaves = _leaves_of(total)
        reached = [name for name, parameter in stack.parameters.items() if id(parameter) in leaves]
        self._known[self._ran] = _Known(list(entries), reached)

    @staticmethod
    @contextmanager
    def configured() -> Iterator[None]:
        """For a fit: static shapes, as ``compile(dynamic=False)``, which at each call takes as long as its guards.

        Kernels are compiled by as many processes as this one has threads: each imports torch, which costs a worker that
        has one core more than it gains.
        """
        processes = min(inductor.compile_threads or 1, torch.get_num_threads())
        with (
            torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True),
            inductor.patch(compile_threads=processes),
        ):
            yield

    def run(
        self, stack: Stack, step: Any, batch: Any, batch_idx: int
    ) -> tuple[Tensor, list[Entry], list[Tensor]] | None:
        """The sum of the clients' losses, what they log and its values; ``None`` where the step has to run uncompiled.

        Args:
            stack: The clients' weights.
            step: The user's ``training_step``, as a function of module, batch and its index.
            batch: Every leaf a tensor with the clients in front.
            batch_idx: Its index.
        """
        if self._is_off or _shape(batch) not in self._shapes:
            return None
        self._compiled = self._compiled or self._compile(stack.module, step)
        trained = {name: value.detach() for name, value in stack.parameters.items() if value.requires_grad}
        fixed = {name: value.detach() for name, value in stack.parameters.items() if not value.requires_grad}
        fixed.update(stack.buffers)
        self._here.batch_idx, self._ran = batch_idx, ()
        try:
            with torch.no_grad():
                gradients, (losses, (values, buffers)) = self._compiled(trained, fixed, batch)
        except Exception as error:
            torch._C._autograd._saved_tensors_hooks_enable()  # which a transform that broke off leaves disabled
            self._turn_off(_reason(error))
            return None
        if not self._ran:  # torch gave it up
            self._turn_off(_TOO_OFTEN)
            return None
        known = self._known.get(self._ran)
        if known is None:
            return None
        for name, buffer in stack.buffers.items():
            buffer.copy_(buffers[name])
        parameters = (stack.parameters[name] for name in known.reached)
        total = _Given.apply(losses, [gradients[name] for name in known.reached], *parameters)
        return total, known.entries, [values[entry.name] for entry in known.entries]

    def _turn_off(self, reason: str) -> None:
        self._is_off = True
        rank_zero_warn(f"compile_clients: clients train uncompiled: {reason}.")

    def _numbered(self, graph: Any, inputs: Any) -> Any:
        """A backend of ``torch.compile`` whose graphs tell when they run."""
        made = lookup_backend(self._backend)(graph, inputs)
        number = self._graphs
        self._graphs += 1

        def run(*args: Any) -> Any:
            self._ran += (number,)
            return made(*args)

        return run

    def _compile(self, module: nn.Module, step: Any) -> Any:
        whole, here = _Whole(module, step), self._here

        def one(trained: Any, fixed: Any, batch: Any) -> Any:
            values: dict[str, Tensor] = {}
            module.__dict__["_logged_here"] = values
            # Written to by BatchNorm, which the gradient's transform forbids for what comes from outside.
            fixed = {name: tensor.clone() for name, tensor in fixed.items()}
            held = {f"module.{name}": tensor for name, tensor in (*trained.items(), *fixed.items())}
            given, buffers = functional_call(whole, held, (batch, here))
            loss = given["loss"] if isinstance(given, dict) else given
            logged = {name: value.detach() for name, value in values.items()}
            values.clear()
            module.__dict__["_logged_here"] = None
            return loss.reshape(()), (logged, buffers)

        mapped = vmap(grad_and_value(one, has_aux=True), in_dims=(0, 0, 0))
        return torch.compile(mapped, backend=self._numbered)


class _Here:
    """Where a step is: beside the arguments, whose values would all be guarded on."""

    batch_idx = 0


class _Whole(nn.Module):
    """The user's step as the ``forward`` that ``functional_call`` calls."""

    def __init__(self, module: nn.Module, step: Any) -> None:
        super().__init__()
        self.module = module
        self._step = step

    def forward(self, batch: Any, here: _Here) -> tuple[Any, dict[str, Tensor]]:
        given = self._step(self.module, batch, here.batch_idx)
        return given, dict(self.module.named_buffers())  # as they are now, also those that were put in place of others


class _Given(torch.autograd.Function):
    """The sum of losses whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        if factor.device.type != "cpu" or float(factor) != 1.0:  # to look at a number on a device is to wait for it
            gradients = [gradient * factor for gradient in gradients]
        return None, None, *gradients


def _shape(batch: Any) -> Any:
    if type(batch) is list and all(type(part) is Tensor for part in batch):
        return tuple((part.shape, part.dtype, part.device) for part in batch)
    leaves, tree = tree_flatten(batch)
    return tree, tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else None for leaf in leaves)


def _leaves_of(total: Tensor) -> set[int]:
    """The ids of all tensors that a backward pass from here gives gradients to."""
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


_TOO_OFTEN = "the step was compiled too often, for it reads what changes (the epoch, an attribute of the module)"


def _reason(error: Exception) -> str:
    if isinstance(error, NotStackable):  # torch gave it up: run as written, nobody takes note of what it logs
        return _TOO_OFTEN
    text = " ".join(str(error).split())
    if "compiler" in text.lower() and "found" in text.lower():
        return "no C++ compiler was found (install g++ or clang, or set CXX)"
    return f"{type(error).__name__}: {text[:200]}"
