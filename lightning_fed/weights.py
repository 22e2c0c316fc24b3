"""A module's weights as named tensors: reading, loading, checking, averaging, with every dtype kept."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_fed.errors import ConfigurationError, InvalidUpdateError

Weights = dict[str, Tensor]

_LEAST = torch.iinfo(torch.int64).min
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

    Entries of the state dict that are no tensors (``get_extra_state``) stay what they are. The module never holds one
    of the given tensors afterwards, whatever its own code does with them.
    """
    present = module.state_dict()
    state = OrderedDict((name, value) for name, value in present.items() if not isinstance(value, Tensor))
    copied = _copied_by_torch(module)
    state.update((name, tensor if name in copied else tensor.clone()) for name, tensor in weights.items())
    # The versions of its layers: without them some take what they get for that of an old release.
    state._metadata = getattr(present, "_metadata", {})  # type: ignore[attr-defined]
    module.load_state_dict(state, strict=module.strict_loading)


def _copied_by_torch(module: nn.Module) -> set[str]:
    """The parameters and buffers into which torch's own code copies what is loaded.

    All else may keep the very tensor that it gets: a torchmetrics metric its states, ``set_extra_state``, a hook, a
    ``load_state_dict`` of the user's with ``assign=True``.
    """
    if getattr(module.load_state_dict, "__func__", None) is not nn.Module.load_state_dict:
        return set()
    names: set[str] = set()
    for prefix, child in module.named_modules(remove_duplicate=False):
        if child._load_state_dict_pre_hooks:  # these see everything that is loaded
            return set()
        load = getattr(child._load_from_state_dict, "__func__", None)
        if getattr(load, "__module__", "").startswith("torch.nn."):
            path = f"{prefix}." if prefix else ""
            names.update(path + name for name in (*child._parameters.keys(), *child._buffers.keys()))
    return names


def parameter_names(module: nn.Module) -> frozenset[str]:
    """The entries of the state dict that are parameters, whatever it calls them; all others are buffers.

    Tied parameters have all their names. A state dict may be renamed by an override, a hook or a package such as peft.
    """
    state = read(module, copy=False)
    parameters, buffers = ({_place(tensor) for tensor in own} for own in (module.parameters(), module.buffers()))
    names = {name for name, tensor in state.items() if _place(tensor) in parameters}
    others = {name: tensor for name, tensor in state.items() if is_averaged(tensor) and name not in names}
    unclear = {name: tensor.clone() for name, tensor in others.items() if _place(tensor) not in buffers}
    return frozenset(names | _moving(module, unclear) if unclear else names)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor is in memory, and how it lies there."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@torch.no_grad()
def _moving(module: nn.Module, entries: Weights) -> set[str]:
    """Which entries of a state dict change with the parameters, where it has copies of them."""
    kept = [(parameter, parameter.clone()) for parameter in module.parameters() if is_averaged(parameter)]
    try:
        for parameter, value in kept:
            parameter.copy_(value == 0)
        after = read(module, copy=False)
        return {name for name, value in entries.items() if not torch.equal(after[name], value)}
    finally:
        for parameter, value in kept:
            parameter.copy_(value)


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


def _is_finite_where(tensor: Tensor, reference: Tensor) -> bool:
    """Whether a tensor is finite where the global one is. There are masks of -Inf, and what is NaN until it is set."""
    tensor, reference = (one.double() if one.element_size() == 1 else one for one in (tensor, reference))
    return not bool((torch.isfinite(reference.to(tensor.device)) & ~torch.isfinite(tensor)).any())


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
        InvalidUpdateError: If a name is missing or unknown, a shape or kind of dtype differs, or a value is NaN or Inf
            where the global one is neither; it names the first such tensor.
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
        if not _is_finite(tensor) and not _is_finite_where(tensor, reference[name]):
            raise InvalidUpdateError(f"sent {name!r} with NaN or Inf in it. {_way_out(reference)}", tensor=name)


def _way_out(reference: Mapping[str, Tensor]) -> str:
    floating = {name: tensor.float() for name, tensor in reference.items() if tensor.is_floating_point()}
    nan = ", ".join([repr(name) for name, tensor in floating.items() if tensor.isnan().any()][:3])
    return (
        f"{f'The global {nan} had NaN in it before: begin with finite weights, if it is not meant so. ' if nan else ''}"
        "A smaller learning rate or `gradient_clip_val=` keeps local training finite;"
        " `FaultTolerance(min_results=...)` goes on without such clients."
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
        self._order: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        self._origin: Weights = {}
        self._infinite: set[str] = set()

    def add(self, weights: Mapping[str, Tensor], coefficient: float) -> None:
        """Takes one client's ``weights`` in with the averaging ``coefficient`` (> 0), such as its ``num_examples``."""
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
            # Each mean lies in memory as the first client's tensor: to read across its rows would cost more than to add.
            tensor = tensor.detach().permute(self._order[name])
            if name in self._infinite:
                mean = self._mean[name]  # of equal infinities the mean is that infinity, and not NaN
                tensor = tensor.to(mean.dtype)
                mean.copy_(torch.where(tensor == mean, mean, mean + (tensor - mean) * (coefficient / self.total)))
            elif name in self._mean:
                _move(self._mean[name], tensor, coefficient / self.total)
            else:
                wide = torch.complex128 if tensor.is_complex() else torch.float64
                self._mean[name] = tensor.to(wide, copy=True, memory_format=torch.contiguous_format)
                if not _is_finite(tensor):
                    self._infinite.add(name)

    def value(self) -> Weights:
        """The mean, each tensor in the dtype of the first client's; integers and bools rounded, halves up."""
        means = {name: mean.permute(_inverse(self._order[name])) for name, mean in self._mean.items()}
        return {name: _narrow(mean, self._dtype[name], self._origin.get(name)) for name, mean in means.items()}


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions as they follow one another in memory."""
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    stride = tensor.stride()
    return tuple(sorted(range(len(stride)), key=stride.__getitem__, reverse=True))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


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
