"""What a script says of clients' training, as a few lines of text: all who train together have to say the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from lightning.pytorch import Callback

from lightning_fed.client.local.work import LocalOptions
from lightning_fed.values import by_round
from lightning_fed.wire.fingerprint import arguments_in, describe

Setup = dict[str, str]

# Arguments of a client's trainer that change what it gives, with what they are where nobody sets them.
_LIMITS = {
    "accumulate_grad_batches": 1,
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "overfit_batches": 0.0,
}
_METHODS = "callbacks with a part in local training"


def setup_of(
    options: LocalOptions, methods: Sequence[Callback], mods: Mapping[str, Sequence[Callable[..., Any]]], rounds: int
) -> Setup:
    """Describe how clients train, but for the machine on which they do.

    Args:
        options: Those of local fits.
        methods: The federated callbacks that have a part in them.
        mods: Flower client mods by stage.
        rounds: The rounds of the run, or -1 for no limit: so far local epochs that change are compared.
    """
    given = options.trainer
    clip = float(given.get("gradient_clip_val") or 0.0)
    setup = {
        "local_epochs": _epochs(options, rounds),
        "local_steps": str(options.steps),
        "client_state": repr(options.client_state),
        "local_validation": str(options.local_validation),
        "gradient_clip_val": str(clip or None),
    }
    if clip:
        by = given.get("gradient_clip_algorithm") or "norm"
        setup["gradient_clip_algorithm"] = repr(str(getattr(by, "value", by)))
    for name, default in _LIMITS.items():
        value = given.get(name)
        setup[name] = _number(default if value is None or (value == 0 and default == 0) else value)
    return setup | {
        "client_callbacks": _called(options.callbacks),
        _METHODS: _called(methods),
        "client mods": describe([mod for stage in sorted(mods) for mod in mods[stage]]),
    }


def differences(server: Mapping[str, str], site: Mapping[str, str]) -> list[str]:
    """Say what a site has otherwise.

    >>> differences({"local_epochs": "1", "local_steps": "None"}, {"local_epochs": "3", "local_steps": "None"})
    ['local_epochs is 1 at the server and 3 at the site']
    """
    return [
        f"{name} is {server.get(name, 'unknown')} at the server and {site.get(name, 'unknown')} at the site"
        for name in dict.fromkeys([*server, *site])
        if server.get(name) != site.get(name)
    ]


def _epochs(options: LocalOptions, rounds: int) -> str:
    if not isinstance(options.epochs, tuple):
        return str(options.epochs)
    last = len(options.epochs) if rounds == -1 else rounds
    epochs = list(by_round.table("local_epochs", options.epochs, max(1, last), bool, ""))
    return describe(epochs) if len(epochs) > 1 else str(epochs[0])


def _called(callbacks: Sequence[Callback]) -> str:
    return f"[{', '.join(map(_call, callbacks))}]"


def _call(callback: Callback) -> str:
    """Return a callback's class, and those of its arguments that are numbers: others may be paths, or a site's own."""
    numbers = {name: value for name, value in arguments_in(callback).items() if isinstance(value, Real)}
    written = [f"{name}={_number(value).removesuffix('.0')}" for name, value in numbers.items()]  # 1.0 is 1
    return f"{type(callback).__name__}({', '.join(written)})"


def _number(value: Any) -> str:
    return repr(value.item() if hasattr(value, "item") else value)
