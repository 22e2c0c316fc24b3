"""What packages are to the walk: some hold nothing that a client changes, some hold nothing that could be restored."""

from __future__ import annotations

import sys
from collections import deque

from torch import nn

from lightning_fed.caching import cached

# Packages whose objects are machinery: no step's numbers are kept in them where they could be restored.
_MACHINERY = frozenset(
    {
        "flwr",
        "grpc",
        "ray",
        "logging",
        "threading",
        "_thread",
        "multiprocessing",
        "concurrent",
        "asyncio",
        "socket",
        "io",
    }
    | {"_io", "pathlib", "re", "datetime", "weakref", "inspect", "importlib", "typing", "abc", "ctypes", "queue"}
    | {"pyarrow", "pandas", "matplotlib", "rich", "tqdm", "wandb", "mlflow", "tensorboard", "triton", "sympy", "fsspec"}
)
_MACHINERY_WITHIN = (
    *("torch._", "torch.fx", "torch.distributed", "torch.jit", "torch.utils.tensorboard", "lightning.fabric"),
    *("lightning.pytorch.trainer", "lightning.pytorch.loggers", "lightning.pytorch.loops"),
    *("lightning.pytorch.strategies", "lightning.pytorch.profilers", "lightning.pytorch.accelerators"),
    *("lightning_fed.client", "lightning_fed.state", "lightning_fed.engines"),
)

# Packages whose classes and functions hold nothing that a client changes.
_LIBRARIES = frozenset({"torch", "torchvision", "torchmetrics", "lightning", "lightning_fed", "numpy"})


@cached(4096)
def is_library(module: str | None) -> bool:
    """Return whether a module's classes and functions hold nothing that a client changes."""
    package = (module or "builtins").partition(".")[0]
    return package in _LIBRARIES or package in _MACHINERY or package in sys.stdlib_module_names - {"__main__"}


def is_machinery(cls: type) -> bool:
    """Return whether objects of a class are not looked into."""
    if issubclass(cls, (dict, list, set, deque)):  # such as a module's hparams
        return False
    if issubclass(cls, nn.Module) and not cls.__module__.startswith("torch.jit"):  # compiled, or traced by torch.fx
        return False
    module = cls.__module__ or ""
    return module.partition(".")[0] in _MACHINERY or module.startswith(_MACHINERY_WITHIN)
