"""A value as one short line of text, to tell whether two are the same and to show them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import uuid
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from lightning_fed.wire.plain import Classes, to_plain

_LONGEST = 100


def text_of(plain: Any, *, contents: bool = True) -> str:
    """Return a line of text that is the same for equal values and no others; of what ``to_plain`` gives.

    >>> text_of(to_plain({"decay": (0.9, 1)}))
    "{'decay': (0.9, 1)}"

    Args:
        plain: A value as ``to_plain`` gives it.
        contents: ``False`` tells only dtype and shape of tensors, which takes no time.
    """
    return _short(_text(plain, contents))


def describe(value: Any) -> str:
    """Do as ``text_of``, for any value: a function goes by its name, an object by its class and simple attributes.

    >>> describe([len, 0.1])
    '[len, 0.1]'
    """
    classes = Classes()
    classes.learns = True
    if isinstance(value, functools.partial):
        return f"partial({describe(value.func)})"
    if inspect.isroutine(value) or isinstance(value, type):
        return str(getattr(value, "__qualname__", type(value).__name__))
    if isinstance(value, Distribution):  # most keep their arguments in another one
        numbers = {name: getattr(value, name) for name in value.arg_constraints}
        numbers = {name: n.tolist() if isinstance(n, Tensor) else n for name, n in numbers.items()}
        return _short(f"{type(value).__name__}({', '.join(f'{name}={describe(n)}' for name, n in numbers.items())})")
    try:
        return text_of(to_plain(value, classes))
    except Exception:
        pass  # an object of which only a part can be told
    if isinstance(value, (list, tuple)):
        return _short(f"[{', '.join(map(describe, value))}]")
    inner = {name.strip("_"): v for name, v in getattr(value, "__dict__", {}).items() if _is_simple(v)}
    return _short(f"{type(value).__name__}({', '.join(f'{name}={v!r}' for name, v in sorted(inner.items()))})")


def arguments_in(made: object) -> dict[str, Any]:
    """Return the arguments of its ``__init__`` that an object keeps under their names, maybe with a ``_`` before."""
    attributes = vars(made)
    names = inspect.signature(type(made).__init__).parameters
    kept = {name: name if name in attributes else f"_{name}" for name in names}
    return {name: attributes[attribute] for name, attribute in kept.items() if attribute in attributes}


def _is_simple(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}... ({_digest(text.encode())})"


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _text(plain: Any, contents: bool) -> str:
    def text(inner: Any) -> str:
        return _text(inner, contents)

    if isinstance(plain, Tensor):
        return _tensor_text(plain, contents)
    if isinstance(plain, list):
        return f"[{', '.join(map(text, plain))}]"
    if not isinstance(plain, dict):
        return repr(plain)
    (tag, inner), *_ = plain.items()
    match tag:
        case "__dict__":
            return f"{{{', '.join(f'{text(k)}: {text(v)}' for k, v in inner)}}}"
        case "__tuple__":
            return f"({', '.join(map(text, inner))})"
        case "__set__" | "__frozenset__":  # in an order of their own in each process
            return f"{tag.strip('_')}({', '.join(sorted(map(text, inner)))})"
        case "__scalar__":
            return f"{str(inner.dtype).removeprefix('torch.')}({inner.item()!r})"
        case "__enum__":
            return f"{_class(inner[0])}.{inner[1]}"
        case "__state_dict__":
            return f"a state_dict {_digest(text(inner).encode())}"
        case "__subclass__" | "__namedtuple__" | "__dataclass__":
            return f"{_class(inner[0])}({text(inner[-1])})"
    if isinstance(inner, dict):  # a record
        inner = [[name, value] for name, value in inner.items()]
    return f"{tag.strip('_')}({text(inner)})"


def _class(name: str) -> str:
    return name.rpartition(":")[2].rpartition(".")[2]


def _tensor_text(tensor: Tensor, contents: bool) -> str:
    form = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if not contents:
        return form
    try:
        return f"{form} {_digest(tensor.detach().to('cpu', copy=True).reshape(-1).view(torch.uint8).numpy())}"
    except (RuntimeError, TypeError):  # sparse, quantised: like no other
        return f"{form} {uuid.uuid4().hex}"
