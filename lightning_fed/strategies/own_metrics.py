"""Which of a strategy's metrics are the user's own, and so decide over what the clients' states merge to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from flwr.serverapp.strategy import FedAvg, Strategy


def own_metrics(
    strategy: Strategy, stage: str, found: Mapping[str, float], reported: Sequence[tuple[float, Mapping[str, float]]]
) -> dict[str, float]:
    """Return those of a strategy's metrics that come from the user's own code.

    A function that it was given decides all names that it returns. Flower's strategies without one average clients'
    numbers by examples, which is no better than what their states merge to; a strategy of the user's that calls them
    does the same but for those names whose value is another.

    Args:
        strategy: Any Flower strategy; those that it wraps count, too.
        stage: ``"train"`` or ``"evaluate"``.
        found: What the strategy made of the replies.
        reported: ``(num_examples, numbers)`` of each client.
    """
    name = f"{stage}_metrics_aggr_fn"
    inside = list(all_inside(strategy))
    if any(getattr(one, name, None) not in (None, getattr(FedAvg(), name)) for one in inside):
        return dict(found)
    if not any(is_users(type(one), f"aggregate_{stage}") for one in inside):
        return {}
    return {name: value for name, value in found.items() if not _is_mean(value, name, reported)}


def all_inside(strategy: Strategy) -> Iterator[Strategy]:
    """Return a strategy and all that it wraps."""
    yield strategy
    for inner in vars(strategy).values():
        if isinstance(inner, Strategy):
            yield from all_inside(inner)


def is_users(kind: type, method: str) -> bool:
    """Return whether a method is neither Flower's nor ours."""
    return not getattr(kind, method).__module__.startswith(("flwr.", "lightning_fed."))


def _is_mean(value: float, name: str, reported: Sequence[tuple[float, Mapping[str, float]]]) -> bool:
    """Return whether a value is the example-weighted mean of what the clients report under a name."""
    known = [(weight, numbers[name]) for weight, numbers in reported if name in numbers]
    total = sum(weight for weight, _ in known)
    mean = sum(weight * number for weight, number in known) / total if total else math.nan
    return bool(known) and (math.isclose(value, mean, rel_tol=1e-6, abs_tol=1e-9) or (value != value and mean != mean))
