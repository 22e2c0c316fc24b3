"""What a reply costs the server: a hostile one takes less than twice the memory of an honest one, whatever it says."""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from lightning_fed._compat.flower_link import assembled
from lightning_fed.errors import ClientError
from lightning_fed.wire import extras, messages
from lightning_fed.wire.packing import Packer, unpack_content
from lightning_fed.wire.reply import Expected, read_reply
from tests.helpers import in_flower
from tests.wire.parts import parts_of
from tests.wire.replies import honest
from tests.wire.test_reply import HOSTILE_REPLIES

pytestmark = [pytest.mark.landing, pytest.mark.skipif(sys.platform == "win32", reason="forks")]

WEIGHTS = {"matrix": torch.zeros(2, 3), "steps": torch.tensor(10), "on": torch.tensor([True, False])}
LARGE = {**WEIGHTS, "large": torch.randn(6_000_000)}
MOST = 1.5 * 24e6


def instruction() -> Message:
    apart = extras.IntegerTensors(LARGE)
    content = RecordDict({"arrays": messages.pack(apart.averaged), "config": messages.round_config(1, 0)})
    message = Message(content, 1, "train")
    apart.attach([message])
    message.metadata.__dict__["_message_id"] = "asked"
    return message


def read(make: Callable[[Message], Message], packed: bool, times: int = 1) -> None:
    """Read what somebody sends, from the bytes on, as the server of a SuperLink does, each chunk so many times."""
    reply = make(honest(1, instruction()))
    if packed:
        reply.content = Packer().pack(reply.content, is_reply=True)
    top, parts = parts_of(reply)
    if times > 1:
        parts = {name: repeated(part, times) if part.startswith(b"Array ") else part for name, part in parts.items()}
    with suppress(ClientError, ValueError):
        received = assembled(top, parts, MOST)
        unpack_content(received.content)
        read_reply(received, Expected(LARGE, trains=True, max_examples=1e9, records=True))


def repeated(array: bytes, times: int) -> bytes:
    head, _, body = array.partition(b"\x00")
    said = json.loads(body)
    said["arraychunk_ids"] *= times
    body = json.dumps(said).encode()
    return b" ".join([*head.split(b" ")[:2], str(len(body)).encode()]) + b"\x00" + body


def one_array_for_all(reply: Message) -> Message:
    array = Array(np.zeros(250_000, dtype=np.float32))
    reply.content["arrays"] = ArrayRecord({f"n{i}": array for i in range(3000)})
    return reply


def one_array_in_all_records(reply: Message) -> Message:
    array = Array(np.zeros(2_000_000, dtype=np.float32))
    reply.content.update({f"{i}": ArrayRecord({"a": array}) for i in range(100)})
    return reply


def grown(work: Callable[[], None]) -> float:
    """By how many MB a process grows at most."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            in_flower(work)
            os.write(writing, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        found = said.read()
    os.waitpid(child, 0)
    return float(found) / 1024


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "NumPy's format"])
def test_hostile_replies_take_less_than_twice_the_memory_of_an_honest_one(packed):
    def hostile() -> None:
        for spoil, _ in HOSTILE_REPLIES.values():
            read(spoil, packed)
        read(one_array_for_all, packed=False)
        read(one_array_in_all_records, packed=False)
        for times in (2, 100, 10_000):
            read(lambda reply: reply, packed, times)

    usual = grown(lambda: [read(lambda reply: reply, packed) for _ in range(3)] and None)
    assert usual > 2 * 24  # what is read, and the bytes
    assert grown(hostile) < 2 * usual
