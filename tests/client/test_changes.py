"""What the server changes between rounds is changed in copies, and nothing else travels."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_fed.client.changes import Changes, apply
from lightning_fed.errors import ConfigurationError
from lightning_fed.state.snapshot import DataSnapshot, Snapshot


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.table = torch.zeros(3)
        self.rate, self.gone = 0.1, "soon"
        self.names, self.kinds = ["a", "b"], {"x"}
        self.factors = {"one": 1, "two": 2}
        self.generator = torch.Generator().manual_seed(1)


class Sides:
    """A server's objects and a worker's copies of them."""

    def __init__(self) -> None:
        self.module: Any = Module()
        self.data: Any = SimpleNamespace(scale=1.0, cache={}, options={"size": 3})
        self.copies: dict[str, Any] = copy.deepcopy({"module": self.module, "data": self.data})
        self.copy, self.data_copy = self.copies["module"], self.copies["data"]
        snapshot = Snapshot({"module": self.module}, self.module.parameters)
        self.changes = Changes(snapshot, DataSnapshot({"data": self.data}))

    def send(self) -> bytes:
        sent = self.changes.take()
        assert sent is not None
        apply(sent, self.copies)
        assert self.changes.take() is None  # what was sent is not sent again
        return sent


@pytest.fixture
def sides() -> Sides:
    return Sides()


def test_where_nothing_has_changed_nothing_is_sent(sides: Sides) -> None:
    sides.module.rate, sides.module.table = 0.1, torch.zeros(3)  # another tensor, and the same
    assert sides.changes.take() is None


def test_attributes_that_changed_came_or_went(sides: Sides) -> None:
    sides.module.rate, sides.module.fresh = 0.2, {"deep": [1, (2, 3)]}
    del sides.module.gone
    sides.send()
    assert (sides.copy.rate, sides.copy.fresh) == (0.2, {"deep": [1, (2, 3)]})
    assert not hasattr(sides.copy, "gone")


def test_an_attribute_that_only_went_is_gone(sides: Sides) -> None:
    del sides.module.gone
    sides.send()
    assert not hasattr(sides.copy, "gone")


def test_of_a_large_dict_what_is_new_travels_alone(sides: Sides) -> None:
    sides.module.factors |= {str(key): key for key in range(1000)}
    sides.send()
    sides.module.factors["last"] = -1
    del sides.module.factors["7"]
    assert len(sides.send()) < 500
    assert sides.copy.factors == sides.module.factors


def test_containers_are_changed_where_they_are(sides: Sides) -> None:
    names, factors = sides.copy.names, sides.copy.factors
    sides.module.names.append("c")
    sides.module.kinds |= {"y"}
    del sides.module.factors["one"]
    sides.module.factors |= {"three": 3, "two": 22}
    sides.send()
    assert sides.copy.names is names
    assert sides.copy.factors is factors
    assert (names, sides.copy.kinds) == (["a", "b", "c"], {"x", "y"})
    assert list(factors.items()) == [("two", 22), ("three", 3)]


def test_the_order_of_a_dict_travels(sides: Sides) -> None:
    sides.module.factors["one"] = sides.module.factors.pop("one")
    sides.send()
    assert list(sides.copy.factors) == ["two", "one"]


def test_content_of_tensors_travels_but_not_that_of_weights(sides: Sides) -> None:
    table = sides.copy.table
    sides.module.table += 7
    with torch.no_grad():
        sides.module.layer.weight.fill_(9.0)
    sides.send()
    assert sides.copy.table is table
    assert table.tolist() == [7.0, 7.0, 7.0]
    assert not sides.copy.layer.weight.eq(9).any()


def test_a_weight_that_is_frozen_is_frozen(sides: Sides) -> None:
    sides.module.layer.weight.requires_grad_(False)
    sides.send()
    assert not sides.copy.layer.weight.requires_grad
    assert sides.copy.layer.bias.requires_grad


def test_what_the_other_side_has_is_sent_as_the_way_there(sides: Sides) -> None:
    sides.module.chosen = [sides.module.head, sides.module.table]
    assert len(sides.send()) < 1000
    assert sides.copy.chosen[0] is sides.copy.head
    assert sides.copy.chosen[1] is sides.copy.table


def test_what_means_nothing_to_a_client_stays(sides: Sides) -> None:
    sides.module._trainer = object()
    sides.module.generator.manual_seed(5)
    assert sides.changes.take() is None
    assert sides.copy.generator.initial_seed() == 1


def test_settings_of_data_travel_and_what_was_read_stays(sides: Sides) -> None:
    sides.data.scale, sides.data.options["size"], sides.data.options["new"] = 2.0, 4, "yes"
    sides.data.cache["file"] = [1, 2, 3]
    sides.send()
    assert (sides.data_copy.scale, sides.data_copy.options, sides.data_copy.cache) == (
        2.0,
        {"size": 4, "new": "yes"},
        {},
    )


def test_several_rounds_changes_make_the_same_of_a_copy_as_of_the_server_s(sides: Sides) -> None:
    for round in range(3):
        sides.module.rate *= 0.5
        sides.module.names.insert(0, str(round))
        sides.module.table[round] = round + 1
        sides.send()
    assert sides.copy.rate == 0.1 * 0.5**3
    assert sides.copy.names == ["2", "1", "0", "a", "b"]
    assert sides.copy.table.tolist() == [1, 2, 3]


def lock(module: Any) -> None:
    module.factors["lock"] = threading.Lock()


def hook(module: Any) -> None:
    module.layer.weight.register_hook(lambda gradient: gradient)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lock, r"^module\.factors changed between two rounds, .* cannot be sent .*: TypeError: .*engine='in_process'"),
        (hook, r"^A hook on module\.layer\.weight was registered or removed between two rounds"),
    ],
)
def test_what_cannot_be_sent_is_named_with_the_way_out(sides: Sides, change: Callable[[Any], None], says: str) -> None:
    change(sides.module)
    with pytest.raises(ConfigurationError, match=says):
        sides.changes.take()
