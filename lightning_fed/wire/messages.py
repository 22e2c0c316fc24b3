"""The one file that knows the keys of Flower's records.

What travels in a message is what Flower's own strategies and mods expect: one ArrayRecord ``arrays`` with all floating
tensors, one ConfigRecord ``config`` to the client, one MetricRecord ``metrics`` with ``num-examples`` back. What they
must not see travels beside these: integer and bool tensors (a clip norm must not count them), and metric states. The
loop and the client app put it on and take it off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from lightning_fed._compat.flower import filled
from lightning_fed.errors import ClientError
from lightning_fed.tracebacks import frames, words
from lightning_fed.values.metrics import MetricState
from lightning_fed.values.weights import Weights
from lightning_fed.wire.tensor_array import TensorArray

Kind = TypeVar("Kind", ArrayRecord, MetricRecord, ConfigRecord)

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
NUM_EXAMPLES, ROUND, SEED = "num-examples", "server-round", "run-seed"
CLIENT = "partition-id"
_INTEGERS, _STATES, _SPECS = "lightning-fed.integers", "lightning-fed.states", "lightning-fed.specs"
_NOTES = "lightning-fed.notes"
_FIT_STATE, _CALLBACK_STATES = "lightning-fed.fit-state", "lightning-fed.callback-states"
CLIENT_RAISED = 2  # Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def pack(weights: Mapping[str, Tensor]) -> ArrayRecord:
    """An ArrayRecord that holds the tensors themselves; the caller must not write into them afterwards."""
    return filled(ArrayRecord(), {name: TensorArray(tensor) for name, tensor in weights.items()})


def unpack(record: ArrayRecord) -> Weights:
    """The tensors of a record, to be read and not written: within a process they are the sender's own."""
    return {name: tensor_of(array) for name, array in record.items()}


def tensor_of(array: Array) -> Tensor:
    """An array's tensor, to be read and not written."""
    tensor = array.__dict__.get("tensor")
    return torch.from_numpy(array.numpy()) if tensor is None else tensor


def first(content: RecordDict, kind: type[Kind]) -> Kind | None:
    """The first record of a kind, or ``None``.

    Flower's own ``content.array_records`` makes a reference cycle, which keeps a reply's weights in memory until the
    next garbage collection.
    """
    return next((record for record in content.values() if isinstance(record, kind)), None)


def copy_for_delivery(content: RecordDict) -> RecordDict:
    """The same records in containers of their own: a receiver that writes into its copy changes nobody else's."""
    return filled(RecordDict(), {key: _copied(record) for key, record in content.items()})


def _copied(record: Any) -> Any:
    if isinstance(record, ArrayRecord):
        return filled(ArrayRecord(), {name: _copy(array) for name, array in record.items()})
    return filled(type(record)(), {key: list(v) if isinstance(v, list) else v for key, v in record.items()})


def _copy(array: Array) -> Array:
    tensor = array.__dict__.get("tensor")
    if tensor is None:
        return Array(array.dtype, tuple(array.shape), array.stype, array.data)
    return TensorArray(tensor)


# ---------------------------------------------------------------------------------------------- server to client


def round_config(round: int, seed: int) -> ConfigRecord:
    """The config that goes with every message of a round."""
    return ConfigRecord({ROUND: round, SEED: seed})


def attach_integers(messages: Sequence[Message], integers: Weights) -> None:
    """Puts the integer and bool tensors beside what the strategy sends (which often is one shared RecordDict)."""
    if integers:
        record = pack(integers)
        for message in messages:
            message.content[_INTEGERS] = record


def detach_integers(message: Message) -> Weights:
    """Takes off what ``attach_integers`` put on, before mods see the message."""
    record = _take(message.content, _INTEGERS, ArrayRecord)
    return {} if record is None else unpack(record)


def _take(content: RecordDict, key: str, kind: type[Kind]) -> Kind | None:
    record = content.pop(key, None)
    if record is not None and not isinstance(record, kind):
        raise TypeError(f"{key} is a {type(record).__name__} and should be a {kind.__name__}")
    return record


@dataclass
class Instruction:
    """What a client is told: the round, the run's seed and the weights that strategies average."""

    round: int
    seed: int
    weights: Weights


def read_instruction(message: Message) -> Instruction:
    """Reads a train or evaluate message as the client's mods left it."""
    config = first(message.content, ConfigRecord) or ConfigRecord()
    arrays = first(message.content, ArrayRecord)
    assert arrays is not None
    return Instruction(_int(config.get(ROUND, 1)), _int(config.get(SEED, 0)), unpack(arrays))


def _int(value: Any) -> int:
    return int(value)


# ---------------------------------------------------------------------------------------------- client to server


@dataclass
class Extras:
    """What travels back beside the records that strategies see."""

    integers: Weights = field(default_factory=dict)
    states: list[MetricState] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def train_reply(message: Message, weights: Weights, num_examples: int, scalars: Mapping[str, float]) -> Message:
    """The reply to a train message, as strategies and mods expect it."""
    content = RecordDict({ARRAYS: pack(weights), METRICS: MetricRecord({**scalars, NUM_EXAMPLES: num_examples})})
    return Message(content, reply_to=message)


def evaluate_reply(message: Message, num_examples: int, scalars: Mapping[str, float]) -> Message:
    """The reply to an evaluate message; ``num_examples`` 0 says that the client has nothing to evaluate on."""
    return Message(RecordDict({METRICS: MetricRecord({**scalars, NUM_EXAMPLES: num_examples})}), reply_to=message)


