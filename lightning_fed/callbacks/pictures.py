"""What all pictures share: a figure that a notebook shows once, ticks that read as numbers."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, its size in inches, that a notebook shows as the last line of a cell.

    It is not one of pyplot's, of which a notebook shows each once more at the end of the cell, and which stay in memory
    until they are closed. It takes the colours of the style that is set, and has a background of its own.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    # IPython knows how to show a figure once pyplot is imported, and asks the figure before that.
    figure._repr_png_ = partial(_as_png, figure)
    return figure


def as_number(value: float, place: int | None = None) -> str:
    """Write what stands at a tick: a number by itself, without a factor or an offset at the axis' end.

    >>> as_number(12000), as_number(0.1 + 0.2), as_number(123456.5)
    ('12,000', '0.3', '123,456.5')
    """
    return f"{value:,.10g}"


def number_ticks(axis: Any, *, whole: bool = False) -> None:
    """Let an axis' ticks read as numbers, and stand at whole ones only."""
    if whole:
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(integer=True))
    axis.set_major_formatter(as_number)


def _as_png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
