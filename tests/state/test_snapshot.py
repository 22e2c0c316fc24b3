"""Whatever objects held is restored; what cannot be is said."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.state.snapshot import DataSnapshot, Snapshot


def test_the_very_objects_are_put_back_in_their_order() -> None:
    inner = [1, 2]
    thing = SimpleNamespace(a=inner, b={"x": inner}, c=deque([inner], maxlen=3), d={1}, e=OrderedDict(z=1, y=2))
    snapshot = Snapshot({"thing": thing})
    inner.append(3)
    thing.b["y"] = 1
    thing.c.rotate()
    thing.c.append(5)
    thing.d.add(2)
    thing.e.move_to_end("z")
    thing.f, thing.a = 1, None
    snapshot.restore()
    assert thing.a is inner is thing.b["x"] is thing.c[0]
    assert thing.c.maxlen == 3
    assert (inner, thing.d, list(thing.e), list(vars(thing))) == ([1, 2], {1}, ["z", "y"], list("abcde"))
    assert not snapshot.changed()


def test_what_changed_is_named_by_its_way() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module.kept = {"a": [torch.zeros(2)]}
    snapshot = Snapshot({"module": module}, module.parameters)
    module.kept["a"][0] += 1
    module[0].weight.requires_grad_(False)
    assert [node.path for node in snapshot.changed()] == ["module.kept['a'][0]", "module.0.weight"]


def test_weights_are_left_alone() -> None:
    module = nn.Linear(2, 2)
    snapshot = Snapshot({"module": module}, module.parameters)
    with torch.no_grad():
        module.weight.fill_(7.0)
    snapshot.restore()
    assert module.weight.eq(7).all()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3).expand(2, 3),
        torch.ones(2, 3).t(),
        torch.full((2,), float("nan")),
        torch.ones(2, dtype=torch.bool),
        torch.tensor(1.0),
        torch.empty(0),
        torch.ones(400_000),
        torch.eye(2).to_sparse(),
    ],
    ids=["expanded", "transposed", "NaN", "bool", "scalar", "empty", "large", "sparse"],
)
def test_tensors_of_all_kinds(tensor: torch.Tensor) -> None:
    holder = SimpleNamespace(tensor=tensor)
    before = tensor.clone()
    snapshot = Snapshot({"holder": holder})
    holder.tensor = tensor * 0 if tensor.is_floating_point() else ~tensor
    if tensor.is_contiguous() and tensor.layout is torch.strided:
        tensor.data.zero_()
    snapshot.restore()
    assert holder.tensor is tensor
    torch.testing.assert_close(tensor.to_dense(), before.to_dense(), rtol=0, atol=0, equal_nan=True)


def test_what_is_no_number_is_still_the_same() -> None:
    thing = SimpleNamespace(
        nan=torch.tensor([float("nan"), 1.0]),
        scalar=torch.tensor(complex("nan")),
        narrow=torch.full((2, 3), float("nan"), dtype=torch.bfloat16).T.expand(2, 3, 2),
        array=np.array([np.nan]),
        objects=np.array(["a", None, {}], dtype=object),
    )
    snapshot = Snapshot({"thing": thing})
    assert not snapshot.changed()
    thing.nan[0], thing.objects[1] = 0.0, "b"
    assert [node.path for node in snapshot.changed()] == ["thing.nan", "thing.objects"]
    snapshot.restore()
    assert thing.nan.isnan().tolist() == [True, False]
    assert thing.objects[1] is None
    assert not snapshot.changed()


def test_a_tensor_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        tensor = torch.ones(2)
    snapshot = Snapshot({"holder": [tensor]})
    with torch.inference_mode():
        tensor += 1
    snapshot.restore()
    assert tensor.tolist() == [1, 1]


def test_a_weight_that_was_given_other_memory_has_its_own_again() -> None:
    layer = nn.Linear(2, 2)
    snapshot, memory = Snapshot({"layer": layer}, layer.parameters), layer.weight.data_ptr()
    layer.weight.data = torch.zeros(5, 5)
    snapshot.restore()
    assert (layer.weight.data_ptr(), layer.weight.shape) == (memory, (2, 2))


def test_large_tensors_are_not_copied_twice_and_huge_ones_not_once() -> None:
    holder = SimpleNamespace(large=torch.zeros(1 << 20), huge=torch.zeros(20 << 20))
    snapshot = Snapshot({"holder": holder})
    copies = {node.path: node.copy for node in snapshot.nodes() if hasattr(node, "copy")}
    assert copies["holder.huge"] is None
    snapshot.renew()
    assert {node.path: node.copy for node in snapshot.nodes() if hasattr(node, "copy")} == copies
    assert not snapshot.lost
    holder.huge[5] = 1
    holder.large[5] = 1
    snapshot.restore()
    assert [node.path for node in snapshot.lost] == ["holder.huge"]
    assert not holder.large.any()


def test_data_is_watched_and_not_copied() -> None:
    data = TensorDataset(torch.zeros(3, 20_000), torch.zeros(3))
    snapshot = DataSnapshot({"loader": DataLoader(data)})
    data.tensors[0][1, 1] = 1
    data.tensors[1][1] = 1
    snapshot.restore()
    assert [node.path for node in snapshot.lost] == ["loader.dataset.tensors[0]"]
    assert not data.tensors[1].any()


class Reads:
    """A data set that opens its file late, keeps what it has read, and counts."""

    def __init__(self) -> None:
        self.file, self.cache, self.count, self.last, self.array = None, {0: "a"}, 0, None, None

    def read(self) -> None:
        self.file, self.cache[1] = open(__file__), "b"  # noqa: SIM115
        self.count, self.last = 1, torch.ones(2)
        self.array = np.zeros(1 << 20)


def test_what_a_data_set_has_read_or_opened_stays_and_nothing_else() -> None:
    data = Reads()
    snapshot = DataSnapshot({"data": data})
    data.read()
    file = data.file
    snapshot.restore()
    assert (data.file, data.cache, data.count, data.last) == (file, {0: "a"}, 0, None)
    assert data.array is not None
    file.close()


def test_what_code_around_collects_stays_and_what_it_holds_else_does_not() -> None:
    collected, kept = [], {"n": 1}

    def note() -> None:
        collected.append(1)
        kept["n"] += 1

    holder = SimpleNamespace(note=note)
    snapshot = Snapshot({"holder": holder})
    note()
    snapshot.restore()
    assert (collected, kept) == ([1], {"n": 1})


def test_iterators_cannot_be_put_back_and_are_named() -> None:
    holder = SimpleNamespace(numbers=itertools.count(), stream=(i for i in range(3)))
    assert [node.path for node in Snapshot({"holder": holder}).endless] == ["holder.numbers", "holder.stream"]


def test_the_same_place_gets_the_same_seed_and_others_another() -> None:
    def build() -> Any:
        return SimpleNamespace(a=[random.Random()], b={"c": np.random.default_rng()}, d=torch.Generator())

    def draw(thing: Any) -> tuple[float, ...]:
        return thing.a[0].random(), thing.b["c"].random(), float(torch.rand((), generator=thing.d))

    drawn = []
    for offset in (0, 0, 1):
        thing = build()
        Snapshot({"thing": thing}).seed(lambda path, offset=offset: len(path) + offset)
        drawn.append(draw(thing))
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True))


def test_everybodys_generators_are_nobodys() -> None:
    holder = SimpleNamespace(a=np.random.mtrand._rand, b=torch.default_generator, c=random._inst)
    assert not Snapshot({"holder": holder}).generators


def test_cycles_long_lists_and_deep_nests_come_to_an_end() -> None:
    holder = SimpleNamespace(long=[[i] for i in range(5000)])
    holder.self = holder
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]
    holder.deep = deep
    snapshot = Snapshot({"holder": holder})
    holder.long.append(1)
    snapshot.restore()
    assert len(holder.long) == 5000


_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def _scramble(value: Any, rng: random.Random) -> None:
    if isinstance(value, list):
        for inner in value:
            _scramble(inner, rng)
        rng.choice([value.clear, value.reverse, lambda: value.append(object()), lambda: None])()
    elif isinstance(value, dict):
        for inner in value.values():
            _scramble(inner, rng)
        rng.choice([value.clear, lambda: value.update(new=1), lambda: value.popitem() if value else None])()


@given(_values, st.integers(0, 100))
def test_any_nest_of_containers_is_put_back(value: Any, seed: int) -> None:
    holder = SimpleNamespace(value=value)
    before = repr(value)
    snapshot = Snapshot({"holder": holder})
    for _ in range(2):
        _scramble(holder.value, random.Random(seed))
        snapshot.restore()
        assert repr(holder.value) == before
        snapshot.renew()


def test_what_only_grew_is_named() -> None:
    holder = SimpleNamespace(losses=[], seen={"a": 1}, turned=[1, 2], count=0)
    snapshot = Snapshot({"holder": holder})
    holder.losses.append(1)
    holder.seen["b"] = 2
    holder.turned.reverse()
    holder.count += 1
    snapshot.restore()
    assert sorted(snapshot.grown) == ["holder.losses", "holder.seen"]
    snapshot.restore()
    assert snapshot.grown == []
