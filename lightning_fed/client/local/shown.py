"""Where a client's logged names are shown: to loggers, on the progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Shown(NamedTuple):
    """Where the names of an epoch are shown, as the user logged them.

    Attributes:
        unlogged: Those that Lightning keeps from loggers: logged with ``logger=False``, or the plain name of a value
            that is logged per step and per epoch: loggers get ``<name>_step`` and ``<name>_epoch``, callbacks all.
        on_bar: Those logged with ``prog_bar=True``.
    """

    unlogged: set[str]
    on_bar: set[str]


def shown(results: Iterable[Any]) -> Shown:
    """Return where names are shown.

    Args:
        results: What a trainer has logged: Lightning's ``_ResultMetric`` or the like.
    """
    plain, logged, on_bar = set[str](), set[str](), set[str]()
    for result in results:
        meta = result.meta
        loader = meta.dataloader_idx if meta.add_dataloader_idx else None
        suffix = "" if loader is None else f"/dataloader_idx_{loader}"
        steps = [on_step for on_step in (True, False) if (meta.on_step if on_step else meta.on_epoch)]
        forms = {meta.forked_name(on_step) + suffix for on_step in steps}
        plain |= {meta.name + suffix, *forms}
        logged |= forms if meta.logger else set()
        on_bar |= forms if meta.prog_bar else set()
    return Shown(plain - logged, on_bar)
