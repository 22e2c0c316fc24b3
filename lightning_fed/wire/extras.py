"""What travels beside the records that strategies and mods see: integer tensors, those of methods, metrics, notes.

The one place that knows of integer and bool tensors. No strategy averages them and no mod counts them (a clip norm must
not): they are split off the weights here, have a mean of their own, and are merged with what the strategy made of the
rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from lightning_fed._compat.flower import filled
from lightning_fed.tracebacks import plain
from lightning_fed.values.metrics import KINDS, MEAN, MERGED, METRIC, MetricState
from lightning_fed.values.running_mean import RunningMean
from lightning_fed.values.weights import Weights, is_averaged
from lightning_fed.wire.messages import ARRAYS, pack, unpack
from lightning_fed.wire.packing import read_json

Kind = TypeVar("Kind", ArrayRecord, ConfigRecord)

# Those with which torchmetrics and the merge compute.
_DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}

_INTEGERS, _STATES, _SPECS = "lightning-fed.integers", "lightning-fed.states", "lightning-fed.specs"
_NOTES, _METHODS = "lightning-fed.notes", "lightning-fed.methods"


def split_integers(weights: Mapping[str, Tensor]) -> tuple[Weights, Weights]:
    """Split ``weights`` into what strategies average and the integer and bool tensors, which are averaged apart."""
    averaged = {name: value for name, value in weights.items() if is_averaged(value)}
    return averaged, {name: value for name, value in weights.items() if name not in averaged}


# ---------------------------------------------------------------------------------------------- server to client


class IntegerTensors:
    """The integer and bool tensors of one stage of a round.

    Args:
        weights: The global weights.

    Attributes:
        averaged: All others, which the strategy sends and averages.
    """

    def __init__(self, weights: Weights) -> None:
        self.averaged, self._sent = split_integers(weights)
        self._mean = RunningMean()

    def attach(self, messages: Sequence[Message]) -> None:
        """Put them beside what the strategy sends (which often is one shared RecordDict)."""
        if self._sent:
            record = pack(self._sent)
            for message in messages:
                message.content[_INTEGERS] = record

    def add(self, extras: Extras, coefficient: float) -> None:
        """Take in what came beside a client's reply, with its averaging coefficient."""
        if extras.integers:
            self._mean.add(extras.integers, coefficient)

    def merged(self, averaged: Weights) -> Weights:
        """Return what the strategy made of the others, and the mean of these."""
        return {**averaged, **self._mean.value()}


def replace_weights(messages: Sequence[Message], weights: Mapping[int, Weights]) -> None:
    """Let some messages have other weights than the round's, which ``IntegerTensors.attach`` has completed.

    Args:
        messages: Those of a stage.
        weights: The others, by the node that a message goes to; the same tensors are sent as one record.
    """
    records: dict[tuple[int, str], dict[str, ArrayRecord]] = {}
    for message in messages:
        if (own := weights.get(message.metadata.dst_node_id)) is None:
            continue
        kinds = message.content.items()
        name = next((key for key, one in kinds if isinstance(one, ArrayRecord) and key != _INTEGERS), ARRAYS)
        if (id(own), name) not in records:
            averaged, integers = split_integers(own)
            records[id(own), name] = {name: pack(averaged), **({_INTEGERS: pack(integers)} if integers else {})}
        message.content = filled(RecordDict(), {**message.content, **records[id(own), name]})


def attach_methods(message: Message, tensors: ArrayRecord) -> None:
    """Put what methods send to a client beside the weights; Flower's strategies give all messages one content."""
    message.content = filled(RecordDict(), {**message.content, _METHODS: tensors})


def detach_integers(message: Message) -> Weights:
    """Detach the integer tensors that came beside a message, before mods see it."""
    return _tensors(message, _INTEGERS)


def detach_methods(message: Message) -> Weights:
    """Detach what methods sent, likewise, by ``"method/name"``."""
    return _tensors(message, _METHODS)


def _tensors(message: Message, key: str) -> Weights:
    record = _take(message.content, key, ArrayRecord)
    return {} if record is None else unpack(record)


def merge_integers(seen: Weights, detached: Weights) -> Weights:
    """Return all weights of a message: those that mods have seen, and what ``detach_integers`` gave."""
    return {**seen, **detached}


