"""The clients of one process are kept apart: whatever one of them changes is restored, or its loss is said."""

from __future__ import annotations

import contextlib
import gc
import logging
import logging.handlers
import pickle
import signal
import threading
import warnings
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_module, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_fed.client.local.isolation import (
    ContentLost,
    Isolation,
    LocalData,
    making_data,
    quiet,
    restore_handlers,
    restoring,
    signal_handlers,
    weights_of,
)
from lightning_fed.errors import ClientError
from lightning_fed.seeding import seed_for
from lightning_fed.state.content import Limits
from lightning_fed.state.snapshot import DataSnapshot, Snapshot
from lightning_fed.testing import ToyModule, toy_data


class Collecting(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.count = 0


def fail(module: Collecting) -> None:
    """Fails in the midst of things."""
    module.count = 3
    raise ValueError("mine")


def test_the_next_client_finds_what_the_first_one_found_and_the_weights_that_there_are() -> None:
    isolation, module, datamodule = Isolation(), Collecting(), LightningDataModule()
    datamodule.scale = {"mean": 0.0}
    for client in range(2):
        with isolation.around(module, datamodule) as snapshots:
            assert [type(snapshot) for snapshot in snapshots] == [Snapshot, DataSnapshot]
            module.count, module.new, datamodule.scale["mean"] = client + 1, True, 5.0
            with torch.no_grad():
                module.net[0].bias.fill_(float(client + 1))
        assert (module.count, datamodule.scale) == (0, {"mean": 0.0})
        assert not hasattr(module, "new")
        assert module.net[0].bias.eq(client + 1).all()


def test_what_the_server_changes_between_two_clients_is_what_the_next_one_finds() -> None:
    isolation, module = Isolation(), Collecting()
    for count in (0, 7):
        module.count = count
        with isolation.around(module, None):
            assert module.count == count
            module.count = -1
        assert module.count == count


def test_an_error_of_the_client_is_the_error_and_all_is_restored() -> None:
    isolation, module = Isolation(), Collecting()
    with pytest.raises(ValueError, match=r"^mine$") as error, isolation.around(module, None):
        fail(module)
    assert module.count == 0
    assert not hasattr(error.value, "__notes__")


def test_what_cannot_be_restored_is_a_note_on_the_clients_error() -> None:
    class Stuck:
        lost: list[Any] = []

        def restore(self) -> None:
            raise TypeError("not here")

    restored = Snapshot({"thing": (thing := Collecting())})
    stuck: Any = Stuck()
    with pytest.raises(ValueError, match=r"^mine\n") as error, restoring([restored, stuck]):
        fail(thing)
    assert error.value.__notes__ == ["What it had changed could not all be restored: TypeError: not here"]
    assert thing.count == 0


def test_what_is_too_large_to_be_restored_ends_all_later_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "limits", partial(Limits, always=1 << 10, once=1 << 10))
    isolation, module = Isolation(), Collecting()
    module.table = torch.zeros(1 << 18)
    lost = r"^wrote into module\.table \(1\.0 MiB\)\. .*cannot be restored"
    with pytest.raises(ContentLost, match=lost), isolation.around(module, None):
        module.table += 1
    with pytest.raises(ClientError, match=r"wrote into module\.table"), isolation.around(module, None):
        pytest.fail("nothing is as it was")


def test_a_list_that_grew_is_named_once_a_run_and_emptied_each_time() -> None:
    isolation, module = Isolation(), Collecting()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for client in range(3):
            with isolation.around(module, None):
                module.seen.append(client)
                assert module.seen == [client]
    (text,) = [str(one.message) for one in caught]
    assert text.startswith("module.seen grew in a client's fit. What a module holds is restored")
    assert module.seen == []


