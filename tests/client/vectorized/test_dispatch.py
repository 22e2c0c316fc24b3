"""Who is vectorized with whom, how many at once, and what is said where that cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_fed.client.local.work import LocalTask
from lightning_fed.client.vectorized import dispatch
from lightning_fed.client.vectorized.cost import StackCost
from lightning_fed.client.vectorized.dispatch import Dispatcher
from lightning_fed.client.vectorized.probe import Candidate, ProbeResult
from lightning_fed.errors import ConfigurationError

MB = 1 << 20


def tasks(count: int, round: int = 2) -> list[LocalTask]:
    return [LocalTask(client, round, seed=0, weights={}) for client in range(count)]


def work_of(task: LocalTask) -> Any:
    """What client k works on: k % 3 batches of train data; client 5's cannot be opened, and nobody has others."""
    if task.client == 5:
        raise OSError("no disk")
    loaders = SimpleNamespace(train=task.client % 3, val=None, datamodule=None)
    return SimpleNamespace(client=task.client, loaders=loaders)


@pytest.fixture(autouse=True)
def _no_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's result is its number, doubled."""
    monkeypatch.setattr(dispatch, "count_batches", lambda loaders, stage: loaders.train)
    for name in ("vectorized_fit", "vectorized_evaluate"):
        monkeypatch.setattr(dispatch, name, lambda works, how: [2 * work.client for work in works])
    monkeypatch.setattr(Candidate, "device", torch.device("cpu"))


def found(monkeypatch: pytest.MonkeyPatch, **result: Any) -> list[Candidate]:
    """Lets each trial have this result; notes what is tried."""
    tried: list[Candidate] = []

    def run_probe(candidate: Candidate) -> ProbeResult:
        tried.append(candidate)
        return ProbeResult(**result)

    monkeypatch.setattr(dispatch, "run_probe", run_probe)
    return tried


def probed(wanted: Any, *args: Any, stage: str = "train", **options: Any) -> Dispatcher:
    dispatcher = Dispatcher(wanted, *args, **options)
    dispatcher.probe(stage, tasks(2), work_of, has_mods=False)
    return dispatcher


def said(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught]


# -------------------------------------------------------------------------------------------------------- how many


@pytest.mark.parametrize(("workers", "size"), [(1, 10), (2, 5), (9, 2)])
def test_as_many_at_once_as_fit_the_memory_of_a_worker(
    monkeypatch: pytest.MonkeyPatch, workers: int, size: int
) -> None:
    found(monkeypatch, cost=StackCost(weights=MB, kept=MB))
    monkeypatch.setattr(dispatch, "_memory", lambda device: 50 * MB)
    assert probed(True, workers=workers).size("train") == size
    assert probed("require", workers=workers).size("train") == size


def test_a_number_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = found(monkeypatch, cost=StackCost(weights=MB, kept=MB))
    monkeypatch.setattr(dispatch, "_memory", lambda device: 0)
    assert probed(7).size("train") == 7
    probed(True), probed("require")
    assert [candidate.must_pay for candidate in tried] == [False, True, False]


def test_a_stage_that_was_not_tried_or_cannot_be_is_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, reason="it cannot")
    with pytest.warns(UserWarning, match="^vectorize_clients: clients train one after the other: it cannot.$"):
        dispatcher = probed(7)
    assert (dispatcher.size("train"), dispatcher.size("evaluate")) == (1, 1)


def test_what_is_required_is_an_error_in_training_and_said_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, reason="it cannot")
    with pytest.raises(ConfigurationError, match=r"^vectorize_clients='require': clients cannot be .*: it cannot\."):
        probed("require")

    def with_val(task: LocalTask) -> Any:
        return SimpleNamespace(loaders=SimpleNamespace(train=1, val=1, datamodule=None))

    with pytest.warns(UserWarning, match="clients evaluate one after the other: it cannot"):
        Dispatcher("require").probe("evaluate", tasks(2), with_val, has_mods=False)


def test_without_data_to_evaluate_on_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = found(monkeypatch)
    probed(True, stage="evaluate")
    assert tried == []
    probed(True)
    assert [work.client for work in tried[0].works] == [0, 1]


def test_data_that_cannot_be_opened_is_the_reason_also_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = found(monkeypatch)
    dispatcher = Dispatcher("require")
    with pytest.warns(UserWarning, match="clients train one after the other: OSError: no disk"):
        dispatcher.probe("train", tasks(6)[4:], work_of, has_mods=False)
    assert (dispatcher.size("train"), tried) == (1, [])


def test_a_trial_leaves_the_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "run_probe", lambda candidate: ProbeResult(draws=bool(torch.rand(1) < 2)))
    before = torch.get_rng_state()
    probed(True)
    assert torch.equal(torch.get_rng_state(), before)


def test_compiling_what_draws_is_said_and_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(dispatch, "vectorized_fit", lambda works, how: given.append(how.compiled) or works)
    compiled: Any = object()
    found(monkeypatch, draws=True)
    with pytest.warns(UserWarning, match="clients train uncompiled, for their steps draw random numbers"):
        probed(True, compiled).run("train", [tasks(4)[0], tasks(4)[3]], work_of)
    found(monkeypatch, draws=False)
    probed(True, compiled).run("train", [tasks(4)[0], tasks(4)[3]], work_of)
    assert given == [None, compiled]


# ------------------------------------------------------------------------------------------------------------ with whom


def test_clients_with_equally_many_batches_go_together_and_results_keep_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups: list[list[int]] = []

    def fit(works: Sequence[Any], how: Any) -> list[Any]:
        groups.append([work.client for work in works])
        return [2 * work.client for work in works]

    monkeypatch.setattr(dispatch, "vectorized_fit", fit)
    found(monkeypatch)
    dispatcher = probed(True)
    # 5 cannot be opened, and of 2 % 3 batches there is only client 2: both are left to be served alone.
    assert dispatcher.run("train", tasks(6)[::-1], work_of) == [None, 8, 6, None, 2, 0]
    assert groups == [[4, 1], [3, 0]]


def test_a_group_that_fails_is_left_to_be_served_alone_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(works: Sequence[Any], how: Any) -> list[Any]:
        if works[0].client == 0:
            raise ValueError("broken")
        return [2 * work.client for work in works]

    monkeypatch.setattr(dispatch, "vectorized_fit", fit)
    found(monkeypatch)
    dispatcher = probed(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for round in (2, 3):
            assert dispatcher.run("train", tasks(5, round), work_of) == [None, 2, None, None, 8]
    (text,) = said(caught)  # of round 2 only
    assert text.startswith("vectorize_clients: in round 2 clients train one after the other: ValueError: broken")


def test_clients_that_are_all_unlike_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch)
    dispatcher = probed(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert dispatcher.run("train", tasks(1), work_of) == [None]
        assert said(caught) == []  # of one alone there is nothing to be said
        for _ in range(2):
            assert dispatcher.run("train", tasks(3), work_of) == [None, None, None]
    alone = "vectorize_clients: clients train one after the other: no two of them have equally many batches an epoch."
    assert said(caught) == [alone]


def test_memory_is_a_part_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert dispatch._memory(torch.device("cpu")) == (4 << 30) // 8
    monkeypatch.delattr("os.sysconf")
    assert dispatch._memory(torch.device("cpu")) == 1 << 30
