"""Who decides over the clients' metrics: a function that the user gave a strategy, or nobody."""

from __future__ import annotations

from flwr.serverapp.strategy import FedAvg, Strategy


def has_own_metrics(strategy: Strategy, stage: str) -> bool:
    """Whether a strategy, or one that it wraps, was given a function for the clients' metrics.

    Flower's strategies without one average them by examples, which is no better than what clients' states merge to.

    Args:
        strategy: Any Flower strategy.
        stage: ``"train"`` or ``"evaluate"``.
    """
    name = f"{stage}_metrics_aggr_fn"
    if (function := getattr(strategy, name, None)) is not None:
        return function is not getattr(FedAvg(), name)
    return any(has_own_metrics(inner, stage) for inner in vars(strategy).values() if isinstance(inner, Strategy))
