"""Values come back from a checkpoint as they were, or are refused."""

import dataclasses
import enum
import io
import math
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, MetricRecord, RecordDict
from torch import nn

from lightning_fed.wire.messages import pack, unpack
from lightning_fed.wire.plain import Classes, from_plain, to_plain
from tests.wire.tensors import TENSORS


def through_a_checkpoint(value, classes=None, factory=None):
    buffer = io.BytesIO()
    torch.save(to_plain(value, classes, factory), buffer)
    buffer.seek(0)
    return from_plain(torch.load(buffer, weights_only=True), classes, factory)


class Phase(enum.Enum):
    WARM_UP = 1
    TRAIN = {"not": "plain"}


class Level(enum.IntEnum):
    LOW = 3


class Text(enum.StrEnum):
    A = "a"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Name(str):
    def __str__(self):
        return "another"


class Count(int):
    pass


class Rate(float):
    pass


class Key(bytes):
    pass


Point = namedtuple("Point", "x y")


class Stats(NamedTuple):
    round: int
    loss: float = 0.0


@dataclasses.dataclass
class Record:
    name: str
    values: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        raise AssertionError("made by its constructor")


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: float


def record(**values):
    made = object.__new__(Record)
    vars(made).update(values)
    return made


OWN = (Phase, Level, Text, Access, Name, Count, Rate, Key, Point, Stats, Record, Frozen)
CLASSES = Classes({f"{cls.__module__}:{cls.__qualname__}": cls for cls in OWN})


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        2**200,
        -0.5,
        math.inf,
        "text",
        b"",
        b"\0bytes",
        bytearray(b"\0bytes"),
        1 - 2j,
        range(1, 9, 2),
        [],
        (),
        {},
        [1, (2, [None])],
        {1: "a", "b": {"c": (1.0,)}, (1, 2): b"x"},
        {"__bytes__": "a user's own key"},
        {1, 2, "x"},
        frozenset({(1, 2)}),
        deque([1, 2, 3], maxlen=3),
        deque(),
        OrderedDict(b=1, a=2),
        Counter("aab"),
        np.float64(0.1),
        np.float32(0.1),
        np.int64(2**40),
        np.uint16(7),
        np.bool_(True),
        np.complex64(1j),
        np.str_("text"),
        np.bytes_(b"bytes"),
        np.datetime64("2024-02-03T04:05"),
        np.longdouble(0.1),
        torch.float16,
        torch.Size([1, 2]),
        torch.device("cuda", 1),
        Path("a") / "b",
        ConfigRecord({"i": 1, "f": [0.5], "s": "x", "b": b"\0", "l": [True, False]}),
        MetricRecord({"loss": 0.5, "counts": [1, 2]}),
        RecordDict({"m": MetricRecord({"n": 3}), "c": ConfigRecord({})}),
    ],
    ids=lambda value: repr(sorted(value, key=str) if isinstance(value, set) else value),
)
def test_value_comes_back_from_a_checkpoint_that_is_loaded_with_weights_only(value):
    again = through_a_checkpoint(value)
    assert again == value
    assert type(again) is type(value)
    assert getattr(again, "maxlen", None) == getattr(value, "maxlen", None)


