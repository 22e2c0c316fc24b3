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
from functools import lru_cache
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from torch import Tensor

from lightning_fed.metrics import MetricState
from lightning_fed.weights import Weights

Kind = TypeVar("Kind", ArrayRecord, MetricRecord, ConfigRecord)

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
NUM_EXAMPLES, ROUND, SEED = "num-examples", "server-round", "run-seed"
CLIENT = "partition-id"
_INTEGERS, _STATES, _SPECS = "lightning-fed.integers", "lightning-fed.states", "lightning-fed.specs"
_FIT_STATE = "lightning-fed.fit-state"
CLIENT_RAISED = 2  # Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION

_NARROW = {torch.bfloat16} | {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}


class TensorArray(Array):
    """A Flower ``Array`` that keeps a tensor and turns it into bytes only when bytes are asked for.

    Within a process nothing is serialised. ``numpy()`` gives a copy, so nobody who got the record can change what
    others see. bfloat16 and float8, which NumPy lacks, become float32, which holds them exactly.
    """

    def __init__(self, tensor: Tensor) -> None:
        shape, dtype = tuple(tensor.shape), _dtype_name(tensor.dtype)
        self.__dict__.update(tensor=tensor.detach(), dtype=dtype, shape=shape, stype="numpy.ndarray")

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in NumPy's format, as Flower sends it."""
        if self.__dict__["tensor"] is None:
            return bytes(self.__dict__["_bytes"])
        buffer = BytesIO()
        np.save(buffer, self.numpy(), allow_pickle=False)
        return buffer.getvalue()

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["tensor"], self.__dict__["_bytes"] = None, value

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy of the tensor as a NumPy array."""
        tensor = self.__dict__["tensor"]
        if tensor is None:
            return super().numpy()
        if tensor.dtype in _NARROW:
            tensor = tensor.float()
        return np.array(tensor.cpu().numpy(), copy=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


@lru_cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(torch.float32 if dtype in _NARROW else dtype).removeprefix("torch.")


# Flower writes the class's name into the bytes it sends: on the other side a plain Array comes out.
TensorArray.__qualname__ = "Array"


def pack(weights: Mapping[str, Tensor]) -> ArrayRecord:
    """An ArrayRecord that holds the tensors themselves; the caller must not write into them afterwards."""
    record = ArrayRecord()
    for name, tensor in weights.items():
        record[name] = TensorArray(tensor)
    return record


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
    delivered = RecordDict()
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            fresh = ArrayRecord()
            for name, array in record.items():
                tensor = array.__dict__.get("tensor")
                fresh[name] = (
                    Array(array.dtype, tuple(array.shape), array.stype, array.data)
                    if tensor is None
                    else TensorArray(tensor)
                )
            delivered[key] = fresh
        else:
            plain: dict[str, Any] = {k: list(v) if isinstance(v, list) else v for k, v in record.items()}
            delivered[key] = type(record)(plain)
    return delivered


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
    record = message.content.pop(_INTEGERS, None)
    return unpack(record) if isinstance(record, ArrayRecord) else {}


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


def train_reply(message: Message, weights: Weights, num_examples: int, scalars: Mapping[str, float]) -> Message:
    """The reply to a train message, as strategies and mods expect it."""
    content = RecordDict({ARRAYS: pack(weights), METRICS: MetricRecord({**scalars, NUM_EXAMPLES: num_examples})})
    return Message(content, reply_to=message)


def evaluate_reply(message: Message, num_examples: int, scalars: Mapping[str, float]) -> Message:
    """The reply to an evaluate message; ``num_examples`` 0 says that the client has nothing to evaluate on."""
    return Message(RecordDict({METRICS: MetricRecord({**scalars, NUM_EXAMPLES: num_examples})}), reply_to=message)


def error_reply(message: Message, exception: BaseException, traceback: str) -> Message:
    """The reply of a client that raised; within a process the server gets the exception itself, too."""
    error = Error(CLIENT_RAISED, traceback)
    error.__dict__["exception"] = exception
    return Message(error, reply_to=message)


def attach_extras(reply: Message, extras: Extras) -> None:
    """Puts integer tensors and metric states on a reply that the mods have done with."""
    if extras.integers:
        reply.content[_INTEGERS] = pack(extras.integers)
    if extras.states:
        arrays = {f"{i}/{key}": t for i, state in enumerate(extras.states) for key, t in state.tensors.items()}
        specs = [[s.name, s.kind, s.attribute, s.updates] for s in extras.states]
        reply.content[_STATES] = pack(arrays)
        reply.content[_SPECS] = ConfigRecord({"json": json.dumps(specs)})


def detach_extras(reply: Message) -> Extras:
    """Takes off what ``attach_extras`` put on, before a strategy sees the reply."""
    extras = Extras(integers=detach_integers(reply))
    specs = reply.content.pop(_SPECS, None)
    record = reply.content.pop(_STATES, None)
    if isinstance(specs, ConfigRecord) and isinstance(record, ArrayRecord):
        tensors: dict[str, Weights] = {}
        for key, tensor in unpack(record).items():
            index, name = key.split("/", 1)
            tensors.setdefault(index, {})[name] = tensor
        for i, (name, kind, attribute, updates) in enumerate(json.loads(str(specs["json"]))):
            extras.states.append(MetricState(name, kind, tensors.get(str(i), {}), attribute, updates))
    return extras


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
    """What ``client_state="carry"`` kept of the client's last fit."""
    record = context.state.get(_FIT_STATE)
    return bytes(record["bytes"]) if isinstance(record, ConfigRecord) else None  # type: ignore[arg-type]


def set_fit_state(context: Context, state: bytes | None) -> None:
    """Keeps a fit's state with the client, where Flower keeps it from round to round."""
    if state is None:
        context.state.pop(_FIT_STATE, None)
    else:
        context.state[_FIT_STATE] = ConfigRecord({"bytes": state})
