"""What Flower's strategies leave to their clients, who have no code of Flower's: a proximal term, clipping."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    FedProx,
    Strategy,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed.errors import ConfigurationError
from lightning_fed.strategies.own_metrics import all_inside

# Strategy -> the client mod of Flower's that clips for it.
_CLIPPING: dict[type[Strategy], str] = {
    DifferentialPrivacyClientSideFixedClipping: "fixedclipping_mod",
    DifferentialPrivacyClientSideAdaptiveClipping: "adaptiveclipping_mod",
}


def require_client_part(strategy: Strategy, mods: Sequence[Mod], *, knows_clients: bool) -> None:
    """Check that clients do what a strategy, or one that it wraps, expects of them.

    Args:
        strategy: Any Flower strategy.
        mods: The client mods around training.
        knows_clients: Whether these are all mods that clients have; on a foreign grid they may have others.

    Raises:
        ConfigurationError: If the strategy would silently be another one.
    """
    for one in all_inside(strategy):
        if isinstance(one, FedProx) and one.proximal_mu:
            raise ConfigurationError(
                f"FlowerStrategy({type(one).__name__}(proximal_mu={one.proximal_mu})): Flower leaves the proximal term"
                " to the client's own code, and a LightningModule has none: the run would be plain FedAvg. Write"
                f" callbacks=[FedProx(mu={one.proximal_mu})] with the FedProx of lightning_fed.callbacks, which goes"
                " with any aggregation."
            )
        for kind, mod in _CLIPPING.items():
            if isinstance(one, kind):
                _require_clipping(type(one).__name__, mod, mods, knows_clients)


def _require_clipping(strategy: str, needed: str, mods: Sequence[Mod], knows_clients: bool) -> None:
    present = [_unwrapped(mod) for mod in mods]
    if any(getattr(mod, "__name__", "") == needed for mod in present):
        return
    way_out = f"Write FlowerStrategy(strategy, mods=[{needed}]); it is in flwr.clientapp.mod."
    own = [mod for mod in present if not getattr(mod, "__module__", "").startswith("flwr.")]
    if knows_clients and not own:
        raise ConfigurationError(
            f"{strategy} leaves clipping to a client mod, and there is none: updates would not be clipped, and its"
            f" noise would protect nobody. {way_out}"
        )
    names = ", ".join(getattr(mod, "__name__", type(mod).__name__) for mod in own) or "none"
    rank_zero_warn(
        f"{strategy} leaves clipping to a client mod, and {needed} is not among those that this script has (of its own:"
        f" {names}). Unless another clips updates to the norm that it is sent, its noise protects nobody. {way_out}"
    )


def _unwrapped(mod: Any) -> Any:
    """Return the function within ``functools.partial`` and decorators."""
    while isinstance(mod, partial):
        mod = mod.func
    return inspect.unwrap(mod)
