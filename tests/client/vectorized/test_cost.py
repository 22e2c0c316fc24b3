"""What a stack of clients costs."""

from __future__ import annotations

import pytest
import torch

from lightning_fed.client.vectorized.cost import Kept, StackCost, Written

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MB = 1 << 20


def test_what_the_largest_pass_keeps_counts() -> None:
    kept = Kept()
    weight = torch.ones(1000, requires_grad=True)
    with kept:
        for size in (1000, 1, 1000):
            for _ in range(3):
                (weight * torch.ones(size, 1000)).sum().backward()
    assert kept.bytes == 4 * 1000 * 1000  # the factor; what does not need gradients keeps no other


def test_what_a_pass_without_gradients_writes_counts() -> None:
    written = Written()
    with torch.no_grad(), written:
        (torch.ones(1000, 1) * torch.ones(1000)).sum()
    assert written.bytes == 2 * 4 * 1000 * 1000


def test_a_view_of_what_is_there_costs_nothing() -> None:
    data = torch.ones(1000, 1000)
    written = Written()
    with torch.no_grad(), written:
        data.as_strided((1000, 10), (1000, 1))[:4, 2:].sum(1)
        data.mul_(2)
    assert written.bytes == 2 * 4 * 4


@pytest.mark.parametrize(
    ("cost", "device", "memory", "clients"),
    [
        (StackCost(100, 100), CPU, 1 << 40, 32),
        (StackCost(MB, MB), CPU, 50 * MB, 10),
        (StackCost(MB, 6 * MB), CPU, 1 << 40, 16),
        (StackCost(MB, 6 * MB), CUDA, 1 << 40, 32),
        (StackCost(0, 0), CPU, 0, 2),
        (StackCost(MB, MB), CPU, 0, 2),
    ],
)
def test_how_many_clients_to_stack(cost: StackCost, device: torch.device, memory: int, clients: int) -> None:
    assert cost.stack_size(device, memory, must_pay=True) == clients


def test_what_need_not_pay_takes_as_many_as_fit() -> None:
    assert StackCost(MB, 100 * MB).stack_size(CPU, 1 << 40, must_pay=False) == 32


def test_what_is_expected_to_be_slower() -> None:
    assert StackCost(3 * MB, 6 * MB).why_slower(CPU) is None
    assert StackCost(300 * MB, 600 * MB).why_slower(CUDA) is None
    assert "4.0 MiB of weights" in str(StackCost(4 * MB, 0).why_slower(CPU))
    assert "7.0 MiB of activations" in str(StackCost(0, 7 * MB).why_slower(CPU))
