"""Numbers as a table of text."""

from __future__ import annotations

from collections.abc import Sequence


def cell(value: float | None) -> str:
    """Return a number as a table shows it; empty where there is none.

    >>> cell(3), cell(0.5), cell(None)
    ('3', '0.5000', '')
    """
    return "" if value is None else f"{value:g}" if float(value).is_integer() else f"{value:.4f}"


def as_table(lines: Sequence[Sequence[str]], left: int = 0) -> str:
    """Return lines of cells below each other, to the right of their columns.

    Args:
        lines: The first has the columns' names.
        left: So many columns, the first ones, are texts and stand to the left.

    >>> print(as_table([["round", "loss"], ["1", "0.5000"]]))
    round    loss
        1  0.5000
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            one.ljust(width) if i < left else one.rjust(width)
            for i, (one, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
