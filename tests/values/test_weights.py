"""Weights: every dtype is kept, every fault names its tensor, one mean whatever the number of clients."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection, SumMetric

from lightning_fed import FederatedTrainer
from lightning_fed.errors import ConfigurationError, InvalidUpdateError
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values import running_mean, weights
from lightning_fed.values.running_mean import RunningMean
from lightning_fed.values.weights import check_update
from lightning_fed.wire import extras
from tests.references import weighted_mean


class Net(LightningModule):
    """Tied weights, a frozen parameter, BatchNorm, a buffer that is not saved, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.extra = {"text": "kept"}

    def get_extra_state(self) -> dict[str, str]:
        return self.extra

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.extra = state


# ------------------------------------------------------------------------------------------------- reading and loading


def test_read_gives_tensors_only_with_their_dtypes():
    read = weights.read(Net())
    assert set(read) == {
        *("embed.weight", "out.weight", "frozen", "mask"),
        *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    assert read["frozen"].dtype == torch.bfloat16
    assert read["norm.num_batches_tracked"].dtype == torch.int64
    assert not any(tensor.requires_grad for tensor in read.values())


def test_read_copies_unless_told_not_to():
    module = Net()
    copied, shared = weights.read(module), weights.read(module, copy=False)
    with torch.no_grad():
        module.norm.weight.fill_(9)
    assert torch.equal(copied["norm.weight"], torch.ones(3))
    assert torch.equal(shared["norm.weight"], torch.full((3,), 9.0))


def test_load_casts_to_the_modules_dtype_and_keeps_state_that_is_no_tensor():
    source, target = Net(), Net()
    with torch.no_grad():
        source.frozen.copy_(torch.tensor([0.1, 1e-3]))
    sent = {k: v.float() if v.is_floating_point() else v for k, v in weights.read(source).items()}
    target.extra = {"text": "its own"}
    weights.load(target, sent)
    assert target.frozen.dtype == torch.bfloat16
    assert torch.equal(target.frozen, source.frozen)
    assert target.out.weight is target.embed.weight
    assert target.extra == {"text": "its own"}


def test_load_refuses_a_missing_tensor():
    module = Net()
    sent = weights.read(module)
    del sent["norm.bias"]
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        weights.load(module, sent)


class Keeps(nn.Module):
    """Keeps what it is given to load, in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(2))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._buffers["kept"] = state_dict[prefix + "kept"]
        super()._load_from_state_dict(state_dict, prefix, *args)


class KeepsExtra(nn.Module):
    """State that is a tensor and neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(2)

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, state):
        self.kept = state


class KeepsByHook(nn.Module):
    """A hook of its own at loading."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(2))
        self.register_load_state_dict_pre_hook(self._keep)

    def _keep(self, module, state_dict, prefix, *args):
        self._buffers["kept"] = state_dict[prefix + "kept"]


class KeepsOnTheInstance(nn.Module):
    """Has its loading replaced on the instance, as some packages do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(2))
        self._load_from_state_dict = self._keep

    def _keep(self, state_dict, prefix, *args):
        self._buffers["kept"] = state_dict[prefix + "kept"]


def of_metric():
    metric = SumMetric()
    metric.persistent(True)
    return metric


class Whole(LightningModule):
    def __init__(self, part) -> None:
        super().__init__()
        self.linear, self.part = nn.Linear(2, 2), part


class Assigns(Whole):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(state_dict, strict, assign=True)


def holdings(module):
    """The addresses of all memory that a module holds: parameters, buffers, and tensors in attributes."""
    held = [*module.parameters(), *module.buffers()]
    held += [value for child in module.modules() for value in vars(child).values() if isinstance(value, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in held}


@pytest.mark.parametrize(
    "module",
    [
        Whole(of_metric()),
        Whole(MetricCollection({"a": of_metric()})),
        Whole(Keeps()),
        Whole(KeepsExtra()),
        Whole(KeepsByHook()),
        Whole(KeepsOnTheInstance()),
        Whole(torch.ao.quantization.MinMaxObserver()),
        Assigns(nn.BatchNorm1d(2)),
    ],
    ids=lambda module: f"{type(module).__name__}-{type(module.part).__name__}",
)
def test_what_is_loaded_is_never_a_tensor_that_somebody_else_holds(module):
    sent = {name: tensor + 1 for name, tensor in weights.read(module).items()}
    weights.load(module, sent)
    read = weights.read(module)
    assert all(torch.equal(read[name], tensor) for name, tensor in sent.items())
    assert not holdings(module) & {tensor.untyped_storage().data_ptr() for tensor in sent.values()}


def test_layers_of_torch_are_loaded_without_a_second_copy(monkeypatch):
    module = Whole(nn.Sequential(nn.BatchNorm1d(2), nn.Conv1d(2, 2, 1), nn.LSTM(2, 2), nn.Embedding(3, 2)))
    sent = weights.read(module)
    copied = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor, **_: copied.append(tensor) or tensor)
    weights.load(module, sent)
    assert copied == []


