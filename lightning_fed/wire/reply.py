"""The trust boundary: what a client sends is read and checked here, before anything else of the server sees it.

Replies come from machines that nobody here owns. Nothing is unpickled, and what is found wrong is a ``ClientError``
that says what. What passes has tensors for arrays, in the order of the global weights and no narrower, so that a
strategy decodes nothing. docs/deployment.md says what is not found.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from lightning_fed.errors import ClientError, InvalidUpdateError
from lightning_fed.tracebacks import is_printable, plain
from lightning_fed.values.metrics import LAST, METRIC, RATE, MetricState, scalar
from lightning_fed.values.weights import Weights, as_global, check_update, dtype_name, is_averaged
from lightning_fed.wire.extras import Extras, detach
from lightning_fed.wire.messages import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    Made,
    first,
    pack,
    reply_scalars,
    unpack,
    unreadable,
)

# More than anybody logs by hand, and for a large model a few of each tensor. Each name is a column of a table.
MAX_NAMES, NAMES_OF_A_TENSOR = 2000, 10
MAX_LENGTH = 500  # of a name, in characters
# The name that Lightning takes for the x axis of a plot, and loggers for an integer.
_STEP, _MAX_STEP = "step", 2**40
_LEAST = ("at least 0 (nothing to evaluate on)", "greater than 0")


@dataclass
class Expected:
    """What a reply must be like.

    Attributes:
        weights: The global weights.
        trains: Whether weights are to come.
        weighted_by: The numbers by which the strategy weighs replies.
        max_examples: The greatest number of examples that is believed.
        records: Whether the strategy takes one record of tensors and one of numbers, as all but users' own do.
        needed: Names of numbers without which the strategy fails, and who needs them.
        needs_change: Which strategy cannot take the global weights unchanged, if one cannot.
    """

    weights: Weights
    trains: bool
    weighted_by: frozenset[str] = frozenset({NUM_EXAMPLES})
    max_examples: float = math.inf
    records: bool = False
    needed: Mapping[str, str] = field(default_factory=dict)
    needs_change: str = ""


@dataclass
class Reply:
    """A client's reply, read."""

    extras: Extras
    num_examples: float
    scalars: dict[str, float]


def read_reply(reply: Message, expected: Expected) -> Reply:
    """Read and check a reply, and take out of it what strategies must not see.

    Raises:
        ClientError: If something in it is not of the form in which it travels, or cannot be used.
        InvalidUpdateError: If a tensor came in the wrong part, or as ``check_update`` says.
    """
    try:
        return _read(reply, expected)
    except ClientError:
        raise
    except Exception as error:  # whatever it was that the client sent
        # Without the error itself: its words, too, are the client's, and may be megabytes.
        raise ClientError(unreadable(error)) from None


def _read(reply: Message, expected: Expected) -> Reply:
    extras, scalars = detach(reply), reply_scalars(reply)
    _decode(reply.content)
    _require_names({*scalars, *(state.name for state in extras.states)}, expected)
    num_examples = _weight(reply, NUM_EXAMPLES, expected)
    for key in expected.weighted_by - {NUM_EXAMPLES} if num_examples else ():
        if key not in scalars:
            raise ClientError(f"sent no number {key!r}, by which the strategy weighs it.")
        _weight(reply, key, expected)
    _require_states(extras.states, scalars, expected)
    if expected.trains:
        _require_needed(scalars, expected)
        _take_weights(reply.content, extras.integers, expected)
    if expected.records:
        _require_records(reply.content, trains=expected.trains)
    return Reply(extras, num_examples, scalars)


def _decode(content: RecordDict) -> None:
    """Let all arrays be tensors."""
    made: Made = {}
    for key, record in list(content.items()):
        if isinstance(record, ArrayRecord) and any(array.__dict__.get("tensor") is None for array in record.values()):
            content[key] = pack(unpack(record, made))


def _require_names(names: Iterable[str], expected: Expected, known: Container[str] = ()) -> None:
    """Check the names that a client chose itself: each may become a column, a file, a line on a terminal."""
    new, most = [name for name in names if name not in known], MAX_NAMES + NAMES_OF_A_TENSOR * len(expected.weights)
    if len(new) > most:
        raise ClientError(
            f"sent {len(new)} names; at most {most} are taken: {MAX_NAMES}, and {NAMES_OF_A_TENSOR} for each tensor"
            " of the module."
        )
    for name in new:
        if len(name) > MAX_LENGTH or not is_printable(name):
            raise ClientError(
                f"sent the name {name[:50]!r} of {len(name)} characters; a name has at most {MAX_LENGTH}, and no"
                " control characters."
            )