@pytest.mark.parametrize(
    "value",
    [
        Phase.WARM_UP,
        Phase.TRAIN,
        Level.LOW,
        Text.A,
        Access.READ | Access.WRITE,
        Name("x"),
        Count(3),
        Rate(0.1),
        Key(b"\0"),
        Point(1, (2, Phase.WARM_UP)),
        Stats(1, 0.5),
        record(name="x", values=[Stats(1)]),
        Frozen(0.1),
        {Phase.WARM_UP: [Point(1, 2)]},
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_of_the_user_s_own_class_comes_back_where_the_class_is_known(value):
    again = through_a_checkpoint(value, CLASSES)
    assert type(again) is type(value)
    assert vars(again) == vars(value) if isinstance(value, Record) else again == value
    assert repr(again) == repr(value)


@pytest.mark.parametrize("value", [Phase.WARM_UP, Name("x"), Point(1, 2), Frozen(0.1)], ids=repr)
def test_a_class_that_is_not_known_is_neither_written_nor_made(value):
    with pytest.raises(TypeError, match=f"{type(value).__name__} cannot go into a checkpoint"):
        to_plain(value)
    written = to_plain(value, CLASSES)
    with pytest.raises(TypeError, match=f"{type(value).__name__}, which the checkpoint names, is not there"):
        from_plain(written)


@pytest.mark.parametrize("tag", ["enum", "namedtuple", "dataclass", "subclass"])
def test_a_checkpoint_cannot_make_what_it_names_into_something_else(tag):
    """A file names a class that is known, and is none of that kind; or one that nobody has."""
    known = Classes({"threading:Thread": threading.Thread})
    inner = {"subclass": ["str", "x"], "enum": ["start"]}.get(tag, [[]])
    for name in ("threading:Thread", "os:system"):
        with pytest.raises(TypeError):
            from_plain({f"__{tag}__": [name, *inner]}, known)


@pytest.mark.parametrize("plain", [{"__system__": ["x"]}, {"__dtype__": "torch.load"}])
def test_what_no_checkpoint_holds_is_refused(plain):
    with pytest.raises(TypeError):
        from_plain(plain)
    state = np.random.default_rng(0).bit_generator.state
    with pytest.raises(TypeError, match="bit generators"):
        from_plain({"__Generator__": to_plain({**state, "bit_generator": "seed"})})


@pytest.mark.parametrize("factory", [None, int, float, list, dict, set, deque, Counter])
def test_a_defaultdict_keeps_its_function(factory):
    again = through_a_checkpoint(defaultdict(factory, {"a": 1}))
    assert type(again) is defaultdict
    assert (again, again.default_factory) == ({"a": 1}, factory)


def test_a_defaultdict_takes_a_function_of_the_user_s_from_the_place_where_it_is_read():
    def zero():
        return 0.5

    nested = defaultdict(zero, {"a": defaultdict(int, {"b": 1})})
    again = through_a_checkpoint(nested, factory=zero)
    assert again == nested
    assert again["new"] == 0.5
    assert again["a"]["new"] == 0
    with pytest.raises(TypeError, match="function"):
        to_plain(nested)
    with pytest.raises(TypeError, match="function"):
        from_plain(to_plain(nested, factory=zero))


@pytest.mark.parametrize(
    "array",
    [
        np.array(0.5),
        np.arange(6.0).reshape(2, 3).T,
        np.array([1, 2], dtype=np.int8),
        np.array([1, 2], dtype=np.uint32),
        np.zeros((0, 2)),
        np.array([True]),
        np.arange(4)[::-1],
        np.arange(3, dtype=">f4"),
        np.arange(3, dtype=np.longdouble),
        np.array([["text", "x"]]),
        np.array(["2024-02-03", "NaT"], dtype="M8[ns]"),
    ],
    ids=lambda a: f"{a.dtype}-{a.shape}",
)
def test_numpy_array_comes_back_and_is_a_copy(array):
    again = through_a_checkpoint(array)
    assert isinstance(again, np.ndarray)
    assert np.array_equal(again, array, equal_nan=array.dtype.kind in "fM")
    assert (again.dtype, again.shape) == (array.dtype, array.shape)
    assert again.flags.f_contiguous or not array.flags.f_contiguous
    plain = from_plain(to_plain(array))
    plain[...] = array.dtype.type(1 if array.dtype.kind != "M" else "2000-01-01")
    assert np.array_equal(again, array, equal_nan=array.dtype.kind in "fM")


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "float8"])
def test_arrays_come_back_in_their_dtype(name):
    record = through_a_checkpoint(RecordDict({"arrays": pack({name: TENSORS[name]})}))
    got = unpack(record["arrays"])[name]
    assert got.dtype == TENSORS[name].dtype
    assert torch.equal(got, TENSORS[name])


