"""Many clients' weights in one module: every parameter and buffer with the clients in front, (clients, ...).

The user's own step runs under ``torch.func.vmap`` and sees one client's weights and batch. The sum of the clients'
losses has each client's own gradient in its row, so backward, clipping, optimizers and schedulers act on stacked
tensors as they are, as long as they act element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.optim import Optimizer

from lightning_fed._compat.torch import buffers_in, parameters_in, tree_flatten, tree_unflatten
from lightning_fed.client.vectorized.rng import DrawsApart, NotStackable, Streams
from lightning_fed.values.weights import Weights, is_same

# What they do to an element of a parameter depends on that element's gradients alone.
ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")
)


@dataclass
class _Slot:
    """A parameter or buffer: its own tensor, its names, and where the module holds it."""

    own: Tensor
    is_parameter: bool
    is_of_linear: bool = False
    names: list[str] = field(default_factory=list)
    places: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def hold(self, tensor: Tensor) -> None:
        """Put a tensor where the module looks for it."""
        for place, key in self.places:
            place[key] = tensor


class Stack:
    """The stacked weights of some clients, and the module that holds them for a while.

    ``parameters`` and ``buffers`` are the stacked tensors by name, tied ones under their first.

    Args:
        module: The module, with weights of its own.
        weights: What each client begins with; tensors that all have in common are not read twice.
        streams: The clients' random streams.
        draws: Whether the module's steps draw random numbers; if not, one that does is refused.
    """

    def __init__(
        self, module: nn.Module, weights: Sequence[Mapping[str, Tensor]], streams: Streams, draws: bool
    ) -> None:
        self.module, self.size, self.streams, self.draws = module, len(weights), streams, draws
        self._weights = weights
        self._slots: list[_Slot] = []
        self._values: list[Tensor] = []
        self._optimizers: Sequence[Optimizer] = ()
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}

    def install(self, optimizers: Sequence[Optimizer] = (), compiled: bool = False) -> None:
        """Give the module and its optimizers the stacked tensors in place of its own.

        Args:
            optimizers: Those that step its parameters.
            compiled: Whether most steps will be compiled ones.

        Raises:
            NotStackable: If an optimizer is not known to act element by element.
        """
        for optimizer in optimizers:
            if type(optimizer) not in ELEMENTWISE:
                raise NotStackable(f"{type(optimizer).__name__} is not known to act element by element")
        self._slots = _slots(self.module)
        stacked: dict[Tensor, Tensor] = {}
        for slot in self._slots:
            # As the batched product gives its gradient: else each step would copy that into another order.
            value = self._stacked(slot, transposed=slot.is_of_linear and not compiled)
            if slot.is_parameter:
                value = nn.Parameter(value, requires_grad=slot.own.requires_grad)
                value.__dict__.update(slot.own.__dict__)
            stacked[slot.own] = value
            slot.hold(value)
        self._values = list(stacked.values())
        for slot, value in zip(self._slots, self._values, strict=True):
            (self.parameters if slot.is_parameter else self.buffers)[slot.names[0]] = value
        self._optimizers = optimizers
        for optimizer in optimizers:
            self._move(optimizer, stacked)

    def restore(self) -> None:
        """Give the module its own tensors back, and lets the stacked ones go, which reference cycles would keep."""
        for slot in self._slots:
            slot.hold(slot.own)
        self._weights, self._slots, self._values, self.parameters, self.buffers = [], [], [], {}, {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["params"] = []

    def held(self) -> list[Tensor]:
        """Return the stacked tensors, which the module holds."""
        return self._values

    def results(self) -> list[Weights]:
        """Return each client's weights, rows of the stacked tensors."""
        if any(slot.own.grad is not None for slot in self._slots):
            raise NotStackable("its step uses parameters that are kept in an attribute, too")
        state = {name: value.detach() for name, value in self.module.state_dict().items() if isinstance(value, Tensor)}
        for name, value in state.items():
            if not value.dim() or len(value) != self.size:
                raise NotStackable(f"its state_dict has {name!r}, which is no parameter or buffer")
        return [
            dict(zip(state, rows, strict=True))
            for rows in zip(*(value.unbind() for value in state.values()), strict=True)
        ]

    def call(self, function: Callable[[Any], list[Tensor]], batch: Any, rows: Tensor | None) -> list[Tensor]:
        """Call ``function(batch)`` for each client under vmap, with the module holding the client's weights.

        Args:
            function: Gives tensors.
            batch: A batch whose tensors have the clients in front, (clients, ...).
            rows: Which clients these are, (clients,) int64; ``None`` for all.

        Returns:
            What the function gave, with the clients in front.
        """
        leaves, tree = tree_flatten(batch)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        values = self._values if rows is None else [value.index_select(0, rows) for value in self._values]

        def one(held: list[Tensor], tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            for slot, tensor in zip(self._slots, held, strict=bool(held)):
                slot.hold(tensor)
            own = list(leaves)
            for i, tensor in zip(where, tensors, strict=True):
                own[i] = tensor
            given = function(tree_unflatten(own, tree))
            return given, [self._held(slot) for slot in self._slots if held and not slot.is_parameter]

        with self._apart(rows), self._values_kept():
            mapped = vmap(one, randomness="different" if self.draws else "error")
            given, buffers = mapped(values, [leaves[i] for i in where])
        if self._values:
            self._take_over(buffers, values, rows)
        return given

    @contextmanager
    def _values_kept(self) -> Iterator[None]:
        try:
            yield
        finally:
            for slot, value in zip(self._slots, self._values, strict=bool(self._values)):
                slot.hold(value)

    def _apart(self, rows: Tensor | None) -> Any:
        if not self.draws:
            return nullcontext()
        return DrawsApart(self.streams, range(self.size) if rows is None else rows.tolist())

    @torch.no_grad()
    def _take_over(self, new: list[Tensor], passed: list[Tensor], rows: Tensor | None) -> None:
        """Keep what became of the buffers; those written in place are there already."""
        buffers = [i for i, slot in enumerate(self._slots) if not slot.is_parameter]
        for i, tensor in zip(buffers, new, strict=True):
            if rows is not None:
                self._values[i].index_copy_(0, rows, tensor.to(self._values[i].dtype))
            elif tensor.data_ptr() != passed[i].data_ptr():
                self._values[i].copy_(tensor)

    def _held(self, slot: _Slot) -> Tensor:
        place, key = slot.places[0]
        return place[key]

    def _stacked(self, slot: _Slot, transposed: bool) -> Tensor:
        name = next((name for name in slot.names if name in self._weights[0]), None)
        given = [slot.own.detach()] if name is None else [weights[name] for weights in self._weights]
        alike = all(is_same(given[0], other) for other in given)
        own = [one.to(slot.own.device, slot.own.dtype) for one in (given[:1] if alike else given)]
        if transposed:
            own = [one.mT for one in own]
        stacked = own[0].new_empty(self.size, *own[0].shape)
        if alike:
            stacked.copy_(own[0])
        else:
            torch.stack(own, out=stacked)
        return stacked.mT if transposed else stacked

    def _move(self, optimizer: Optimizer, stacked: Mapping[Tensor, Tensor]) -> None:
        for group in optimizer.param_groups:
            if any(own not in stacked for own in group["params"]):
                raise NotStackable(f"its {type(optimizer).__name__} has a tensor that is no parameter of the module")
            group["params"] = [stacked[own] for own in group["params"]]
        for own, state in list(optimizer.state.items()):  # Adagrad begins with one
            optimizer.state[stacked[own]] = {
                key: value.expand(self.size, *own.shape).clone() if _is_like(value, own) else value
                for key, value in state.items()
            }
            del optimizer.state[own]


def _is_like(value: Any, own: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == own.shape and value.dim() > 0


def _slots(module: nn.Module) -> list[_Slot]:
    """Return all parameters and buffers, tied ones once."""
    slots: dict[int, _Slot] = {}
    for prefix, child in module.named_modules():
        for store, is_parameter in ((parameters_in(child), True), (buffers_in(child), False)):
            for key, tensor in store.items():
                if tensor is not None:
                    slot = slots.setdefault(id(tensor), _Slot(tensor, is_parameter))
                    slot.is_of_linear |= isinstance(child, nn.Linear) and key == "weight"
                    slot.names.append(f"{prefix}.{key}" if prefix else key)
                    slot.places.append((store, key))
    return list(slots.values())


def clip_each_by_norm(optimizer: Optimizer, clip_val: float) -> None:
    """Clip the norm of each client's gradients, as ``torch.nn.utils.clip_grad_norm_`` does for one."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return
    norms = torch.stack([torch.linalg.vector_norm(grad.reshape(len(grad), -1), dim=1) for grad in grads])
    factor = (clip_val / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)))
