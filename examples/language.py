"""What the examples with language models share: curve and picture. Nothing in here is federated."""

import lightning as L
import numpy as np
from command_line import FRACTION

QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class Curve(L.Callback):
    """Keeps the validation loss by passes over the data."""

    def __init__(self):
        self.loss = {}

    def on_validation_end(self, trainer, pl_module):
        self.loss[(trainer.current_epoch + 1) * FRACTION] = float(trainer.callback_metrics["val_loss"])


def draw_loss(axes, label, curves):
    """Draw the mean of the seeds' losses, and from the least to the greatest."""
    passes, losses = list(curves[0]), np.array([list(curve.values()) for curve in curves])
    [line] = axes.plot(passes, losses.mean(0), marker=".", label=label)
    axes.fill_between(passes, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="passes over the data", ylabel="validation loss, nats per character")
    axes.grid(alpha=0.3)