def test_an_iterator_is_named_once_a_run() -> None:
    isolation, module = Isolation(), Collecting()
    module.numbers = iter(range(9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            isolation.release()  # so that all is noted anew
            with isolation.around(module, None):
                next(module.numbers)
    (text,) = [str(one.message) for one in caught]
    assert text.startswith("module.numbers: what a client takes from an iterator cannot be restored")


@contextlib.contextmanager
def around_calls():
    yield


class Decorated(Collecting):
    """As models of transformers are: a context manager decorates a method, within another decorator."""

    @torch.no_grad()
    @around_calls()
    def draw(self) -> None:
        pass


def test_a_context_manager_that_decorates_is_no_iterator_of_which_something_is_taken() -> None:
    isolation, module = Isolation(), Decorated()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with isolation.around(module, None):
            pass


def test_what_was_noted_can_be_forgotten() -> None:
    isolation, module = Isolation(), Collecting()
    with isolation.around(module, None):
        pass
    left = weakref.ref(module)
    isolation.release()
    del module
    gc.collect()
    assert left() is None


def test_another_process_has_an_isolation_of_its_own() -> None:
    isolation = Isolation()
    isolation._lost = "all is lost"
    other = pickle.loads(pickle.dumps(isolation))
    with other.around(Collecting(), None):
        pass


def test_weights_are_the_tensors_themselves() -> None:
    module = ToyModule()
    assert [id(weight) for weight in weights_of(module)] == [id(p) for p in module.parameters()]


# ---------------------------------------------------------------------------------------------------------------- data


class Draws(Dataset[Tensor]):
    """Draws its examples from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand((), generator=self.generator)


def test_a_loader_s_generators_are_seeded_by_their_place_and_restored() -> None:
    data, loaders = LocalData(lambda path: len(path), Isolation()), [DataLoader(Draws()), DataLoader(Draws())]
    for loader in loaders:
        data.take(loader)
    expected = [torch.Generator().manual_seed(len(f"{name}.dataset.generator")) for name in ("loader", "loader_1")]
    drawn = [loader.dataset[0] for loader in loaders]
    assert drawn == [torch.rand((), generator=generator) for generator in expected]
    with restoring(data.snapshots):
        pass
    assert loaders[0].dataset[0] == torch.rand((), generator=torch.Generator().manual_seed(1))


def test_another_client_s_loader_has_seeds_and_a_place_of_its_own() -> None:
    data, other = LocalData(lambda path: 1, Isolation()), DataLoader(Draws())
    data.take(DataLoader(toy_data(4)))
    data.take(other, seed_of=lambda path: 40 + (path == "loader.dataset.generator"))
    assert other.dataset[0] == torch.rand((), generator=torch.Generator().manual_seed(41))


def test_an_iterator_in_a_data_set_is_named() -> None:
    dataset: Any = Draws()
    dataset.lines = iter("abc")
    with pytest.warns(UserWarning, match=r"^loader\.dataset\.lines: what a client takes from an iterator"):
        LocalData(len, Isolation()).take(DataLoader(dataset))


def test_generators_of_what_makes_data_are_seeded_for_the_block() -> None:
    maker = Draws()
    with making_data(DataSnapshot({"data": maker}), seed=3, client=1):
        drawn = maker[0]
    seed = seed_for(3, "data/data.generator", client=1)
    assert drawn == torch.rand((), generator=torch.Generator().manual_seed(seed))
    assert maker[0] == torch.rand((), generator=torch.Generator().manual_seed(1))


def test_data_is_made_the_same_wherever_and_whenever_and_nobody_else_s_draws_change() -> None:
    def made(client: int, seed: int = 3) -> float:
        with making_data(DataSnapshot({"data": Draws()}), seed, client):
            return float(torch.rand(()))

    before = torch.get_rng_state()
    first = made(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert made(0) == first
    assert len({first, made(1), made(-1), made(0, seed=4)}) == 4
    torch.manual_seed(seed_for(3, "data", client=0))
    assert float(torch.rand(())) == first


# --------------------------------------------------------------------------------------------------- output and signals


def test_lightning_tells_nothing_but_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    # A logger of its own: the level, the handlers and what is disabled of Lightning's depend on the tests before.
    logger, told = logging.Logger("lightning", logging.INFO), logging.handlers.BufferingHandler(10)
    logger.addHandler(told)
    monkeypatch.setattr(rank_zero_module, "log", logger)
    with quiet():
        rank_zero_info("GPU available: False")
        with pytest.warns(UserWarning, match="heard"):
            rank_zero_warn("heard")
    rank_zero_info("after")
    assert [record.getMessage() for record in told.buffer] == ["after"]


def test_signal_handlers_are_the_servers_again_after_a_client() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handlers = signal_handlers()
    assert handlers == before
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        restore_handlers(handlers)
        assert {number: signal.getsignal(number) for number in before} == before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_may_not_touch_signal_handlers() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(signal_handlers()))
    thread.start()
    thread.join()
    assert found == [{}]
    restore_handlers({})
