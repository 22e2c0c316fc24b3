"""What two modules have to have in common to train together, as a few lines of text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_fed.values.staying import Staying
from lightning_fed.values.weights import dtype_name, read

Form = dict[str, str]

_FROZEN = "values of what is frozen"


def form_of(module: nn.Module, staying: Staying | None = None) -> Form:
    """Describe a module: its tensors by name, with kind and shape, and a digest of all parameters that are not trained.

    Of tensors that are personal it tells the name alone.

    >>> form_of(nn.Linear(2, 1))
    {'weight': 'float [1, 2]', 'bias': 'float [1]'}
    """
    staying = staying or Staying()
    named = {name: p for name, p in module.named_parameters() if name not in staying.personal_parameters}
    frozen = {name: p for name, p in named.items() if not p.requires_grad}
    form = {name: _text(tensor, name in frozen) for name, tensor in read(module, copy=False).items()}
    form |= dict.fromkeys(sorted(staying.personal), "personal")
    return {**form, _FROZEN: _digest(frozen)} if frozen else form


def difference(server: Mapping[str, str], site: Mapping[str, str]) -> str:
    """Name the first thing that two modules differ in, as a clause; empty if they do not.

    >>> difference({"a": "float [1]"}, {"a": "float [2]"})
    "'a' is float [1] at the server and float [2] at the site"
    >>> difference({}, {"a": "float [2]"})
    "'a' (float [2]) is at the site and not at the server"
    """
    for name in [*server, *site]:
        ours, theirs = server.get(name), site.get(name)
        if ours == theirs:
            continue
        if theirs is None:
            return f"{name!r} ({ours}) is at the server and not at the site"
        if ours is None:
            return f"{name!r} ({theirs}) is at the site and not at the server"
        if name == _FROZEN:
            values = f"at the server ({ours}) than at the site ({theirs})"
            return f"the parameters that are not trained have other values {values}"
        return f"{name!r} is {ours} at the server and {theirs} at the site"
    return ""


def _text(tensor: Tensor, is_frozen: bool) -> str:
    # Not the width: a site with another precision trains the same module.
    kind = "float" if tensor.is_floating_point() else dtype_name(tensor.dtype)
    return f"{kind} {list(tensor.shape)}{' frozen' if is_frozen else ''}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
