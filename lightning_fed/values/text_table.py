"""Numbers as a table of text."""

from __future__ import annotations

from collections.abc import Sequence


def cell(value: float | None) -> str:
    """Return a number as a table shows it; empty where there is none.

    >>> cell(3), cell(0.5), cell(None)
    ('3', '0.5000', '')
    """
    return "" if value is None else f"{value:g}" if float(value).is_integer() else f"{value:.4f}"


def as_table(lines: Sequence[Sequence[str]], left: int = 0, width: int = 80) -> str:
    """Return lines of cells below each other, to the right of their columns.

    A table that is too wide is several, one below the other, each of which begins with the first column.

    Args:
        lines: The first has the columns' names.
        left: So many columns, the first ones, are texts and stand to the left.
        width: The most characters of a line, where two columns fit that.

    >>> print(as_table([["round", "loss", "accuracy"], ["1", "0.5000", "0.9000"]], width=15))
    round    loss
        1  0.5000
    <BLANKLINE>
    round  accuracy
        1    0.9000
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    tables = [[0]]
    for i in range(1, len(widths)):
        if len(tables[-1]) > 1 and sum(widths[k] + 2 for k in tables[-1]) + widths[i] > width:
            tables.append([0])
        tables[-1].append(i)
    return "\n\n".join(_written(lines, columns, widths, left) for columns in tables)


def _written(lines: Sequence[Sequence[str]], columns: Sequence[int], widths: Sequence[int], left: int) -> str:
    return "\n".join(
        "  ".join(line[i].ljust(widths[i]) if i < left else line[i].rjust(widths[i]) for i in columns) for line in lines
    )
