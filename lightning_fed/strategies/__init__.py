"""Flower strategies that we add; they work in plain Flower, too."""

from lightning_fed.strategies.dynamic import DynamicMean
from lightning_fed.strategies.mean import WeightedMean
from lightning_fed.strategies.normalized import NormalizedMean
from lightning_fed.strategies.server_optimizers import AdagradMean, AdamMean, MomentumMean, ServerOptimizer, YogiMean

__all__ = [
    "AdagradMean",
    "AdamMean",
    "DynamicMean",
    "MomentumMean",
    "NormalizedMean",
    "ServerOptimizer",
    "WeightedMean",
    "YogiMean",
]
