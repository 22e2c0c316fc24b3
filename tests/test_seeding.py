"""Seeds: (seed, round, client, purpose) fixes every draw, and nothing leaks out."""

import random

import numpy as np
import pytest
import torch

from lightning_fed.seeding import run_seed, seed_all, seed_for, seeded


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_seeds_never_change_between_versions():
    # A checkpoint of an older version must resume with the same partition and the same cohorts.
    assert seed_for(0, "train", round=1, client=3) == 0xA8CB78A7
    assert seed_for(42, "partition") == 0xF368D0BC


def test_round_client_purpose_and_seed_each_change_the_seed():
    base = {"seed": 0, "purpose": "train", "round": 1, "client": 1}
    changed = [base, {**base, "seed": 1}, {**base, "purpose": "val"}, {**base, "round": 2}, {**base, "client": 2}]
    assert len({seed_for(**arguments) for arguments in changed}) == len(changed)


def test_digits_do_not_run_together():
    assert seed_for(1, "x", round=11, client=1) != seed_for(1, "x", round=1, client=11)
    assert seed_for(11, "x", round=1) != seed_for(1, "x", round=11)


def test_seeded_block_draws_the_same_each_time_from_python_numpy_and_torch():
    with seeded(7):
        first = draws()
    draws()
    with seeded(7):
        assert draws() == first
    with seeded(8):
        assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_seeded_block_puts_the_outer_state_back_even_after_an_exception():
    seed_all(1)
    expected = draws()
    seed_all(1)
    with pytest.raises(ZeroDivisionError), seeded(99):
        draws()[0] / 0
    assert draws() == expected


def test_seed_all_leaves_the_environment_alone(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    seed_all(3)
    # seed_everything would set it, and the next run without a seed would take it for the user's.
    assert run_seed(None) == 0


def test_seed_given_comes_before_seed_everything_comes_before_zero(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert run_seed(None) == 17
    assert run_seed(0) == 0
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert run_seed(None) == 0
