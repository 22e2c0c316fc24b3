"""A module's weights as named tensors: reading, loading, checking, averaging, with every dtype kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_fed.errors import ConfigurationError, InvalidUpdateError

Weights = dict[str, Tensor]

# Elements averaged at a time: their float64 scratch memory, one MiB, stays in a processor's cache.
_CHUNK = 1 << 17


def read(module: nn.Module, *, copy: bool = True) -> Weights:
    """The tensors of ``module.state_dict()`` by name, detached.

    Args:
        copy: ``False`` gives the module's own memory, to be read at once and not kept.
    """
    state = {name: value.detach() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {name: value.clone() for name, value in state.items()} if copy else state


def load(module: LightningModule, weights: Mapping[str, Tensor]) -> None:
    """Copies ``weights`` into ``module``; each tensor takes the dtype and device of the module's own.

    Entries of the state dict that are no tensors (``get_extra_state``) stay what they are.
    """
    state = {name: value for name, value in module.state_dict().items() if not isinstance(value, Tensor)}
    module.load_state_dict({**state, **weights}, strict=module.strict_loading)


def parameter_names(module: nn.Module) -> frozenset[str]:
    """The names of parameters, tied ones under each of their names; all other weights are buffers."""
    return frozenset(name for name, _ in module.named_parameters(remove_duplicate=False))


def refuse_lazy(module: nn.Module) -> None:
    """Raises:
    ConfigurationError: If a parameter or buffer has no shape yet.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise ConfigurationError(
            f"{type(module).__name__}.{lazy[0]} is lazy: no batch has given it a shape yet, so there is nothing to send"
            " to the clients. Run one batch through the module before `fit`, or write the layer with its input size.",
            tensor=lazy[0],
        )


def is_averaged(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that a strategy may average: floating or complex, not integer or bool."""
    return tensor.is_floating_point() or tensor.is_complex()


def split(weights: Mapping[str, Tensor]) -> tuple[Weights, Weights]:
    """Parts ``weights`` into what strategies average and the integer and bool tensors, which are averaged apart."""
    averaged = {name: value for name, value in weights.items() if is_averaged(value)}
    return averaged, {name: value for name, value in weights.items() if name not in averaged}


def _is_finite(tensor: Tensor) -> bool:
    if not is_averaged(tensor) or tensor.numel() == 0:
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:  # float8 has no aminmax
        tensor = tensor.float()
    if math.isfinite(tensor.sum().item()):  # NaN and Inf would show in it; the other way round it may only overflow
        return True
    # aminmax carries NaN and Inf through and needs no scratch memory, which isfinite().all() does.
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def check_reply(
    averaged: Mapping[str, Tensor], integers: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> None:
    """Checks a client's weights, which come in two parts, against the global ones.

    Args:
        averaged: What strategies average.
        integers: The integer and bool tensors, which would take the place of an averaged tensor of their name.
        reference: The global weights.

    Raises:
        InvalidUpdateError: If a tensor came in the wrong part, or as ``check_update`` says.
    """
    for part, what, belongs in ((averaged, "floating and complex", True), (integers, "integer and bool", False)):
        for name in part:
            if name in reference and is_averaged(reference[name]) is not belongs:
                raise InvalidUpdateError(
                    f"sent {name!r} among its {what} tensors, the global model has it as {_dtype(reference[name])}.",
                    tensor=name,
                )
    check_update({**averaged, **integers}, reference)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_alike(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether one tensor's numbers can stand for the other's: bfloat16 travels as float32."""
    both_floating = dtype.is_floating_point and other.is_floating_point
    return dtype == other or both_floating or (dtype.is_complex and other.is_complex)


def check_update(update: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    """Checks a client's weights against the global ones.

    Raises:
        InvalidUpdateError: If a name is missing or unknown, a shape or kind of dtype differs, or a value is NaN or Inf;
            it names the first such tensor.
    """
    for name in reference:
        if name not in update:
            raise InvalidUpdateError(f"sent no {name!r}. Every client must build the same module.", tensor=name)
    for name, tensor in update.items():
        if name not in reference:
            raise InvalidUpdateError(
                f"sent {name!r}, which the global model does not have. Every client must build the same module.",
                tensor=name,
            )
        if tensor.shape != reference[name].shape:
            raise InvalidUpdateError(
                f"sent {name!r} of shape {tuple(tensor.shape)}, the global model has {tuple(reference[name].shape)}."
                " Every client must build the same module.",
                tensor=name,
            )
        if not _is_alike(tensor.dtype, reference[name].dtype):
            raise InvalidUpdateError(
                f"sent {name!r} as {_dtype(tensor)}, the global model has {_dtype(reference[name])}. Floating tensors"
                " may differ in width; integer and bool ones keep their dtype.",
                tensor=name,
            )
        if not _is_finite(tensor):
            raise InvalidUpdateError(
                f"sent {name!r} with NaN or Inf in it. A smaller learning rate or `gradient_clip_val=` keeps local"
                " training finite; `FaultTolerance(min_results=...)` goes on without such clients.",
                tensor=name,
            )


class RunningMean:
    """A weighted mean of weights that is built up one client at a time.

    ``m += (w - m) * n / N`` in float64 (complex128 for complex tensors), ``N`` the sum of the ``n`` so far: memory does
    not grow with the number of clients, and the mean of one client is that client, bit for bit.

    >>> mean = RunningMean()
    >>> mean.add({"w": torch.tensor([0.0])}, 1)
    >>> mean.add({"w": torch.tensor([3.0])}, 2)
    >>> mean.value()
    {'w': tensor([2.])}
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._mean: Weights = {}
        self._dtype: dict[str, torch.dtype] = {}
        self._origin: Weights = {}

    def add(self, weights: Mapping[str, Tensor], coefficient: float) -> None:
        """Takes one client's ``weights`` in with the averaging ``coefficient`` (> 0), such as its ``num_examples``."""
        if not coefficient > 0:
            raise ValueError(f"RunningMean.add(..., {coefficient!r}): an averaging coefficient is greater than zero.")
        self.total += coefficient
        for name, tensor in weights.items():
            self._dtype.setdefault(name, tensor.dtype)
            if not is_averaged(tensor):
                # float64 holds no integer beyond 2**53: what is averaged is the distance from the first client's.
                whole = tensor.to(torch.int64, copy=True)
                tensor = whole - self._origin.setdefault(name, whole)
            if name in self._mean:
                _move(self._mean[name], tensor, coefficient / self.total)
            else:
                wide = torch.complex128 if tensor.is_complex() else torch.float64
                self._mean[name] = tensor.detach().to(wide, copy=True, memory_format=torch.contiguous_format)

    def value(self) -> Weights:
        """The mean, each tensor in the dtype of the first client's; integers and bools rounded, halves up."""
        return {name: _narrow(mean, self._dtype[name], self._origin.get(name)) for name, mean in self._mean.items()}


def _move(mean: Tensor, tensor: Tensor, share: float) -> None:
    flat, source = mean.view(-1), tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        # As m + (w - m) * share, in one pass; beyond one half torch starts from the other end.
        flat[start : start + _CHUNK].lerp_(source[start : start + _CHUNK].to(mean.dtype), share)


def _narrow(mean: Tensor, dtype: torch.dtype, origin: Tensor | None) -> Tensor:
    if origin is None:
        return mean.to(dtype, copy=True)
    return (origin + (mean + 0.5).floor().to(torch.int64)).to(dtype)