def test_array_of_flowers_own_comes_back():
    again = through_a_checkpoint([Array(np.arange(3.0))])
    assert again[0].numpy().tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", [torch.Tensor, nn.Parameter])
@pytest.mark.parametrize("trained", [True, False])
def test_a_tensor_comes_back_trained_or_not(kind, trained):
    value = kind(torch.tensor([1.0, 2.0])).requires_grad_(trained)
    again = through_a_checkpoint(value)
    assert type(again) is type(value)
    assert torch.equal(again, value)
    assert again.requires_grad == trained
    assert again.is_leaf


def ones():
    return torch.ones(2)


@pytest.mark.parametrize(
    ("value", "change", "read"),
    [
        (ones(), lambda v: v.add_(1), lambda v: v.tolist()),
        (nn.Parameter(ones()), lambda v: v.data.add_(1), lambda v: v.tolist()),
        (np.ones(2), lambda v: v.fill(2), lambda v: v.tolist()),
        ([ones()], lambda v: v[0].add_(1), lambda v: v[0].tolist()),
        ([1.0, 1.0], lambda v: v.append(2), lambda v: v),
        ({"a": [1.0, 1.0]}, lambda v: v["a"].append(2), lambda v: v["a"]),
        (pack({"a": ones()}), lambda v: unpack(v)["a"].add_(1), lambda v: unpack(v)["a"].tolist()),
        (Array(np.ones(2)), lambda v: setattr(v, "data", Array(np.zeros(2)).data), lambda v: v.numpy().tolist()),
    ],
    ids=["tensor", "parameter", "array", "list of tensors", "list", "dict", "ArrayRecord", "Array"],
)
def test_what_is_written_does_not_change_with_the_value(value, change, read):
    written = to_plain(value)
    change(value)
    assert read(value) != [1, 1]
    assert read(from_plain(written)) == [1, 1]


def test_a_tensor_of_a_device_that_is_not_there_comes_back_on_the_cpu():
    plain = [torch.ones(2), True, "cuda:31"]
    for tag in ("tensor", "parameter"):
        again = from_plain({f"__{tag}__": plain})
        assert again.is_cpu
        assert again.requires_grad


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: random.Random(3), lambda r: [r.random(), r.gauss(0, 1)]),
        (lambda: np.random.default_rng(3), lambda r: [r.random(), r.integers(9)]),
        (lambda: np.random.Generator(np.random.MT19937(3)), lambda r: [r.random()]),
        (lambda: np.random.RandomState(3), lambda r: [r.rand(), r.randn()]),
        (lambda: torch.Generator().manual_seed(3), lambda r: torch.rand(3, generator=r).tolist()),
    ],
    ids=["random", "numpy", "numpy MT19937", "RandomState", "torch"],
)
def test_a_random_generator_goes_on_where_it_was(make, draw):
    generator = make()
    draw(generator)
    again = through_a_checkpoint(generator)
    assert type(again) is type(generator)
    assert [draw(again) for _ in range(3)] == [draw(generator) for _ in range(3)]


@pytest.mark.parametrize("make", [lambda: [1], lambda: np.ones(2), lambda: torch.ones(2), lambda: {"a": 1}])
def test_what_is_held_twice_is_one_object_again(make):
    one = make()
    again = through_a_checkpoint({"first": one, "list": [one, make()]})
    assert again["first"] is again["list"][0]
    assert again["first"] is not again["list"][1]


def cyclic():
    value = [1]
    value.append({"self": value})
    return value


class Odd(list):
    pass


class Marked(str):
    pass


marked = Marked("x")
marked.mark = 1


@pytest.mark.parametrize(
    "value",
    [
        object(),
        lambda: 1,
        [object()],
        {"a": object()},
        np.array([object()]),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
        np.ma.masked_array([1, 2], mask=[True, False]),
        Odd([1]),
        marked,
        cyclic(),
        (i for i in range(3)),
        threading.Lock(),
        random.SystemRandom(),
        nn.Linear(1, 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_plain_form_is_refused_and_not_pickled(value):
    with pytest.raises(TypeError):
        to_plain(value, CLASSES)
