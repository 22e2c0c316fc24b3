"""Which of a client's logged names go to no logger."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def kept_from_loggers(results: Iterable[Any]) -> set[str]:
    """The names that Lightning keeps from loggers.

    Those logged with ``logger=False``, and the plain name of a value that is logged per step and per epoch: loggers get
    ``<name>_step`` and ``<name>_epoch``, callbacks all three.

    Args:
        results: What a trainer has logged: Lightning's ``_ResultMetric`` or the like.
    """
    kept: set[str] = set()
    logged: set[str] = set()
    for result in results:
        meta = result.meta
        loader = meta.dataloader_idx if meta.add_dataloader_idx else None
        suffix = "" if loader is None else f"/dataloader_idx_{loader}"
        forms = {meta.forked_name(on_step) for on_step in (True, False) if (meta.on_step if on_step else meta.on_epoch)}
        (logged if meta.logger else kept).update(form + suffix for form in forms)
        if meta.name not in forms:
            kept.add(meta.name + suffix)
    return kept - logged
