"""Whether vectorized clients came out as each does alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose, isnan

from lightning_fed.client.local.run import LocalResult
from lightning_fed.client.vectorized.rng import NotStackable
from lightning_fed.values.metrics import MetricState, scalar
from lightning_fed.values.weights import Weights, is_averaged

_TOLERANCE = 0.02
_COARSE = 0.1


def apart(weights: Weights, stage: str) -> tuple[Weights, Weights]:
    """Return what two clients begin with: not the same, so that what belongs to the other is noticed at once."""
    if stage == "evaluate":
        return weights, weights
    return weights, {name: value * 1.2 if is_averaged(value) else value for name, value in weights.items()}


def compare(
    together: Sequence[LocalResult], alone: Sequence[LocalResult], weights: Weights, trained: frozenset[str]
) -> None:
    """Compare weights and logged values of vectorized clients with those of each alone.

    Args:
        together: Vectorized.
        alone: Each alone.
        weights: The global weights, of which they had what ``apart`` gives.
        trained: The names of the parameters.

    Raises:
        NotStackable: If something differs by more than rounding.
    """
    begun = apart(weights, "train")
    for one, other, before in zip(together, alone, begun, strict=False):
        names = [[(state.name, state.kind) for state in result.metrics] for result in (one, other)]
        if sorted(names[0]) != sorted(names[1]):
            raise NotStackable(f"it logs {names[0]} where one client alone logs {names[1]}")
        _compare_weights(one.weights, other.weights, before, trained)
        _compare_logged(one.metrics, other.metrics)


def _compare_logged(one: Sequence[MetricState], other: Sequence[MetricState]) -> None:
    alone = {state.name: scalar(state) for state in other}
    for state in one:
        value, expected = scalar(state), alone[state.name]
        if value is not None and expected is not None and not _is_near(value, expected):
            raise NotStackable(f"it logs {state.name}={value:g} where one client alone logs {expected:g}")


def _is_near(one: float, other: float) -> bool:
    return isclose(one, other, rel_tol=_TOLERANCE, abs_tol=1e-4) or (isnan(one) and isnan(other))


def _compare_weights(one: Weights, other: Weights, before: Weights, trained: frozenset[str]) -> None:
    """Compare whole updates: a gradient that is zero but for rounding may go anywhere.

    All tensors together are as near as ``_TOLERANCE`` says. A buffer that changes by much must hide nothing, so what
    is trained is looked at alone, too, less closely: under BatchNorm rounding may grow to some percent of an update.
    So is each buffer, against its size.
    """
    names = [name for name, tensor in other.items() if is_averaged(tensor)]
    difference = {name: float((other[name] - one[name]).norm()) for name in names}
    change = {name: float((other[name] - before[name].to(other[name])).norm()) for name in names}

    def differ(some: list[str], tolerance: float, size: float = 0.0) -> bool:
        allowed = tolerance**2 * (sum(change[name] ** 2 for name in some) + size**2)
        return not sum(difference[name] ** 2 for name in some) <= allowed

    buffers = [name for name in names if name not in trained]
    apart = [name for name in buffers if differ([name], _TOLERANCE, float(other[name].norm()))]
    if differ(names, _TOLERANCE) or differ([name for name in names if name in trained], _COARSE) or apart:
        worst = max(apart or names, key=lambda name: difference[name])
        raise NotStackable(f"vectorized clients would get another {worst!r} than each alone")
