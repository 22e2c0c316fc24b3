"""What a stack of clients costs: its memory, and where it is expected to be slower than clients one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_fed._compat.torch import TorchDispatchMode, tree_leaves
from lightning_fed.state.access import memory_of

# Measured on CPUs by ``benchmarks/pays.py``: no stack is faster if each client has more bytes than these.
_WEIGHTS, _KEPT = 3 << 20, 6 << 20
# Nor one that keeps more than this in all.
_STACK = 96 << 20
# More clients at once gain little.
_MOST = 32


@dataclass
class StackCost:
    """What each client adds to a stack.

    Attributes:
        weights: The bytes of its parameters and buffers.
        kept: The bytes that a forward pass keeps, for the backward pass where there is one.
    """

    weights: int = 0
    kept: int = 0

    def stack_size(self, device: torch.device, memory: int, must_pay: bool) -> int:
        """Return how many clients to stack: as many as fit in ``memory`` bytes, fewer if they ``must_pay``."""
        most = min(_MOST, memory // max(1, 4 * self.weights + self.kept))
        if must_pay and device.type == "cpu":
            most = min(most, _STACK // max(1, self.kept))
        return max(2, most)

    def why_slower(self, device: torch.device) -> str | None:
        """Return why training so is expected to be slower, a clause; ``None`` if it is not."""
        own = "would be slower vectorized on a CPU (vectorize_clients=8, or another number, does it all the same)"
        if device.type != "cpu":
            return None
        if self.weights > _WEIGHTS:
            return f"with {self.weights / 2**20:.1f} MiB of weights a client they {own}"
        if self.kept > _KEPT:
            return f"with {self.kept / 2**20:.1f} MiB of activations a client they {own}"
        return None


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(memory_of(tensor) for tensor in (*module.parameters(), *module.buffers()))


class Kept(saved_tensors_hooks):
    """Measures the ``bytes`` that a pass keeps: the most that is kept for a backward pass."""

    def __init__(self) -> None:
        super().__init__(self._keep, self._give)
        self.bytes = 0
        self._live: dict[int, int] = {}
        self._is_over = False

    def _keep(self, tensor: Tensor) -> Tensor:
        if self._is_over:  # what comes now may lie where the last pass' tensors lay
            self._live.clear()
            self._is_over = False
        storage = tensor.untyped_storage()
        self._live[storage.data_ptr()] = storage.nbytes()
        self.bytes = max(self.bytes, sum(self._live.values()))
        return tensor

    def _give(self, tensor: Tensor) -> Tensor:
        self._is_over = True
        return tensor


class Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Measures the ``bytes`` of a pass without gradients: an operation's result, and as much that it is made of.

    A view is no result: its memory may be a whole data set's.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {storage.data_ptr() for storage in _storages((args, kwargs))}
        sizes = [storage.nbytes() for storage in _storages(result) if storage.data_ptr() not in read]
        self.bytes = max(self.bytes, 2 * max(sizes, default=0))
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
