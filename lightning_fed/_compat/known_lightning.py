"""Whether the installed Lightning is one whose steps the clients' loops are known to copy.

``client/local/fast_loop.py`` and ``client/local/logged.py`` do what the files below do, without what nobody listens to.
Where one of these files is not as in a release that ``tests/client/local/test_fast_loop.py`` was run with, clients use
Lightning's own loops: slower, and never wrong.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import lightning.pytorch

_COPIED = (
    "core/module.py",
    "core/optimizer.py",
    "loops/fetchers.py",
    "loops/optimization/automatic.py",
    "loops/optimization/closure.py",
    "loops/training_epoch_loop.py",
    "plugins/precision/precision.py",
    "strategies/single_device.py",
    "strategies/strategy.py",
    "trainer/call.py",
    "trainer/connectors/logger_connector/logger_connector.py",
    "trainer/connectors/logger_connector/result.py",
)
# What ``digest`` gives, and of which release.
KNOWN = {
    "b847576ac3a3": "2.5.3",
    "b5b1df08b381": "2.5.4 to 2.5.6",
    "02c445296b50": "2.6.0",
    "6cf717dc769f": "2.6.1",
    "d5fc68848b58": "2.6.4 to 2.6.6",
}


def digest(package: Path) -> str:
    """Return a few letters that are others where one of the copied files is.

    Args:
        package: The folder of ``lightning.pytorch``.
    """
    sources = ((package / name).read_text(encoding="utf-8") for name in _COPIED)  # with the line ends of any system
    return hashlib.blake2b("\n".join(sources).encode(), digest_size=6).hexdigest()


@cache
def is_known() -> bool:
    """Return whether clients may use loops of our own."""
    try:
        return digest(Path(lightning.pytorch.__file__).parent) in KNOWN
    except OSError:  # installed without its sources
        return False


def why_slower() -> str:
    """Return what to say where it is not known."""
    return (
        f"Lightning {lightning.pytorch.__version__} is not one that lightning_fed was compared with, step by step:"
        " clients use its own training loop, which is slower, and they are not vectorized. The results are the same."
    )
