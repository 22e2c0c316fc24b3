"""What Lightning says of epochs in the server's fit, said of rounds."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_module

_ROUNDS: list[tuple[str, Any]] = [
    (r"`Trainer\.fit` stopped: `max_epochs=(\d+)` reached", r"`FederatedTrainer.fit` stopped: `max_rounds=\1` reached"),
    # A verbose ModelCheckpoint: "Epoch 9, global step 10: 'val_acc' reached 0.9 ...".
    (r"^Epoch (\d+), global step \d+:", lambda found: f"Round {int(found[1]) + 1}:"),
    (
        r"will run the requested loop using (\d+) batch\(es\)",
        r"will run \1 round(s), of 2 clients with \1 batch(es) each",
    ),
]
# Said of the server's one-item loader, or of every client's, these are noise.
_NOISE = ("The 'train_dataloader' does not have many workers", "Found .* in eval mode at the start")


@contextmanager
def speaking_of_rounds(clients_validate: bool) -> Iterator[None]:
    """Let Lightning speak of rounds for the block.

    Args:
        clients_validate: Whether clients validate, so that no validation loader at the server means nothing.
    """
    logger, noise = rank_zero_module.log, list(_NOISE)
    if clients_validate:
        noise.append("You defined a `validation_step` but have no `val_dataloader`")

    def reword(record: logging.LogRecord) -> bool:  # one of this block, for blocks may lie in one another
        return _reword(record)

    logger.addFilter(reword)
    try:
        with warnings.catch_warnings():
            for message in noise:
                warnings.filterwarnings("ignore", f".*{message}.*")
            yield
    finally:
        logger.removeFilter(reword)


def _reword(record: logging.LogRecord) -> bool:
    if isinstance(record.msg, str):
        for epochs, rounds in _ROUNDS:
            record.msg = re.sub(epochs, rounds, record.msg)
    return True
