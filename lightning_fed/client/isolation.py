"""What a local run must leave as it was: the module's own state, signal handlers, Lightning's log level."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from torch import Tensor, nn
from torchmetrics import Metric


@contextmanager
def own_state_kept(module: LightningModule) -> Iterator[None]:
    """Puts back all that is not in the state dict: attributes, modes, frozen flags, buffers that are not saved."""
    attributes = [(child, _attributes_of(child)) for child in module.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    saved = module.state_dict().keys()
    unsaved = [(b, b.detach().clone()) for name, b in module.named_buffers() if name not in saved]
    device = module.device
    try:
        yield
    finally:
        module.zero_grad(set_to_none=True)
        for child, state in attributes:
            child.__dict__.clear()
            child.__dict__.update(state)
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
        # Lightning leaves a module on the CPU when a fit ends.
        if any(parameter.device != device for parameter in module.parameters()):
            module.to(device)
        with torch.no_grad():
            for buffer, value in unsaved:
                buffer.copy_(value)


def _attributes_of(child: nn.Module) -> dict[str, Any]:
    """A module's attributes. A metric's states are copied: updates write into them, and reset puts new ones there."""
    kept = dict(child.__dict__)
    if isinstance(child, Metric):
        states = {name: kept[name] for name in child._defaults}
        kept |= {name: s.clone() if isinstance(s, Tensor) else list(s) for name, s in states.items()}
    return kept


@contextmanager
def attributes_kept(datamodule: LightningDataModule) -> Iterator[None]:
    """Puts back a datamodule's attributes."""
    state = dict(datamodule.__dict__)
    try:
        yield
    finally:
        datamodule.__dict__.clear()
        datamodule.__dict__.update(state)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning from telling the same about every client's trainer."""
    logger = rank_zero_module.log
    logger.addFilter(_is_warning)  # to set its level would make all loggers forget theirs
    try:
        yield
    finally:
        logger.removeFilter(_is_warning)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def signal_handlers() -> dict[int, Any]:
    """The server's signal handlers: a client must not swallow a SIGTERM, nor leave Ctrl-C ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def restore_handlers(handlers: dict[int, Any]) -> None:
    """Takes back what ``signal_handlers`` gave, where it was changed."""
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