def _weight(reply: Message, key: str, expected: Expected) -> float:
    """Return one of the numbers by which a reply counts."""
    value = (first(reply.content, MetricRecord) or MetricRecord()).get(key, 0)
    if isinstance(value, list):
        raise ClientError(f"sent {key}={value[:5]}; it is a single number.")
    # With a weight of almost 0 the mean of integers would lose those that the others have in common.
    least = 1 / expected.max_examples if value or expected.trains else 0
    if not least <= value <= expected.max_examples or not math.isfinite(value) or (expected.trains and not value):
        what = f"{value:g} examples" if key == NUM_EXAMPLES else f"{key}={value:g}, by which it is weighed"
        raise ClientError(f"reports {what}; {_rule(expected, least=int(expected.trains))}")
    return float(value)


def _rule(expected: Expected, least: int) -> str:
    return (
        f"it cannot be averaged: their number must be finite and {_LEAST[least]}, and at most {expected.max_examples:g}"
        " (FederatedTrainer(max_examples=...)), and between 0 and one by that there is none."
    )


def _require_states(states: Iterable[MetricState], scalars: Mapping[str, float], expected: Expected) -> None:
    """Check what a client says that it logged: each name once, and its learning rates beside them."""
    for (name, _), times in Counter((state.name, _is_rate(state)) for state in states).items():
        if times > 1:
            raise ClientError(f"sent {times} states of {name!r}; there is one a name.")
    for state in states:
        if not 0 <= state.weight <= expected.max_examples:
            raise ClientError(f"reports {state.weight:g} examples for {state.name!r}; {_rule(expected, least=0)}")
    of_step = [state for state in states if state.name == _STEP]
    if any(state.kind == METRIC for state in of_step):
        raise ClientError(f"logged a metric as {_STEP!r}, which Lightning takes for the x axis of plots.")
    steps = [scalars.get(_STEP), *map(scalar, of_step)]
    for step in [step for step in steps if step is not None]:
        if not abs(step) <= _MAX_STEP:
            raise ClientError(
                f"logged {_STEP!r} as {step:g}: Lightning takes it for the x axis of plots, where it is an integer of"
                f" at most {_MAX_STEP}. Log it under another name."
            )


def _is_rate(state: MetricState) -> bool:
    return state.attribute == RATE and state.kind == LAST


def _require_needed(scalars: Mapping[str, float], expected: Expected) -> None:
    """Check the numbers that the strategy computes with."""
    for name, who in expected.needed.items():
        if name not in scalars:
            raise ClientError(f"sent no number {name!r}, which {who} needs of each client: log it in training.")
        if not 0 <= scalars[name] <= expected.max_examples or not math.isfinite(scalars[name]):
            raise ClientError(
                f"reports {name}={scalars[name]:g}, by which {who} weighs it; it must be finite, at least 0, and at"
                f" most {expected.max_examples:g} (FederatedTrainer(max_examples=...))."
            )


def _take_weights(content: RecordDict, integers: Weights, expected: Expected) -> None:
    """Check a client's weights, which come in two parts, and let the strategy's be in the order of the global ones."""
    if (arrays := first(content, ArrayRecord)) is None:
        raise ClientError("sent no weights.")
    averaged, reference = unpack(arrays), expected.weights
    for part, what, belongs in ((averaged, "floating and complex", True), (integers, "integer and bool", False)):
        _require_names(part, expected, reference)
        for name in part:
            if name in reference and is_averaged(reference[name]) is not belongs:
                kind = dtype_name(reference[name].dtype)
                raise InvalidUpdateError(
                    f"sent {name!r} among its {what} tensors, the global model has it as {kind}.", tensor=name
                )
    # Checked as they are averaged: a number may be beyond what the global dtype holds.
    check_update({**averaged, **integers}, reference)
    ordered = as_global(averaged, reference)
    if list(ordered) != list(averaged) or any(ordered[name] is not tensor for name, tensor in averaged.items()):
        content[next(key for key, record in content.items() if record is arrays)] = pack(ordered)
    if expected.needs_change and not any(_differs(tensor, reference[name]) for name, tensor in ordered.items()):
        raise ClientError(
            f"sent the global weights unchanged; {expected.needs_change} divides by the norm of what a client changed."
        )


def _differs(tensor: Tensor, reference: Tensor) -> bool:
    """Return whether the square of a difference is more than 0."""
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    difference, limits = (tensor - reference.to(tensor)).abs(), torch.finfo(tensor.dtype)
    return bool((difference > 2 * math.sqrt(limits.tiny * limits.eps)).any())


def _require_records(content: RecordDict, *, trains: bool) -> None:
    """Check that there is one record of each kind, by the names that all clients use: strategies ask for no more."""
    wanted = {METRICS: MetricRecord, **({ARRAYS: ArrayRecord} if trains else {})}
    found = {key: type(record) for key, record in content.items() if not isinstance(record, ConfigRecord)}
    if found != wanted:
        some = ", ".join(plain(key, 50) for key in sorted(found)[:10])
        raise ClientError(f"sent {len(found)} records ({some}); the strategy takes {', '.join(sorted(wanted))}.")
