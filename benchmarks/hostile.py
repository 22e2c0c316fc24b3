"""Sites that send what no site should: garbage in place of a reply, or an answer to another site's message.

Nothing of the server is changed: these are sites whose own copy of the package does something else.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict

import lightning_fed.site.join as joining
from lightning_fed._compat.flower import make_message
from lightning_fed._compat.flower_node import NodeConnection
from lightning_fed.wire import messages, packing, roll_call
from lightning_fed.wire.tensor_array import TensorArray

WEIGHT, COUNT = "net.0.weight", "net.1.num_batches_tracked"
_INTEGERS, _STATES, _SPECS = "lightning-fed.integers", "lightning-fed.states", "lightning-fed.specs"
_TENSORS = "lightning-fed.tensors"


def _as(dtype: torch.dtype) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        arrays = content[messages.ARRAYS]
        arrays[WEIGHT] = TensorArray(messages.tensor_of(arrays[WEIGHT]).to(dtype))

    return change


def _weight(content: RecordDict, array: Array) -> None:
    """Send one tensor of the weights in another form, and all of them unpacked."""
    content[messages.ARRAYS] = ArrayRecord({**content[messages.ARRAYS], WEIGHT: array})


def _bytes(stype: str, data: bytes) -> Callable[[RecordDict], None]:
    return lambda content: _weight(content, Array("float32", (8, 8), stype, data))


def _header(shape: tuple[int, ...]) -> bytes:
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _not_a_number(content: RecordDict) -> None:
    tensor = messages.tensor_of(content[messages.ARRAYS][WEIGHT]).clone()
    tensor[0, 0] = float("nan")
    content[messages.ARRAYS][WEIGHT] = TensorArray(tensor)


def _float_among_integers(content: RecordDict) -> None:
    content[_INTEGERS][WEIGHT] = content[messages.ARRAYS][WEIGHT]


def _float_for_an_integer(content: RecordDict) -> None:
    content[_INTEGERS][COUNT] = TensorArray(torch.tensor(0.5))


def _examples(number: float) -> Callable[[RecordDict], None]:
    return lambda content: content[messages.METRICS].update({messages.NUM_EXAMPLES: number})


def _specs(text: str) -> Callable[[RecordDict], None]:
    return lambda content: content.update({_SPECS: ConfigRecord({"json": text})})


def _described(change: Callable[[Any], str]) -> Callable[[RecordDict], None]:
    """Send what is packed already with another description of it."""

    def send(content: RecordDict) -> None:
        data = content[_TENSORS]["bytes"]
        length = int.from_bytes(data[:8], "little")
        text = change(json.loads(data[8 : 8 + length])).encode()
        head, begin = len(text).to_bytes(8, "little") + text, -(-(8 + length) // 64) * 64
        content[_TENSORS] = ConfigRecord({"bytes": head + bytes(-len(head) % 64) + data[begin:]})

    return send


def _huge(described: Any) -> str:
    for _, entries in described[0]:
        for entry in entries:
            entry[2] = [10**6, 10**6]
    return json.dumps(described)


def _many_numbers(content: RecordDict) -> None:
    content[messages.METRICS].update({f"m{i}": 1.0 for i in range(10_000)})


def _many_states(content: RecordDict) -> None:
    first, *_ = json.loads(content[_SPECS]["json"])
    content[_SPECS] = ConfigRecord({"json": json.dumps([[f"m{i}", *first[1:]] for i in range(10_000)])})
    of_first = {key.split("/", 1)[1]: array for key, array in content[_STATES].items() if key.startswith("0/")}
    many = {f"{i}/{name}": array for i in range(10_000) for name, array in of_first.items()}
    content[_STATES] = ArrayRecord(many)


def _nan_state(content: RecordDict) -> None:
    states = content[_STATES]
    for key, array in list(states.items()):
        if (tensor := messages.tensor_of(array)).is_floating_point():
            states[key] = TensorArray(torch.full_like(tensor, float("nan")))


DEEP = "[" * 100_000 + "]" * 100_000
# By name: what becomes of the content of an honest reply to a train message.
GARBAGE: dict[str, Callable[[RecordDict], None]] = {
    "an integer dtype": _as(torch.int64),
    "a bool dtype": _as(torch.bool),
    "a complex dtype": _as(torch.complex64),
    "a float among integers": _float_among_integers,
    "a float for an integer": _float_for_an_integer,
    "NaN": _not_a_number,
    "infinite num_examples": _examples(float("inf")),
    "num_examples of 1e300": _examples(1e300),
    "num_examples of 2^62": _examples(2**62),
    "a bad npy header": _bytes("numpy.ndarray", b"\x93NUMPY\x01\x00 this is no header"),
    "a huge shape in npy": _bytes("numpy.ndarray", _header((10**6, 10**6))),
    "a pickle": _bytes("numpy.ndarray", pickle.dumps(print)),
    "a wrong stype": _bytes("pickle", pickle.dumps(print)),
    "broken metric specs": _specs('[["train_loss", 1'),
    "metric specs of wrong types": _specs('[[1, {}, null, "x"]]'),
    "deep JSON": _specs(DEEP),
    "10,000 metric names": _many_numbers,
    "10,000 metric states": _many_states,
    "NaN in a metric state": _nan_state,
}
# The same, of its packed content.
PACKED = {"a huge shape, packed": _described(_huge), "deep JSON, packed": _described(lambda described: DEEP)}
KINDS = [*GARBAGE, *PACKED]


def kind_of(round: int) -> str | None:
    """Which garbage is sent in a round: in every other one, each kind in turn."""
    return None if round % 2 else KINDS[(round // 2 - 1) % len(KINDS)]


def _sends_garbage() -> None:
    build, pack, packed_as = joining.build_client_app, packing.Packer.pack, [""]

    def packed(self: packing.Packer, content: RecordDict, **kwargs: bool) -> RecordDict:
        done = pack(self, content, **kwargs)
        if packed_as[0] in PACKED:
            PACKED[packed_as[0]](done)
        return done

    def built(side: Any) -> Any:
        app = build(side)

        def answer(message: Message, context: Any) -> Message:
            kind = kind_of(roll_call.round_of(message))
            reply = app(message, context)
            packed_as[0] = ""
            if message.metadata.message_type == "train" and kind is not None:
                packed_as[0] = kind
                GARBAGE.get(kind, lambda content: None)(reply.content)
                print(f"sends {kind}", flush=True)
            return reply

        return answer

    joining.build_client_app, packing.Packer.pack = built, packed


def _lets_know(path: Path) -> None:
    """Tell others, by a file, which message it is about to answer; they get the time to be first."""
    send = NodeConnection.send

    def tell_and_send(self: NodeConnection, reply: Message, seconds: float) -> None:
        if reply.metadata.message_type == "train":
            new = path.with_suffix(".new")
            new.write_text(json.dumps([reply.metadata.reply_to_message_id, reply.metadata.src_node_id]))
            new.replace(path)
            time.sleep(0.4)
        send(self, reply, seconds)

    NodeConnection.send = tell_and_send


def _answers_for_another(path: Path, as_the_other: bool) -> None:
    """Answer another site's message with a tenth of the weights before it does; then its own, as it should."""
    send, last = NodeConnection.send, [""]

    def forge_and_send(self: NodeConnection, reply: Message, seconds: float) -> None:
        if reply.metadata.message_type == "train":
            until = time.monotonic() + 5
            while time.monotonic() < until and (not path.exists() or path.read_text() == last[0]):
                time.sleep(0.02)
            if path.exists() and path.read_text() != last[0]:
                last[0] = path.read_text()
                name, node = json.loads(last[0])
                before = self.traffic.sent
                with suppress(ConnectionError):
                    send(self, _forged(reply, name, node if as_the_other else None), seconds)
                print(f"answers for another, {self.traffic.sent - before} bytes were taken", flush=True)
        send(self, reply, seconds)

    NodeConnection.send = forge_and_send


def _forged(reply: Message, name: str, node: int | None) -> Message:
    content = messages.copy_for_delivery(reply.content)
    packing.unpack_content(content)
    weights = messages.unpack(content[messages.ARRAYS])
    content[messages.ARRAYS] = messages.pack({key: value / 10 for key, value in weights.items()})
    of = reply.metadata
    metadata = Metadata(
        run_id=of.run_id,
        message_id="",
        src_node_id=of.src_node_id if node is None else node,
        dst_node_id=of.dst_node_id,
        reply_to_message_id=name,
        group_id=of.group_id,
        created_at=time.time(),
        ttl=of.ttl,
        message_type=of.message_type,
    )
    return make_message(metadata=metadata, content=packing.Packer().pack(content, is_reply=True))


def become(kind: str, path: str = "", as_the_other: bool = False) -> None:
    """Change what this process sends: ``"garbage"``, another site's answers (``"forger"``), a secret (``"victim"``)."""
    if kind == "garbage":
        _sends_garbage()
    elif kind == "victim":
        _lets_know(Path(path))
    else:
        _answers_for_another(Path(path), as_the_other)