def error_reply(message: Message, exception: BaseException) -> Message:
    """The reply of a client that raised: what it says, as text; within a process also the exception itself."""
    trace = frames(exception)
    error = Error(CLIENT_RAISED, "\nThe client's traceback:\n".join([words(exception), *([trace] if trace else [])]))
    error.__dict__["exception"] = exception
    return Message(error, reply_to=message)


def raised(reply: Message) -> tuple[str, BaseException | None]:
    """What an error reply says, and the exception itself where it is at hand."""
    return (reply.error.reason or "unknown error").strip(), reply.error.__dict__.get("exception")


def attach_extras(reply: Message, extras: Extras) -> None:
    """Puts integer tensors, metric states and notes to the user on a reply that the mods have done with."""
    if extras.notes:
        reply.content[_NOTES] = ConfigRecord({"texts": extras.notes})
    if extras.integers:
        reply.content[_INTEGERS] = pack(extras.integers)
    if extras.states:
        arrays = {f"{i}/{key}": t for i, state in enumerate(extras.states) for key, t in state.tensors.items()}
        specs = [[s.name, s.kind, s.attribute, s.updates, s.logged, s.on_bar] for s in extras.states]
        reply.content[_STATES] = pack(arrays)
        reply.content[_SPECS] = ConfigRecord({"json": json.dumps(specs)})


def detach_extras(reply: Message) -> Extras:
    """Takes off what ``attach_extras`` put on, before a strategy sees the reply."""
    extras, notes = Extras(integers=detach_integers(reply)), _take(reply.content, _NOTES, ConfigRecord)
    extras.notes = [] if notes is None else [str(text) for text in notes["texts"]]  # type: ignore[union-attr]
    specs = _take(reply.content, _SPECS, ConfigRecord)
    record = _take(reply.content, _STATES, ArrayRecord)
    _require((specs is None) == (record is None), "half of its metric states")
    if specs is not None and record is not None:
        extras.states = _states(json.loads(str(specs["json"])), unpack(record))
    return extras


def _states(specs: Any, arrays: Weights) -> list[MetricState]:
    tensors: dict[int, Weights] = {}
    for key, tensor in arrays.items():
        index, name = key.split("/", 1)
        tensors.setdefault(int(index), {})[name] = tensor
    _require(set(tensors) <= set(range(len(specs))), "metric states without a name")
    states = []
    for i, (name, kind, attribute, updates, *where) in enumerate(specs):
        words = all(isinstance(word, str) for word in (name, kind, attribute))
        _require(words and isinstance(updates, int), f"{specs[i]} for the name of a metric state")
        logged, on_bar = map(bool, where)
        states.append(MetricState(name, kind, tensors.get(i, {}), attribute, updates, logged=logged, on_bar=on_bar))
    return states


def _require(good: bool, instead: str) -> None:
    if not good:
        raise ValueError(instead)


@dataclass
class Reply:
    """A client's reply, read; ``arrays`` is ``None`` where it has none."""

    arrays: Weights | None
    extras: Extras
    num_examples: float
    scalars: dict[str, float]


def read_reply(reply: Message) -> Reply:
    """Reads a reply, and takes off it what strategies must not see.

    Raises:
        ClientError: If something in it is not of the form in which it travels.
    """
    try:
        extras, arrays = detach_extras(reply), first(reply.content, ArrayRecord)
        record = first(reply.content, MetricRecord) or MetricRecord()
        _require(not isinstance(record.get(NUM_EXAMPLES), list), f"{NUM_EXAMPLES}={record.get(NUM_EXAMPLES)}")
        weights = None if arrays is None else unpack(arrays)
        return Reply(weights, extras, num_examples(reply), reply_scalars(reply))
    except Exception as error:  # whatever it was that the client sent
        raise ClientError(f"sent what cannot be read: {words(error)}") from error


def num_examples(reply: Message, key: str = NUM_EXAMPLES) -> float:
    """The averaging coefficient that a reply carries; 0 if it carries none."""
    record = first(reply.content, MetricRecord)
    value = 0 if record is None else record.get(key, 0)
    return 0.0 if isinstance(value, list) else float(value)


def scalars(record: MetricRecord | None, key: str = NUM_EXAMPLES) -> dict[str, float]:
    """The single numbers of a MetricRecord without the averaging coefficient."""
    items = {} if record is None else record
    return {k: float(v) for k, v in items.items() if k != key and not isinstance(v, list)}


def reply_scalars(reply: Message, key: str = NUM_EXAMPLES) -> dict[str, float]:
    """The single numbers that a client reports."""
    return scalars(first(reply.content, MetricRecord), key)


# ---------------------------------------------------------------------------------------------- a client's own state


def get_fit_state(context: Context) -> bytes | None:
    """What the client keeps of its last fit: optimizers and schedulers with ``client_state="carry"``."""
    return _get(context, _FIT_STATE)


def set_fit_state(context: Context, state: bytes | None) -> None:
    """Keeps a fit's state with the client, where Flower keeps it from round to round."""
    _set(context, _FIT_STATE, state)


def get_callback_states(context: Context) -> bytes | None:
    """What the client's callbacks keep, whatever ``client_state`` is."""
    return _get(context, _CALLBACK_STATES)


def set_callback_states(context: Context, states: bytes | None) -> None:
    """Keeps the callbacks' states with the client."""
    _set(context, _CALLBACK_STATES, states)


def _get(context: Context, key: str) -> bytes | None:
    record = context.state.get(key)
    return bytes(record["bytes"]) if isinstance(record, ConfigRecord) else None  # type: ignore[arg-type]


def _set(context: Context, key: str, kept: bytes | None) -> None:
    if kept is None:
        context.state.pop(key, None)
    else:
        context.state[key] = ConfigRecord({"bytes": kept})
