"""All tensors of a message as one piece of bytes: what goes in comes out, and nothing else does."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from lightning_fed.wire import messages
from lightning_fed.wire.packing import Packer, unpack_content
from tests.helpers import in_flower, over_the_wire
from tests.wire.parts import parts_of

TENSORS = {
    "float": torch.randn(3, 5),
    "turned": torch.randn(4, 3).T,
    "double": torch.randn(2, dtype=torch.float64),
    "half": torch.randn(7).half(),
    "brain": torch.randn(3).bfloat16(),
    "narrow": torch.randn(5).to(torch.float8_e4m3fn),
    "complex": torch.randn(2, dtype=torch.complex64).conj(),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False]),
}


def content() -> RecordDict:
    whole = {name: tensor for name, tensor in TENSORS.items() if name in ("count", "mask")}
    rest = {name: tensor for name, tensor in TENSORS.items() if name not in whole}
    return RecordDict({"config": ConfigRecord({"a": 1}), "arrays": messages.pack(rest), "more": messages.pack(whole)})


def test_what_is_packed_comes_out_bit_for_bit_over_the_wire():
    packed = over_the_wire(Packer().pack(content()))
    assert len(packed) == 2
    unpack_content(packed)
    assert list(packed) == ["config", "arrays", "more"]
    got = {**messages.unpack(packed["arrays"]), **messages.unpack(packed["more"])}
    for name, tensor in TENSORS.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(
            *(one.resolve_conj().contiguous().view(torch.uint8) for one in (got[name], tensor))
            if tensor.dim()
            else (got[name], tensor)
        )


def test_flowers_own_code_finds_numpys_form_in_what_came_off_the_wire():
    packed = over_the_wire(Packer().pack(content()))
    unpack_content(packed)
    assert packed["arrays"]["brain"].numpy().dtype == np.float32
    assert packed["arrays"]["brain"].dtype == "float32"


@pytest.mark.parametrize("is_reply", [True, False])
def test_numbers_texts_and_bytes_come_out_as_they_were_and_in_their_order(is_reply):
    records = {
        "config": ConfigRecord(
            {"text": "ü\u2028\ud800", "flag": True, "whole": 2**62, "real": 1.0, "all": [0.1, 2.0], "no": []}
        ),
        "raw": ConfigRecord({"bytes": b"\x00\xff", "n": 1}),
        "arrays": messages.pack(TENSORS),
        "metrics": MetricRecord({"nan": float("nan"), "inf": float("-inf"), "tiny": 5e-324, "list": [1, 2]}),
        "last": ConfigRecord({}),
    }
    packed = over_the_wire(Packer().pack(RecordDict(records), is_reply=is_reply))
    assert len(packed) == 3 - is_reply
    packed["later"] = ConfigRecord({"a": 1})
    unpack_content(packed)
    assert list(packed) == [*records, "later"]
    assert packed["raw"] == records["raw"]
    assert {k: (type(v), v) for k, v in packed["config"].items()} == {
        k: (type(v), v) for k, v in records["config"].items()
    }
    assert repr(dict(packed["metrics"])) == repr(dict(records["metrics"]))
    assert isinstance(packed["metrics"], MetricRecord)


@pytest.mark.parametrize(("elements", "objects"), [(10, 4), (300_000, 6)])
@pytest.mark.parametrize("is_reply", [True, False])
def test_what_is_small_goes_as_few_of_flowers_objects(elements, objects, is_reply):
    content = RecordDict(
        {
            "arrays": messages.pack({"w": torch.randn(elements)}),
            "config": ConfigRecord({"a": 1}),
            "more": MetricRecord(),
        }
    )
    _, parts = in_flower(lambda: parts_of(Message(Packer().pack(content, is_reply=is_reply), 1, "train")))
    assert len(parts) == objects - is_reply


def test_contents_with_the_same_arrays_are_packed_once():
    packer, one = Packer(), content()
    other = RecordDict({**one, "config": ConfigRecord({"a": 2})})
    first, second = packer.pack(one), packer.pack(other)
    assert first["lightning-fed.tensors"] is second["lightning-fed.tensors"]
    unpack_content(second)
    assert second["config"] == ConfigRecord({"a": 2})


def test_arrays_of_others_go_as_they_are():
    plain = ArrayRecord({"x": Array(np.arange(3.0))})
    packed = Packer().pack(RecordDict({"arrays": plain}))
    assert packed["arrays"] is plain
    unpack_content(packed)
    assert packed["arrays"] is plain


def tampered(change) -> RecordDict:
    packed = over_the_wire(Packer().pack(content()))
    data = packed["lightning-fed.tensors"]["bytes"]
    length = int.from_bytes(data[:8], "little")
    index, nothing = json.loads(data[8 : 8 + length])
    rest = json.loads(packed["lightning-fed.rest"]["json"])
    assert nothing is None
    tensors = data[-(-(8 + length) // 64) * 64 :]
    change(index, rest)
    text = json.dumps([index, None]).encode()
    head = len(text).to_bytes(8, "little") + text
    head += bytes(-len(head) % 64)
    packed["lightning-fed.tensors"] = ConfigRecord({"bytes": head + tensors})
    packed["lightning-fed.rest"] = ConfigRecord({"json": json.dumps(rest)})
    return packed


def test_tampered_with_by_nobody_it_is_what_it_was():
    packed = tampered(lambda index, rest: None)
    unpack_content(packed)
    assert list(packed) == ["config", "arrays", "more"]


CHANGES = {
    "too long a shape": lambda index, rest: index[0][1][0].__setitem__(2, [10**12, 10**12]),
    "a negative size": lambda index, rest: index[0][1][0].__setitem__(2, [-1, -15]),
    "a size that is none": lambda index, rest: index[0][1][0].__setitem__(2, ["3", 5]),
    "an unknown dtype": lambda index, rest: index[0][1][0].__setitem__(1, "object"),
    "a record twice": lambda index, rest: index.append(deepcopy(index[0])),
    "a record less": lambda index, rest: index.pop(),
    "in place of another": lambda index, rest: index[0].__setitem__(0, "config"),
    "a number for a name": lambda index, rest: index[0][1][0].__setitem__(0, 7),
    "an unknown kind": lambda index, rest: rest[1][0].__setitem__(1, "os"),
    "a value of no kind": lambda index, rest: rest[1][0].__setitem__(2, {"a": {"b": 1}}),
    "a record of numbers twice": lambda index, rest: rest[1].append(rest[1][0]),
    "an integer beyond all floats": lambda index, rest: rest[1][0][2].update(a=10**400),
    "an integer beyond 64 bits": lambda index, rest: rest[1][0][2].update(a=2**63),
    "very many lists": lambda index, rest: rest.append([[]] * 200_000),
    "very many tensors": lambda index, rest: index[0][1].extend([f"{i}", "bool", [0]] for i in range(200_000)),
    "very long a text": lambda index, rest: rest.append("x" * 20_000_000),
    "no records": lambda index, rest: rest.pop(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_index_that_does_not_describe_the_bytes_is_refused(change):
    with pytest.raises((ValueError, TypeError, KeyError, RuntimeError)):
        unpack_content(tampered(change))


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\xff" * 200, bytes(64)])
def test_bytes_without_an_index_are_refused(data):
    with pytest.raises(ValueError):
        unpack_content(RecordDict({"lightning-fed.tensors": ConfigRecord({"bytes": data})}))