# ------------------------------------------------------------------------------------------------- parameters by name


def test_parameters_are_told_from_buffers_under_all_their_names():
    assert weights.parameter_names(Net()) == {"embed.weight", "out.weight", "norm.weight", "norm.bias", "frozen"}


PREFIXED = {f"net.{name}" for name in ("embed.weight", "out.weight", "norm.weight", "norm.bias", "frozen")}


class Prefixed(Net):
    """Renames its entries."""

    def state_dict(self, *args, **kwargs):
        return {f"net.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}


class WithoutArguments(Net):
    """As many write it."""

    def state_dict(self):
        return {f"net.{name}": value for name, value in super().state_dict().items()}


class Copying(Net):
    """Gives copies, in another precision and another order."""

    def state_dict(self):
        state = {f"net.{k}": v.double() if torch.is_tensor(v) else v for k, v in super().state_dict().items()}
        return dict(reversed(state.items()))


class Hooked(Net):
    """Renames its entries in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self._rename)

    @staticmethod
    def _rename(module, state, prefix, metadata):
        for name in list(state):
            state[f"net.{name}"] = state.pop(name)


class Selecting(Net):
    """Sends one parameter and the buffers."""

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {"head": state["norm.weight"], "mean": state["norm.running_mean"], "ones": torch.ones(3)}


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (Prefixed, PREFIXED),
        (WithoutArguments, PREFIXED),
        (Copying, PREFIXED),
        (Hooked, PREFIXED),
        (Selecting, {"head"}),
    ],
)
def test_parameters_are_known_by_what_they_are_and_not_by_their_names(cls, names):
    module = cls()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    assert weights.parameter_names(module) == names
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


@pytest.mark.parametrize(
    ("cls", "entry"),
    [
        (Net, "{}"),
        (Prefixed, "net.{}"),
        (Copying, "net.{}"),
        (Hooked, "net.{}"),
    ],
)
def test_each_parameter_has_its_entry_of_the_state_dict(cls, entry):
    module = cls()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    entries = weights.entries_of_parameters(module)
    state, names = weights.read(module), [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert list(entries) == names
    tied = {"embed.weight", "out.weight"}
    assert {n: e for n, e in entries.items() if n not in tied} == {n: entry.format(n) for n in names if n not in tied}
    assert {entries[name] for name in tied} <= {entry.format(name) for name in tied}
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    assert all(torch.equal(state[entries[name]].to(p), p) for name, p in before.items())


def test_a_parameter_that_is_not_in_the_state_dict_has_no_entry():
    assert weights.entries_of_parameters(Selecting()) == {"norm.weight": "head"}


def test_integer_and_bool_tensors_are_parted_from_what_strategies_average():
    averaged, integers = extras.split_integers({**weights.read(Net()), "wave": torch.zeros(1, dtype=torch.complex64)})
    assert set(integers) == {"mask", "norm.num_batches_tracked"}
    assert {"wave", "frozen", "norm.running_mean"} <= set(averaged)


def test_lazy_layer_is_refused_by_name():
    class Lazy(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LazyLinear(2)

    with pytest.raises(ConfigurationError, match=r"Lazy\.head\.weight is lazy.*Run one batch") as caught:
        weights.refuse_unfit(Lazy())
    assert caught.value.tensor == "head.weight"
    module = Lazy()
    module.head(torch.zeros(1, 3))
    weights.refuse_unfit(module)


# ------------------------------------------------------------------------------------------------- checking an update


def reference() -> weights.Weights:
    return {"a.weight": torch.zeros(2, 3), "a.count": torch.tensor(4), "b": torch.zeros(0)}


def test_good_update_passes_whatever_its_dtype_and_order():
    check_update(
        {"b": torch.zeros(0), "a.count": torch.tensor(7), "a.weight": torch.ones(2, 3).bfloat16()}, reference()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("a.weight"), r"sent no 'a\.weight'\. Every client must build the same module"),
        (lambda w: w.update(c=torch.zeros(1)), r"sent 'c', which the global model does not have"),
        (
            lambda w: w.update({"a.weight": torch.zeros(3, 2)}),
            r"sent 'a\.weight' of shape \(3, 2\), the global model has \(2, 3\)",
        ),
        (lambda w: w.update({"a.count": torch.zeros(1)}), r"sent 'a\.count' of shape \(1,\), .* \(\)"),
    ],
)
def test_wrong_names_and_shapes_are_named(change, message):
    update = reference()
    change(update)
    with pytest.raises(InvalidUpdateError, match=message) as caught:
        check_update(update, reference())
    assert caught.value.tensor in ("a.weight", "a.count", "c")


DTYPES = [*(torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128), torch.int64, torch.bool]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_in_every_dtype(dtype, bad):
    known = {**reference(), "a.weight": torch.zeros(2, 3, dtype=dtype)}
    update = {name: tensor.clone() for name, tensor in known.items()}
    check_update(update, known)
    update["a.weight"][1, 2] = bad
    with pytest.raises(InvalidUpdateError, match=r"sent 'a\.weight' with NaN or Inf"):
        check_update(update, known)


@pytest.mark.parametrize(
    ("dtype", "sent", "value"),
    [
        (torch.float32, torch.float32, 1e20),
        (torch.float32, torch.float64, 1e30),
        (torch.float16, torch.float32, 7e4),
        (torch.float64, torch.float64, -1e200),
        (torch.complex64, torch.complex64, 1e20j),
    ],
)
def test_numbers_without_a_square_are_refused(dtype, sent, value):
    known = {"w": torch.zeros(3, dtype=dtype)}
    check_update({"w": torch.full((3,), 100, dtype=sent)}, known)
    with pytest.raises(InvalidUpdateError, match=r"sent 'w' with numbers beyond (1e\+18|65504|1e\+150) in it"):
        check_update({"w": torch.tensor([1, value, 1], dtype=sent)}, known)


def test_many_large_numbers_are_taken_though_their_norm_is_beyond_what_one_may_be():
    check_update({"w": torch.full((10_000,), 1e17)}, {"w": torch.zeros(10_000)})


def test_masks_of_the_least_float_are_taken():
    mask = torch.full((3,), torch.finfo(torch.float32).min)
    check_update({"mask": mask.clone()}, {"mask": mask})
    check_update({"mask": mask / 2}, {"mask": mask})
    with pytest.raises(InvalidUpdateError, match="NaN or Inf"):
        check_update({"mask": mask * 2}, {"mask": mask})
    with pytest.raises(InvalidUpdateError, match=r"numbers beyond 1e\+18"):
        check_update({"mask": -mask}, {"mask": mask})


@pytest.mark.parametrize("known", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sent", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_nan_and_inf_are_refused_in_whatever_width_they_come(known, sent, bad):
    update = {"w": torch.tensor([1.0, bad, 2.0]).to(sent)}
    with pytest.raises(InvalidUpdateError, match="sent 'w' with NaN or Inf"):
        check_update(update, {"w": torch.zeros(3, dtype=known)})
    check_update({"w": torch.full((3,), 2.0).to(sent)}, {"w": torch.zeros(3, dtype=known)})


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_infinity_is_met_by_itself_or_by_numbers_alone(bad):
    known = {"mask": torch.tensor([0.0, -math.inf])}
    with pytest.raises(InvalidUpdateError, match="sent 'mask' with NaN or Inf in it"):
        check_update({"mask": torch.tensor([0.0, bad])}, known)


def test_nan_in_the_imaginary_part_is_refused():
    known = {"z": torch.zeros(2, 3, dtype=torch.complex64)}
    update = {"z": torch.complex(torch.zeros(2, 3), torch.full((2, 3), float("nan")))}
    with pytest.raises(InvalidUpdateError, match="NaN or Inf"):
        check_update(update, known)


@pytest.mark.parametrize("sent", DTYPES)
@pytest.mark.parametrize("known", DTYPES)
def test_only_floats_may_differ_in_width_and_nothing_in_kind(sent, known):
    floats = sent.is_floating_point and known.is_floating_point
    update, reference = {"w": torch.zeros(2, dtype=sent)}, {"w": torch.zeros(2, dtype=known)}
    if sent == known or floats or (sent.is_complex and known.is_complex):
        check_update(update, reference)
    else:
        with pytest.raises(InvalidUpdateError, match=r"sent 'w' as \w+, the global model has \w+") as caught:
            check_update(update, reference)
        assert caught.value.tensor == "w"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_weights_are_checked_too(dtype):
    update = reference()
    update["a.weight"] = torch.ones(2, 3).to(dtype)
    check_update(update, reference())
    update["a.weight"] = torch.full((2, 3), float("nan")).to(dtype)
    with pytest.raises(InvalidUpdateError, match="NaN or Inf"):
        check_update(update, reference())


# ------------------------------------------------------------------------------------------------- the running mean


def mean_of(clients, coefficients):
    mean = RunningMean()
    for client, n in zip(clients, coefficients, strict=True):
        mean.add(client, n)
    return mean.value()


def test_mean_of_unequal_clients_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    clients = [{"w": torch.randn(50, generator=generator), "s": torch.randn((), generator=generator)} for _ in range(7)]
    sizes = [1, 1000, 3, 17, 2, 1, 250]
    expected = weighted_mean(clients, sizes)
    for name, value in mean_of(clients, sizes).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-8)


def test_mean_is_summed_in_float64():
    # In float32 the small one is lost altogether: 2**24 + 1 == 2**24.
    clients = [{"w": torch.tensor([2.0**24])}, {"w": torch.tensor([1.0])}, {"w": torch.tensor([-(2.0**24)])}]
    assert mean_of(clients, [1, 1, 1])["w"].item() == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([0.1, -0.0, 1e-45, 3e38]),
        torch.tensor([0.1, 6e-8, -65504.0], dtype=torch.float16),
        torch.tensor([0.1, 3e38], dtype=torch.bfloat16),
        torch.tensor([0.1, 5e-324, -1e308], dtype=torch.float64),
        torch.tensor([1 + 2j, -0.1j]),
        torch.tensor([True, False]),
        torch.tensor([0, 255], dtype=torch.uint8),
        torch.tensor([2**53 + 1, -(2**62) - 1, 0]),
        torch.zeros(0, 3),
        torch.tensor(0.3),
        torch.arange(6.0).reshape(2, 3).t(),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}".removeprefix("torch."),
)
def test_mean_of_one_client_or_of_equal_clients_is_that_client_bit_for_bit(tensor):
    for coefficients in ([7], [7, 3, 0.1]):
        value = mean_of([{"w": tensor}] * len(coefficients), coefficients)["w"]
        assert value.dtype == tensor.dtype
        assert value.shape == tensor.shape
        assert torch.equal(value, tensor)


def test_integers_are_averaged_and_rounded_with_their_dtype():
    clients = [{"n": torch.tensor([10, 2**40, -3]), "on": torch.tensor([True, False])}] * 2 + [
        {"n": torch.tensor([40, 2**40 + 8, -4]), "on": torch.tensor([False, True])}
    ]
    value = mean_of(clients, [1, 1, 1])
    assert value["n"].tolist() == [20, 2**40 + 3, -3]
    assert value["n"].dtype == torch.int64
    assert value["on"].tolist() == [True, False]
    assert value["on"].dtype == torch.bool


HIGH, LOW = 2**63 - 1, -(2**63)


@pytest.mark.parametrize(
    ("clients", "coefficients", "expected"),
    [
        ([[HIGH, LOW], [LOW, HIGH]], [1, 1], [0, 0]),  # -0.5, halves up
        ([[HIGH], [HIGH - 2]], [1, 1], [HIGH - 1]),
        ([[LOW], [LOW + 2]], [1, 1], [LOW + 1]),
        ([[2**62], [-(2**62) - 2**61]], [1, 3], [2**60 - 3 * 2**60 - 3 * 2**59]),
        ([[LOW], [HIGH], [HIGH]], [1, 1, 2], [2**62]),
    ],
)
def test_mean_of_integers_at_the_ends_of_int64_does_not_wrap_around(clients, coefficients, expected):
    value = mean_of([{"n": torch.tensor(client)} for client in clients], coefficients)["n"]
    assert value.dtype == torch.int64
    assert value.tolist() == pytest.approx(expected, abs=2**11)  # the distance in float64


def test_mean_of_uint64_beyond_int64_does_not_wrap_around():
    clients = [{"n": torch.tensor([n], dtype=torch.uint64)} for n in (2**64 - 1, 2**62)]
    value = mean_of(clients, [1, 3])["n"]
    assert value.dtype == torch.uint64
    assert value.tolist() == pytest.approx([2**62 + 3 * 2**60], abs=2**11)


def test_half_is_rounded_up_whichever_client_comes_first():
    clients = [{"n": torch.tensor([11, -4, 10])}, {"n": torch.tensor([12, -5, 13])}]
    assert mean_of(clients, [1, 1])["n"].tolist() == [12, -4, 12]
    assert mean_of(clients[::-1], [1, 1])["n"].tolist() == [12, -4, 12]


def test_mean_of_a_tensor_larger_than_a_chunk_is_whole():
    size = running_mean._CHUNK + 5
    a, b = torch.arange(size, dtype=torch.float32), torch.zeros(size)
    torch.testing.assert_close(mean_of([{"w": a}, {"w": b}], [1, 3])["w"], a / 4)


def test_mean_neither_changes_nor_keeps_what_a_client_sent():
    client = {"w": torch.ones(3, dtype=torch.float64)}
    mean = RunningMean()
    mean.add(client, 1)
    client["w"].fill_(5)
    mean.add({"w": torch.full((3,), 3.0, dtype=torch.float64)}, 1)
    assert mean.value()["w"].tolist() == [2, 2, 2]
    assert client["w"].tolist() == [5, 5, 5]


@pytest.mark.parametrize("first", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64])
def test_mean_has_the_dtype_of_the_global_weights_whoever_comes_first(first):
    mean = RunningMean({"w": torch.zeros(1)})
    mean.add({"w": torch.zeros(1, dtype=first)}, 1)
    mean.add({"w": torch.tensor([10_001.0])}, 3)
    torch.testing.assert_close(mean.value()["w"], torch.tensor([7500.75]), rtol=0, atol=0)


def test_value_given_out_is_not_changed_by_later_clients():
    mean = RunningMean()
    mean.add({"w": torch.zeros(2, dtype=torch.float64)}, 1)
    first = mean.value()["w"]
    mean.add({"w": torch.ones(2, dtype=torch.float64)}, 1)
    assert first.tolist() == [0, 0]


@pytest.mark.parametrize("coefficient", [0, -1, float("nan")])
def test_coefficient_that_is_not_positive_is_refused(coefficient):
    with pytest.raises(ValueError, match="greater than zero"):
        RunningMean().add({"w": torch.zeros(1)}, coefficient)


def test_what_is_not_finite_in_the_global_weights_need_not_be_in_a_client_s():
    mask = torch.tensor([0.0, -math.inf, math.nan])
    check_update({"mask": mask.clone()}, {"mask": mask})
    check_update({"mask": torch.zeros(3)}, {"mask": mask})
    with pytest.raises(InvalidUpdateError, match="sent 'mask' with NaN or Inf in it"):
        check_update({"mask": mask.flip(0)}, {"mask": mask})


def test_mean_of_equal_infinities_is_that_infinity():
    mean = RunningMean()
    for value, coefficient in ((1.0, 1), (4.0, 2)):
        mean.add({"mask": torch.tensor([value, -math.inf, math.inf, math.nan])}, coefficient)
    torch.testing.assert_close(
        mean.value()["mask"], torch.tensor([3.0, -math.inf, math.inf, math.nan]), rtol=0, atol=0, equal_nan=True
    )


def test_mean_is_the_same_however_clients_tensors_lie_in_memory():
    sent = [torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    laid = [sent[0].permute(1, 2, 0).contiguous().permute(2, 0, 1), sent[1], sent[2].mT.contiguous().mT]
    plain, other = RunningMean(), RunningMean()
    for examples, (one, same) in enumerate(zip(sent, laid, strict=True), 1):
        plain.add({"w": one}, examples)
        other.add({"w": same}, examples)

    assert other.value()["w"].is_contiguous()
    torch.testing.assert_close(other.value()["w"], plain.value()["w"], rtol=0, atol=0)


def test_sparse_tensors_of_the_state_dict_are_refused():
    module = nn.Module()
    module.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=False)
    weights.refuse_unfit(module)
    module.register_buffer("saved", torch.eye(3).to_sparse())
    with pytest.raises(ConfigurationError, match=r"Module.saved is a sparse tensor .* persistent=False"):
        weights.refuse_unfit(module)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_mean_of_numbers_and_infinities_is_that_of_their_sum(order):
    sent = [torch.tensor([1.0, -math.inf, math.inf, 2.0]), torch.tensor([-math.inf] * 3 + [4.0]), torch.full((4,), 3.0)]
    mean = RunningMean({"peak": torch.tensor([0.0, -math.inf, math.inf, 0.0])})
    for i in order:
        mean.add({"peak": sent[i]}, i + 1)
    expected = weighted_mean([{"peak": one} for one in sent], [1, 2, 3])
    torch.testing.assert_close(mean.value(), expected, rtol=1e-6, atol=0, equal_nan=True)


def test_a_buffer_that_begins_infinite_averages_what_clients_made_of_it():
    class Peak(ToyModule):
        def __init__(self):
            super().__init__()
            self.register_buffer("peak", torch.full((2,), -math.inf))

        def on_train_epoch_end(self):
            if self.trainer.client_id == 1:
                self.peak[0] = 5.0

    module = Peak()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    FederatedTrainer(max_rounds=1, num_clients=3, **options).fit(module, DataLoader(toy_data(24), 8))
    assert module.peak.tolist() == [-math.inf, -math.inf]
