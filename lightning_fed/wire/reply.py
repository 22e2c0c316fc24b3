"""The trust boundary: what a client sends is read and checked here, before anything else of the server sees it.

Replies come from machines that nobody here owns. Nothing is unpickled, and what is found wrong is a ``ClientError``
that says what. What passes has tensors for arrays, so that a strategy decodes nothing. docs/deployment.md says what is
not found yet.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from lightning_fed.errors import ClientError, InvalidUpdateError
from lightning_fed.tracebacks import words
from lightning_fed.values.weights import Weights, check_update, dtype_name, is_averaged
from lightning_fed.wire import packing
from lightning_fed.wire.extras import Extras, detach
from lightning_fed.wire.messages import ARRAYS, METRICS, NUM_EXAMPLES, first, pack, reply_scalars, unpack

# More than anybody logs by hand; each name is a column of a table, and a line of the logger's file.
MAX_NAMES = 2000
MAX_LENGTH = 500  # of a name, in characters
_LEAST = ("at least 0 (nothing to evaluate on)", "greater than 0")


@dataclass
class Expected:
    """What a reply must be like.

    Attributes:
        weights: The global weights; ``None`` where none are to come.
        weighted_by: The numbers by which the strategy weighs replies.
        max_examples: The greatest number of examples that is believed.
        records: Whether the strategy takes one record of tensors and one of numbers, as all but users' own do.
    """

    weights: Weights | None
    weighted_by: frozenset[str] = frozenset({NUM_EXAMPLES})
    max_examples: float = math.inf
    records: bool = False


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
        packing.unpack_tensors(reply.content)
        extras, scalars = detach(reply), reply_scalars(reply)
        _decode(reply.content)
    except Exception as error:  # whatever it was that the client sent
        raise ClientError(f"sent what cannot be read: {words(error)[:1000]}") from error
    _require_names({*scalars, *(state.name for state in extras.states)})
    num_examples = _weight(reply, NUM_EXAMPLES, expected)
    for key in expected.weighted_by - {NUM_EXAMPLES}:
        _weight(reply, key, expected)
    for state in extras.states:
        if not 0 <= state.weight <= expected.max_examples:
            raise ClientError(f"reports {state.weight:g} examples for {state.name!r}; {_rule(expected, least=0)}")
    arrays = first(reply.content, ArrayRecord)
    if expected.weights is not None:
        if arrays is None:
            raise ClientError("sent no weights.")
        _check_weights(unpack(arrays), extras.integers, expected.weights)
    if expected.records:
        _require_records(reply.content, trains=expected.weights is not None)
    return Reply(extras, num_examples, scalars)


def _decode(content: RecordDict) -> None:
    """Let all arrays be tensors."""
    for key, record in list(content.items()):
        if isinstance(record, ArrayRecord) and any(array.__dict__.get("tensor") is None for array in record.values()):
            content[key] = pack(unpack(record))


def _require_names(names: Iterable[str], known: Container[str] = ()) -> None:
    """Check the names that a client chose itself: each may become a column, a file, a line on a terminal."""
    new = [name for name in names if name not in known]
    if len(new) > MAX_NAMES:
        raise ClientError(f"sent {len(new)} names; at most {MAX_NAMES} are taken.")
    for name in new:
        if len(name) > MAX_LENGTH or not name.isprintable():
            raise ClientError(
                f"sent the name {name[:50]!r} of {len(name)} characters; a name is printable and has at most"
                f" {MAX_LENGTH}."
            )


def _weight(reply: Message, key: str, expected: Expected) -> float:
    """Return one of the numbers by which a reply counts."""
    value = (first(reply.content, MetricRecord) or MetricRecord()).get(key, 0)
    if isinstance(value, list):
        raise ClientError(f"sent {key}={value[:5]}; it is a single number.")
    least = 0 if expected.weights is None else 1
    if not math.isfinite(value) or value < 0 or (least and not value) or value > expected.max_examples:
        what = f"{value:g} examples" if key == NUM_EXAMPLES else f"{key}={value:g}, by which it is weighed"
        raise ClientError(f"reports {what}; {_rule(expected, least)}")
    return float(value)


def _rule(expected: Expected, least: int) -> str:
    return (
        f"it cannot be averaged: their number must be finite and {_LEAST[least]}, and at most {expected.max_examples:g}"
        " (FederatedTrainer(max_examples=...))."
    )


def _check_weights(averaged: Weights, integers: Weights, reference: Weights) -> None:
    """Check a client's weights, which come in two parts: no tensor may take the place of one of the other part."""
    for part, what, belongs in ((averaged, "floating and complex", True), (integers, "integer and bool", False)):
        _require_names(part, reference)
        for name in part:
            if name in reference and is_averaged(reference[name]) is not belongs:
                kind = dtype_name(reference[name].dtype)
                raise InvalidUpdateError(
                    f"sent {name!r} among its {what} tensors, the global model has it as {kind}.", tensor=name
                )
    check_update({**averaged, **integers}, reference)


def _require_records(content: RecordDict, *, trains: bool) -> None:
    """Check that there is one record of each kind, by the names that all clients use: strategies ask for no more."""
    wanted = {METRICS: MetricRecord, **({ARRAYS: ArrayRecord} if trains else {})}
    found = {key: type(record) for key, record in content.items() if not isinstance(record, ConfigRecord)}
    if found != wanted:
        raise ClientError(
            f"sent the records {', '.join(key[:50] for key in sorted(found))}; the strategy takes"
            f" {', '.join(sorted(wanted))}."
        )
