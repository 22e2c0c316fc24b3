"""A module's weights as named tensors: reading, loading, checking, with every dtype kept."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_fed._compat.torch import (
    buffers_in,
    loads_as_torch,
    parameters_in,
    set_versions,
    versions_of,
    watches_loading,
)
from lightning_fed.errors import ConfigurationError, InvalidUpdateError

Weights = dict[str, Tensor]


def read(module: nn.Module, *, copy: bool = True) -> Weights:
    """Return the tensors of ``module.state_dict()`` by name, detached.

    Args:
        copy: ``False`` gives the module's own memory, to be read at once and not kept.
    """
    state = {name: value.detach() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {name: value.clone() for name, value in state.items()} if copy else state


def load(module: LightningModule, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into ``module``; each tensor takes the dtype and device of the module's own.

    Entries of the state dict that are no tensors (``get_extra_state``) stay what they are. The module never holds one
    of the given tensors afterwards, whatever its own code does with them.
    """
    present = module.state_dict()
    state = OrderedDict((name, value) for name, value in present.items() if not isinstance(value, Tensor))
    copied = _copied_by_torch(module)
    state.update((name, tensor if name in copied else tensor.clone()) for name, tensor in weights.items())
    # The versions of its layers: without them some take what they get for that of an old release.
    set_versions(state, versions_of(present))
    module.load_state_dict(state, strict=module.strict_loading)


def _copied_by_torch(module: nn.Module) -> set[str]:
    """Return the parameters and buffers into which torch's own code copies what is loaded.

    All else may keep the very tensor that it gets: a torchmetrics metric its states, ``set_extra_state``, a hook, a
    ``load_state_dict`` of the user's with ``assign=True``.
    """
    if getattr(module.load_state_dict, "__func__", None) is not nn.Module.load_state_dict:
        return set()
    names: set[str] = set()
    for prefix, child in module.named_modules(remove_duplicate=False):
        if watches_loading(child):  # these see everything that is loaded
            return set()
        own = (*parameters_in(child).keys(), *buffers_in(child).keys())
        if own and loads_as_torch(child):
            path = f"{prefix}." if prefix else ""
            names.update(path + name for name in own)
    return names


def parameter_names(module: nn.Module) -> frozenset[str]:
    """Return the entries of the state dict that are parameters, whatever it calls them; all others are buffers.

    Tied parameters have all their names. A state dict may be renamed by an override, a hook or a package such as peft.
    """
    state = read(module, copy=False)
    parameters, buffers = ({place_of(tensor) for tensor in own} for own in (module.parameters(), module.buffers()))
    names = {name for name, tensor in state.items() if place_of(tensor) in parameters}
    others = {name: tensor for name, tensor in state.items() if is_averaged(tensor) and name not in names}
    unclear = {name: tensor.clone() for name, tensor in others.items() if place_of(tensor) not in buffers}
    return frozenset(names | _moving(module, module.parameters(), unclear) if unclear else names)


def entries_of_parameters(module: nn.Module) -> dict[str, str]:
    """Return for each parameter, under all its names, the entry of the state dict that is it, or that changes with it.

    The names of both are mostly the same; a state dict may be renamed. A parameter that is not in it has none.
    """
    state, named = read(module, copy=False), dict(module.named_parameters(remove_duplicate=False))
    places = {place_of(tensor): name for name, tensor in state.items() if tensor.numel()}
    entries = {name: places.get(place_of(p.detach())) for name, p in named.items()}
    buffers = {place_of(tensor) for tensor in module.buffers()} | {place_of(p.detach()) for p in named.values()}
    unclear = {n: t.clone() for n, t in state.items() if is_averaged(t) and t.numel() and place_of(t) not in buffers}
    for name, parameter in named.items():
        if unclear and entries[name] is None and is_averaged(parameter):
            entries[name] = min(_moving(module, [parameter], unclear), default=None)
    return {name: entry for name, entry in entries.items() if entry is not None}


def place_of(tensor: Tensor) -> tuple[object, ...]:
    """Return where a tensor is in memory, and how it lies there."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@torch.no_grad()
def _moving(module: nn.Module, parameters: Iterable[Tensor], entries: Weights) -> set[str]:
    """Return which entries of a state dict change with some parameters, where it has copies of them."""
    kept = [(parameter, parameter.clone()) for parameter in parameters if is_averaged(parameter)]
    try:
        for parameter, value in kept:
            parameter.copy_(value == 0)
        after = read(module, copy=False)
        return {name for name, value in entries.items() if not torch.equal(after[name], value)}
    finally:
        for parameter, value in kept:
            parameter.copy_(value)


def refuse_unfit(module: nn.Module) -> None:
    """Check that a module's weights can travel.

    Raises:
        ConfigurationError: If a parameter or buffer has no shape yet, or a tensor of the state dict is sparse.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise ConfigurationError(
            f"{type(module).__name__}.{lazy[0]} is lazy: no batch has given it a shape yet, so there is nothing to send"
            " to the clients. Run one batch through the module before `fit`, or write the layer with its input size.",
            tensor=lazy[0],
        )
    for name, tensor in read(module, copy=False).items():
        if tensor.layout is not torch.strided:
            raise ConfigurationError(
                f"{type(module).__name__}.{name} is a sparse tensor in the state dict, of which there is no mean over"
                " clients. Register it with persistent=False if no client changes it, or make it dense.",
                tensor=name,
            )


