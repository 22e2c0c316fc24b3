"""What torch keeps private and a federation needs: what modules, tensors, optimizers hold; parts of its compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import config as inductor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.data import RandomSampler
from torch.utils.data.dataloader import _DatasetKind, _SingleProcessDataLoaderIter

__all__ = [
    "OptimizedModule",
    "TorchDispatchMode",
    "inductor",
    "lookup_backend",
    "tree_flatten",
    "tree_leaves",
    "tree_unflatten",
]

dynamo = torch._dynamo.config
# What a loader keeps of its workers.
LOADERS_WORKERS = "_iterator"
# What ``module.compile()`` leaves on a module: the compiled call, which a copy would share with it.
COMPILED_CALL = "_compiled_call_impl"
# The attributes that ``torch.compile`` gives tensors begin so.
OF_DYNAMO = "_dynamo"

# ------------------------------------------------------------------------------------------------- modules


def parameters_in(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dict in which a module itself, without those in it, holds its parameters."""
    return module._parameters


def buffers_in(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict in which a module itself holds its buffers."""
    return module._buffers


def versions_of(state: Mapping[str, Any]) -> Any:
    """Return the versions of a state dict's layers, without which some take it for that of an old release."""
    return getattr(state, "_metadata", {})


def set_versions(state: Any, versions: Any) -> None:
    """Give a state dict the versions of another."""
    state._metadata = versions


def watches_loading(module: nn.Module) -> bool:
    """Return whether a hook of a module sees what is loaded into it."""
    return bool(module._load_state_dict_pre_hooks)


def loads_as_torch(module: nn.Module) -> bool:
    """Return whether torch's own code copies what is loaded into a module's own parameters and buffers."""
    load = getattr(module._load_from_state_dict, "__func__", None)
    return getattr(load, "__module__", "").startswith("torch.nn.")


# ------------------------------------------------------------------------------------------------- tensors


def version_of(tensor: Tensor) -> int:
    """Return how many times a tensor was written to in place."""
    return tensor._version


def stored(sparse: Tensor) -> int:
    """Return how many elements a sparse tensor stores; for one that is not coalesced ``nnz`` of its own raises."""
    return sparse._nnz()


def indices_and_values(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a sparse COO tensor stores, whether coalesced or not."""
    return sparse._indices(), sparse._values()


def storage_key(tensor: Tensor) -> int:
    """Return what tensors that share memory have in common, as long as that memory lives."""
    return tensor.untyped_storage()._cdata


def gradient_hooks(tensor: Tensor) -> tuple[Any, Any]:
    """Return the hooks that see a tensor's gradient: before it is accumulated, and after."""
    return tensor._backward_hooks, tensor._post_accumulate_grad_hooks


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether a transform of ``torch.func`` is at work on a tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_mutable(operator: Any) -> bool:
    """Return whether an operator writes to one of its arguments."""
    return operator._schema.is_mutable


def allow_saved_tensor_hooks() -> None:
    """Allow for them again, which a transform that broke off leaves disabled."""
    torch._C._autograd._saved_tensors_hooks_enable()


# ------------------------------------------------------------------------------------------------- optimizers, loaders


def step_hooks(optimizer: Optimizer) -> Iterator[Any]:
    """Return the hooks that are called around an optimizer's steps, those of all optimizers, too."""
    yield from optimizer._optimizer_step_pre_hooks.values()
    yield from optimizer._optimizer_step_post_hooks.values()
    yield from _global_optimizer_pre_hooks.values()
    yield from _global_optimizer_post_hooks.values()


def _is_profiled() -> bool:
    """Return whether torch's profiler runs, which shows labels."""
    return torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


# The code of what torch puts around an optimizer's step: the hooks, under a label for a profiler.
_LABELLED = Optimizer.profile_hook_step(lambda optimizer: None).__code__


def step_of(optimizer: Optimizer) -> Callable[..., Any]:
    """Return ``optimizer.step``, without its hooks where there are none, and its label where no profiler runs.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.ones(1)
    >>> step_of(torch.optim.SGD([weight], lr=0.5))()
    >>> weight.tolist()
    [0.5]
    """
    step: Any = type(optimizer).step
    is_torchs = getattr(step, "__code__", None) is _LABELLED and "step" not in vars(optimizer)
    if not is_torchs or _is_profiled() or list(step_hooks(optimizer)):
        return optimizer.step
    return partial(step.__wrapped__, optimizer)


def last_rates(schedule: Any, default: Any) -> Any:
    """Return the learning rates that a schedule gave last, one for each group."""
    return getattr(schedule, "_last_lr", default)


def count_steps(schedule: Any, steps: int) -> None:
    """Let a schedule take itself for stepped so many times more."""
    schedule.last_epoch += steps
    schedule._step_count += steps


def schedules_in(schedule: Any) -> Any:
    """Return the schedules that a schedule of schedules is made of."""
    return getattr(schedule, "_schedulers", ())


def set_stepped(optimizer: Any, stepped: bool) -> bool:
    """Let schedules take an optimizer for stepped, of which they warn else; give what they took it for."""
    before = vars(optimizer).get("_opt_called", False)
    vars(optimizer)["_opt_called"] = stepped
    return bool(before)


def has_count(sampler: RandomSampler) -> bool:
    """Return whether a sampler was told how many to draw."""
    return sampler._num_samples is not None


class _Unlabelled(_SingleProcessDataLoaderIter):
    """Batches of a map-style data set, without a label where no profiler runs."""

    def __next__(self) -> Any:
        if _is_profiled():
            return super().__next__()
        batch = self._next_data()  # type: ignore[no-untyped-call]
        self._num_yielded += 1
        return batch


def unlabel(iterator: Any) -> None:
    """Let a loader's iterator leave out the label of each batch where no profiler would show it."""
    if type(iterator) is _SingleProcessDataLoaderIter and iterator._dataset_kind == _DatasetKind.Map:
        iterator.__class__ = _Unlabelled