def _take(content: RecordDict, key: str, kind: type[Kind]) -> Kind | None:
    record = content.pop(key, None)
    if record is not None and not isinstance(record, kind):
        raise TypeError(f"{key} is a {type(record).__name__} and should be a {kind.__name__}")
    return record


# ---------------------------------------------------------------------------------------------- client to server


@dataclass
class Extras:
    """What travels back beside the records that strategies see."""

    integers: Weights = field(default_factory=dict)
    states: list[MetricState] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    methods: Weights = field(default_factory=dict)

    @classmethod
    def of(
        cls, weights: Weights, states: list[MetricState], notes: list[str], methods: Weights | None = None
    ) -> Extras:
        """Return those of a client's result: what ``without_integers`` leaves out, and all that is not weights."""
        return cls(split_integers(weights)[1], states, notes, methods or {})


def without_integers(weights: Mapping[str, Tensor]) -> Weights:
    """Return what strategies and mods see of a client's weights."""
    return split_integers(weights)[0]


def attach(reply: Message, extras: Extras) -> None:
    """Put integer tensors, methods' tensors, metric states and notes on a reply that the mods have done with."""
    if extras.notes:
        reply.content[_NOTES] = ConfigRecord({"texts": extras.notes})
    if extras.integers:
        reply.content[_INTEGERS] = pack(extras.integers)
    if extras.methods:
        reply.content[_METHODS] = pack(extras.methods)
    if extras.states:
        arrays = {f"{i}/{key}": t for i, state in enumerate(extras.states) for key, t in state.tensors.items()}
        specs = [[s.name, s.kind, s.attribute, s.updates, s.logged, s.on_bar] for s in extras.states]
        reply.content[_STATES] = pack(arrays)
        reply.content[_SPECS] = filled(ConfigRecord(), {"json": json.dumps(specs)})


def detach(reply: Message) -> Extras:
    """Detach what ``attach`` attached, before a strategy sees the reply."""
    extras = Extras(integers=detach_integers(reply), methods=detach_methods(reply))
    notes = _take(reply.content, _NOTES, ConfigRecord)
    extras.notes = [] if notes is None else [plain(str(text), 2000) for text in cast(list[str], notes["texts"])[:20]]
    specs = _take(reply.content, _SPECS, ConfigRecord)
    record = _take(reply.content, _STATES, ArrayRecord)
    _require((specs is None) == (record is None), "half of its metric states")
    if specs is not None and record is not None:
        extras.states = _states(read_json(str(specs["json"])), unpack(record))
    return extras


def _states(specs: Any, arrays: Weights) -> list[MetricState]:
    tensors: dict[int, Weights] = {}
    for key, tensor in arrays.items():
        index, name = key.split("/", 1)
        tensors.setdefault(int(index), {})[name] = tensor
    _require(isinstance(specs, list) and set(tensors) <= set(range(len(specs))), "metric states without a name")
    return [_state(spec, tensors.get(i, {})) for i, spec in enumerate(specs)]


def _state(spec: Any, tensors: Weights) -> MetricState:
    name, kind, attribute, updates, logged, on_bar = spec
    words = all(isinstance(word, str) for word in (name, attribute)) and kind in KINDS
    _require(words and isinstance(updates, int) and 0 <= updates < 2**53, f"{spec} for the name of a metric state")
    other = next((t.dtype for t in tensors.values() if t.dtype not in _DTYPES), None)
    _require(other is None, f"{name!r} as {other}")
    if kind != METRIC:
        _require("value" in tensors and (kind != MEAN or "weight" in tensors), f"half of {name!r}")
        _require(not any(tensor.is_complex() for tensor in tensors.values()), f"{name!r} as a complex number")
        single = [part for part in tensors if part == "weight" or kind in MERGED]
        _require(all(tensors[part].numel() == 1 for part in single), f"several numbers for {name!r}")
        tensors = {**tensors, **{part: tensors[part].reshape(()) for part in single if tensors[part].dim()}}
    if kind == MEAN and float(tensors["weight"]) == 0:
        _require(not tensors["value"].abs() > 0, f"{name!r} as a sum over no examples that is not 0")
    return MetricState(name, kind, tensors, attribute, updates, logged=bool(logged), on_bar=bool(on_bar))


def _require(good: bool, instead: str) -> None:
    if not good:
        raise ValueError(instead)
