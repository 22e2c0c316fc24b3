"""What NumPy keeps private and a federation needs: the generator that ``np.random.seed`` seeds."""

from __future__ import annotations

import numpy as np


def everybodys_generator() -> np.random.RandomState:
    """Return the generator from which the functions of ``np.random`` draw."""
    return np.random.mtrand._rand
