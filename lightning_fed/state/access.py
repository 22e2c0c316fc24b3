"""How the content of tensors, arrays and pieces of memory is copied, compared and restored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fed._compat.torch import indices_and_values, stored, version_of

_SAMPLE = 1024


@dataclass(frozen=True, slots=True)
class ContentAccess:
    """How the content of tensors, or of arrays, is read and written.

    Attributes:
        copy: A copy of the content.
        put: Writes a copy back.
        equal: Whether the content is that of a copy, bit for bit.
        mark: What tells most changes without reading all; with a sample of the elements if the second argument is true.
    """

    copy: Callable[[Any], Any]
    put: Callable[[Any, Any], None]
    equal: Callable[[Any, Any], bool]
    mark: Callable[[Any, bool], tuple[Any, ...]]


def _without_repeats(tensor: Tensor) -> Tensor:
    """Return a view of a tensor in which no element of an expanded one comes twice."""
    if tensor.is_contiguous():
        return tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _copy_tensor(tensor: Tensor) -> Tensor:
    return _without_repeats(tensor.detach()).clone()


def _put_tensor(tensor: Tensor, copy: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()):
        _without_repeats(tensor.detach()).copy_(copy)


def _equal_tensor(tensor: Tensor, copy: Tensor) -> bool:
    now = _without_repeats(tensor.detach())
    if now.shape != copy.shape or not (now.is_floating_point() or now.is_complex()):
        return torch.equal(now, copy)
    return torch.equal(_bits(now), _bits(copy))


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes, of which NaN's are equal, too, and the zeros are not."""
    flat = tensor.resolve_conj().resolve_neg().reshape(-1)
    if flat.stride(0) != 1:  # one element of an expanded tensor
        flat = flat.new_empty(flat.shape).copy_(flat)
    return flat.view(torch.uint8)


def _mark_tensor(tensor: Tensor, samples: bool) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else version_of(tensor)
    if not samples:
        return version, None
    if tensor.is_contiguous():
        flat = tensor.detach().view(-1)
        return version, _bits(flat[:: max(1, flat.numel() // _SAMPLE)].clone())
    each = max(2, round(_SAMPLE ** (1 / tensor.dim())))
    some = _without_repeats(tensor.detach())[tuple(slice(None, None, max(1, size // each)) for size in tensor.shape)]
    return version, _bits(some)


def _put_sparse(tensor: Tensor, copy: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(copy)


def _equal_sparse(tensor: Tensor, copy: Tensor) -> bool:
    return (
        tensor.shape == copy.shape
        and tensor.is_coalesced() == copy.is_coalesced()
        and all(map(_equal_tensor, indices_and_values(tensor), indices_and_values(copy)))
    )


def _mark_sparse(tensor: Tensor, samples: bool) -> tuple[Any, ...]:
    _, values = indices_and_values(tensor)
    return version_of(tensor), stored(tensor), tensor.is_coalesced(), *_mark_tensor(values, samples)


def _copy_array(array: Any) -> Any:
    return array.view(np.ndarray).copy()


def _put_array(array: Any, copy: Any) -> None:
    array.view(np.ndarray)[...] = copy


def _equal_array(array: Any, copy: Any) -> bool:
    if array.shape != copy.shape:
        return False
    if array.dtype.hasobject:
        return all(one is other for one, other in zip(array.flat, copy.flat, strict=True))
    return bool(array.view(np.ndarray).tobytes() == copy.tobytes())


def _mark_array(array: Any, samples: bool) -> tuple[Any, ...]:
    flat = array.view(np.ndarray).reshape(-1)
    return (flat[:: max(1, flat.size // _SAMPLE)].tobytes(),)


def _put_bytes(held: Any, copy: Any) -> None:
    held[:] = copy


def _mark_bytes(held: Any, samples: bool) -> tuple[Any, ...]:
    return len(held), bytes(held[:: max(1, len(held) // _SAMPLE)])


def memory_of(thing: Any) -> int:
    """Return the bytes that a tensor, an array or a piece of memory contains."""
    if isinstance(thing, Tensor) and thing.layout is not torch.strided:
        return stored(thing) * thing.element_size() if str(thing.layout).startswith("torch.sparse") else 0
    size = getattr(thing, "nbytes", None)
    return memoryview(thing).nbytes if size is None else int(size)


TENSOR = ContentAccess(_copy_tensor, _put_tensor, _equal_tensor, _mark_tensor)
# Of the kind whose operations in place put other indices and values there; the others' values are strided tensors.
SPARSE = ContentAccess(lambda tensor: tensor.detach().clone(), _put_sparse, _equal_sparse, _mark_sparse)
ARRAY = ContentAccess(_copy_array, _put_array, _equal_array, _mark_array)
BYTES = ContentAccess(lambda held: held[:], _put_bytes, lambda held, copy: bytes(held) == bytes(copy), _mark_bytes)


def write(thing: Any, content: Any) -> None:
    """Give a tensor or an array the content that ``Content.read`` read."""
    (TENSOR if isinstance(thing, Tensor) else ARRAY if isinstance(thing, np.ndarray) else BYTES).put(thing, content)
