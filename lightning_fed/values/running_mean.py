"""The mean of clients' weights, built up one client at a time, with every dtype kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fed.values.weights import Weights, is_averaged, is_finite

_LEAST = torch.iinfo(torch.int64).min
# Elements averaged at a time: their float64 scratch memory, one MiB, stays in a processor's cache.
_CHUNK = 1 << 17


class RunningMean:
    """A weighted mean of weights that is built up one client at a time.

    ``m += (w - m) * n / N`` in float64 (complex128 for complex tensors), ``N`` the sum of the ``n`` so far: memory does
    not grow with the number of clients, and the mean of one client is that client, bit for bit.

    Args:
        like: The global weights. They tell each tensor's dtype, and which ones may hold infinities; of others the first
            client's does.

    >>> mean = RunningMean()
    >>> mean.add({"w": torch.tensor([0.0])}, 1)
    >>> mean.add({"w": torch.tensor([3.0])}, 2)
    >>> mean.value()
    {'w': tensor([2.])}
    """

    def __init__(self, like: Mapping[str, Tensor] | None = None) -> None:
        self.total = 0.0
        self._mean: Weights = {}
        self._order: dict[str, tuple[int, ...]] = {}
        self._dtype = {name: tensor.dtype for name, tensor in (like or {}).items()}
        self._origin: Weights = {}
        self._infinite = {name for name, tensor in (like or {}).items() if not is_finite(tensor)}

    def add(self, weights: Mapping[str, Tensor], coefficient: float) -> None:
        """Take one client's ``weights`` in with the averaging ``coefficient`` (> 0), such as its ``num_examples``."""
        if not coefficient > 0:
            raise ValueError(f"RunningMean.add(..., {coefficient!r}): an averaging coefficient is greater than zero.")
        self.total += coefficient
        for name, tensor in weights.items():
            self._dtype.setdefault(name, tensor.dtype)
            if not is_averaged(tensor):
                # float64 holds no integer beyond 2**53: what is averaged is the distance from the first client's.
                whole = _whole(tensor)
                tensor = _distance(whole, self._origin.setdefault(name, whole))
            if name not in self._order:
                self._order[name] = _order(tensor)
            # Each mean lies in memory as the first client's tensor: to read across rows would take longer than to add.
            tensor = tensor.detach().resolve_conj().resolve_neg().permute(self._order[name])
            if name in self._infinite:
                self._mean[name] = _moved(self._mean.get(name), tensor, coefficient / self.total)
            elif name in self._mean:
                _move(self._mean[name], tensor, coefficient / self.total)
            else:
                self._mean[name] = _wide(tensor)
                if not is_finite(tensor):
                    self._infinite.add(name)

    def value(self) -> Weights:
        """Return the mean, each tensor in its dtype; integers and bools rounded, halves up."""
        means = {name: mean.permute(_inverse(self._order[name])) for name, mean in self._mean.items()}
        return {name: _narrow(mean, self._dtype[name], self._origin.get(name)) for name, mean in means.items()}


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Return the dimensions as they follow one another in memory."""
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    stride = tensor.stride()
    return tuple(sorted(range(len(stride)), key=stride.__getitem__, reverse=True))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _wide(tensor: Tensor) -> Tensor:
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.to(wide, copy=True, memory_format=torch.contiguous_format)


def _moved(mean: Tensor | None, tensor: Tensor, share: float) -> Tensor:
    """Do as ``_move``; the mean of an infinity and a number is that infinity, and of two that differ it is NaN."""
    wide = _wide(tensor)
    if mean is None:
        return wide
    return torch.where(torch.isinf(mean) | torch.isinf(wide), mean + wide, mean + (wide - mean) * share)


def _move(mean: Tensor, tensor: Tensor, share: float) -> None:
    flat, source = mean.view(-1), tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        # As m + (w - m) * share, in one pass; beyond one half torch starts from the other end.
        flat[start : start + _CHUNK].lerp_(source[start : start + _CHUNK].to(mean.dtype), share)


def _narrow(mean: Tensor, dtype: torch.dtype, origin: Tensor | None) -> Tensor:
    if origin is None:
        return mean.to(dtype, copy=True, memory_format=torch.contiguous_format)
    # In two parts: a distance of 2**63 and more is no int64, while the sum is one again.
    distance = (mean + 0.5).floor()
    high = (distance / 2**32).floor()
    value = origin + (high.to(torch.int64) << 32) + (distance - high * 2**32).to(torch.int64)
    return (value ^ _LEAST).view(dtype) if dtype is torch.uint64 else value.to(dtype)


def _whole(tensor: Tensor) -> Tensor:
    """Integers or bools as int64, in the same order."""
    if tensor.dtype is torch.uint64:
        return tensor.detach().contiguous().view(torch.int64) ^ _LEAST
    return tensor.detach().to(torch.int64, copy=True)


def _distance(whole: Tensor, origin: Tensor) -> Tensor:
    """``whole - origin`` in float64, exact below 2**53, also where int64 cannot hold it."""
    difference = whole - origin
    wrapped = ((whole ^ origin) & (whole ^ difference)) < 0
    return torch.where(wrapped, whole.double() - origin.double(), difference.double())
