"""A partition that is there already: a client for each value of a column."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_fed.errors import ConfigurationError


class Natural:
    """The examples of each value, of which each is a client; numbered in the order of the values.

    Numbers are ordered by size and texts by their characters, whatever the order of the examples and the seed.

    Args:
        values: The value of each example.
        min_examples: Values with fewer examples are left out, and the numbers close ranks.
        call: The user's call, for errors.

    Attributes:
        names: The value of each client.
        left_out: How many values were left out.
        examples_left_out: How many examples these had.

    Raises:
        ConfigurationError: If no client is left, or the values have no order.

    >>> partition = Natural(["b", "a", "c", "b", "a"], min_examples=2)
    >>> partition.names, partition.indices(0)
    (['a', 'b'], array([1, 4]))
    """

    def __init__(self, values: list[Any], min_examples: int = 1, call: str = "Partition(by=...)") -> None:
        found: dict[Any, list[int]] = {}
        for example, value in enumerate(values):
            found.setdefault(value, []).append(example)
        enough = {value: members for value, members in found.items() if len(members) >= min_examples}
        if not enough:
            most = max(map(len, found.values()), default=0)
            raise ConfigurationError(
                f"{call}: none of {len(found)} clients has {min_examples} examples; the largest has {most}. Lower"
                " min_examples."
            )
        try:
            self.names = sorted(enough)
        except TypeError as error:
            raise ConfigurationError(
                f"{call}: the values have no order, by which clients are numbered ({error}). Write numbers or texts"
                " for all."
            ) from None
        self._members = [np.asarray(enough[name], dtype=np.int64) for name in self.names]
        self.left_out = len(found) - len(enough)
        self.examples_left_out = len(values) - sum(map(len, self._members))

    @property
    def num_partitions(self) -> int:
        """How many clients there are."""
        return len(self.names)

    knows_sizes = True

    def size_of(self, client: int) -> int:
        """Return how many examples a client has."""
        return len(self.indices(client))

    def indices(self, client: int) -> np.ndarray[Any, Any]:
        """Return a client's examples: indices, int64, ascending."""
        return self._members[client]