def is_averaged(tensor: Tensor) -> bool:
    """Return whether a tensor holds numbers that a strategy may average: floating or complex, not integer or bool."""
    return tensor.is_floating_point() or tensor.is_complex()


def size_of(*weights: Mapping[str, Tensor]) -> int:
    """Return how many bytes tensors have."""
    return sum(tensor.nbytes for one in weights for tensor in one.values())


def is_finite(tensor: Tensor) -> bool:
    """Return whether all of a tensor's elements are finite."""
    if not is_averaged(tensor) or tensor.numel() == 0:
        return True
    tensor = _real(tensor)
    if math.isfinite(tensor.sum().item()):  # NaN and Inf would show in it; the other way round it may only overflow
        return True
    # aminmax carries NaN and Inf through and needs no scratch memory, which isfinite().all() does.
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _most(dtype: torch.dtype) -> float:
    """Return the greatest number that a weight may be: with a square, which norms and second moments are made of."""
    return 1e150 if dtype in (torch.float64, torch.complex128) else min(1e18, torch.finfo(dtype).max)


def _is_usable(tensor: Tensor, reference: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor Inf nor numbers that are too large, where the global one has none.

    Masks have -Inf or the least float, and some tensors are NaN at first.
    """
    if not is_averaged(tensor) or tensor.numel() == 0:
        return True
    tensor = _real(tensor)
    # torch compares in the tensor's own dtype, where a number beyond it is Inf.
    most = min(_most(reference.dtype), torch.finfo(tensor.dtype).max)
    norm = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)).item()
    if norm <= most:  # which no NaN is
        return True
    reference = _real(reference.to(tensor.device))
    size, known = tensor.abs(), reference.abs()
    nearer_zero = (known > most) & known.isfinite() & (size <= known) & (tensor.sign() == reference.sign())
    return bool(((size <= most) | reference.isnan() | nearer_zero | (tensor == reference)).all())


def _real(tensor: Tensor) -> Tensor:
    """Return a tensor of real numbers with which torch computes: complex ones as two, float8 as float32."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.element_size() == 1 else tensor


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's own name.

    >>> dtype_name(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")


def as_global(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Weights:
    """Return a client's floating and complex weights in the order of the global ones, none of them narrower.

    Strategies go by position, and add up in the dtype that they get.
    """
    return {name: _widened(weights[name], tensor.dtype) for name, tensor in reference.items() if name in weights}


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    if tensor.element_size() == 1:  # float8, of which torch knows no common dtype with others
        tensor = tensor.float()
    return tensor.to(torch.promote_types(tensor.dtype, dtype if dtype.itemsize > 1 else torch.float32))


def _is_alike(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Return whether one tensor's numbers can stand for the other's: bfloat16 travels as float32."""
    both_floating = dtype.is_floating_point and other.is_floating_point
    return dtype == other or both_floating or (dtype.is_complex and other.is_complex)


def check_update(
    update: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    who: str = "the global model",
    rule: str = "Every client must build the same module.",
) -> None:
    """Check a client's weights against the global ones.

    Args:
        update: The client's.
        reference: The global ones.
        who: Who has these, in an error.
        rule: What to do about it.

    Raises:
        InvalidUpdateError: If a name is missing or unknown, a shape or kind of dtype differs, or a value is NaN, Inf or
            too large to have a square where the global one is not; it names the first such tensor.
    """
    for name in reference:
        if name not in update:
            raise InvalidUpdateError(f"sent no {name!r}. {rule}", tensor=name)
    for name, tensor in update.items():
        if name not in reference:
            raise InvalidUpdateError(f"sent {name!r}, which {who} does not have. {rule}", tensor=name)
        if tensor.shape != reference[name].shape:
            raise InvalidUpdateError(
                f"sent {name!r} of shape {tuple(tensor.shape)}, {who} has {tuple(reference[name].shape)}. {rule}",
                tensor=name,
            )
        if not _is_alike(tensor.dtype, reference[name].dtype):
            raise InvalidUpdateError(
                f"sent {name!r} as {dtype_name(tensor.dtype)}, {who} has {dtype_name(reference[name].dtype)}."
                " Floating tensors may differ in width; integer and bool ones keep their dtype.",
                tensor=name,
            )
        if not _is_usable(tensor, reference[name]):
            what = f"numbers beyond {_most(reference[name].dtype):g}" if is_finite(tensor) else "NaN or Inf"
            raise InvalidUpdateError(f"sent {name!r} with {what} in it. {_way_out(reference)}", tensor=name)


def _way_out(reference: Mapping[str, Tensor]) -> str:
    floating = {name: tensor.float() for name, tensor in reference.items() if tensor.is_floating_point()}
    nan = ", ".join([repr(name) for name, tensor in floating.items() if tensor.isnan().any()][:3])
    return (
        f"{f'The global {nan} had NaN in it before: begin with finite weights, if it is not meant so. ' if nan else ''}"
        "A smaller learning rate or `gradient_clip_val=` keeps local training finite;"
        " `FaultTolerance(min_results=...)` goes on without such clients."
    )


def is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same memory."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride())


def share_weights(weights: Sequence[Mapping[str, Tensor]]) -> bool:
    """Return whether all clients have the very same tensors."""
    return all(is_same(tensor, other[name]) for other in weights[1:] for name, tensor in weights[0].items())
