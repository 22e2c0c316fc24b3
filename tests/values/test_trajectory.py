"""Tensors of one step after another, read as they were written."""

from __future__ import annotations

import pytest
import torch

from lightning_fed.values.trajectory import Trajectory

STEPS = [
    {"a": torch.randn(3, 5, dtype=torch.float64), "b": torch.randn(4).to(torch.bfloat16), "scalar": torch.tensor(0.1)},
    {},
    {
        "b": torch.randn(4).to(torch.float16),
        "complex": torch.randn(2, dtype=torch.complex64),
        "none": torch.zeros(0, 3),
    },
    {"a": torch.randn(5, 3).T, "not a number": torch.tensor([float("nan"), float("inf")])},
]


@pytest.mark.parametrize("budget", [10, 10**6])
def test_steps_are_read_as_they_were_written_as_often_as_one_likes(budget: int) -> None:
    steps = Trajectory(budget)
    for step in STEPS[:2]:
        steps.append(step)
    first = next(iter(steps))
    for step in STEPS[2:]:
        steps.append(step)
    first["a"].zero_()
    for _ in range(2):
        for read, written in zip(steps, STEPS, strict=True):
            assert {name: (t.dtype, t.shape) for name, t in read.items()} == {
                name: (t.dtype, t.shape) for name, t in written.items()
            }
            for name, tensor in written.items():
                torch.testing.assert_close(read[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_reader_goes_on_where_another_has_read() -> None:
    steps = Trajectory()
    for number in range(3):
        steps.append({"n": torch.tensor(number)})
    one, other = iter(steps), iter(steps)
    assert [int(next(it)["n"]) for it in (one, one, other, one, other)] == [0, 1, 0, 2, 1]


def test_what_is_closed_has_no_steps() -> None:
    steps = Trajectory()
    steps.append(STEPS[0])
    steps.close()
    assert list(steps) == []
