"""Federated learning for any LightningModule: two changed lines train it over many clients."""

import os as _os

# flwr and flwr-datasets report usage unless told not to, and read these when imported.
for _name, _value in (("FLWR_TELEMETRY_ENABLED", "0"), ("FLWR_DISABLE_UPDATE_CHECK", "1")):
    _os.environ.setdefault(_name, _value)

from lightning_fed._version import __version__  # noqa: E402
from lightning_fed.errors import (  # noqa: E402
    ClientError,
    ConfigurationError,
    FederationError,
    InvalidUpdateError,
    RoundError,
)
from lightning_fed.trainer import FederatedTrainer  # noqa: E402
from lightning_fed.wire.personal_folder import load_personal_module  # noqa: E402

__all__ = [
    "ClientError",
    "ConfigurationError",
    "FederatedTrainer",
    "FederationError",
    "InvalidUpdateError",
    "RoundError",
    "__version__",
    "load_personal_module",
]
