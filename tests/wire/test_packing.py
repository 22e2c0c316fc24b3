"""All tensors of a message as one piece of bytes: what goes in comes out, and nothing else does."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from lightning_fed.wire import messages
from lightning_fed.wire.packing import Packer, unpack_tensors
from tests.helpers import over_the_wire

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
    assert sum(isinstance(record, ArrayRecord) for record in packed.values()) == 1
    unpack_tensors(packed)
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
    unpack_tensors(packed)
    assert packed["arrays"]["brain"].numpy().dtype == np.float32
    assert packed["arrays"]["brain"].dtype == "float32"


def test_contents_with_the_same_arrays_are_packed_once():
    packer, one = Packer(), content()
    other = RecordDict({**one, "config": ConfigRecord({"a": 2})})
    first, second = packer.pack(one), packer.pack(other)
    assert first["lightning-fed.packed"] is second["lightning-fed.packed"]
    assert second["config"] == ConfigRecord({"a": 2})


def test_arrays_of_others_go_as_they_are():
    plain = ArrayRecord({"x": Array(np.arange(3.0))})
    packed = Packer().pack(RecordDict({"arrays": plain}))
    assert packed["arrays"] is plain
    unpack_tensors(packed)
    assert packed["arrays"] is plain


def tampered(change) -> RecordDict:
    packed = over_the_wire(Packer().pack(content()))
    index = json.loads(packed["lightning-fed.index"]["json"])
    change(packed, index)
    if "lightning-fed.index" in packed:
        packed["lightning-fed.index"] = ConfigRecord({"json": json.dumps(index)})
    return packed


CHANGES = {
    "no index": lambda packed, index: packed.pop("lightning-fed.index"),
    "no bytes": lambda packed, index: packed.pop("lightning-fed.packed"),
    "too long a shape": lambda packed, index: index[0][1][0].__setitem__(2, [10**12, 10**12]),
    "a negative size": lambda packed, index: index[0][1][0].__setitem__(2, [-1, -15]),
    "a size that is none": lambda packed, index: index[0][1][0].__setitem__(2, ["3", 5]),
    "an unknown dtype": lambda packed, index: index[0][1][0].__setitem__(1, "object"),
    "a record twice": lambda packed, index: index.append(deepcopy(index[0])),
    "a record less": lambda packed, index: index.pop(),
    "in place of another": lambda packed, index: index[0].__setitem__(0, "config"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_index_that_does_not_describe_the_bytes_is_refused(change):
    with pytest.raises((ValueError, RuntimeError)):
        unpack_tensors(tampered(change))
