"""What the C library's heap keeps is given back."""

from __future__ import annotations

import pytest
import torch

from lightning_fed.client.vectorized import malloc_trim
from lightning_fed.client.vectorized.malloc_trim import Heap

MIB = 1 << 20


@pytest.mark.skipif(malloc_trim._trim() is None, reason="the C library is not glibc")
def test_memory_that_the_heap_keeps_goes_back() -> None:
    tidy = Heap()
    tidy.tidy()
    before = malloc_trim._resident()
    tensors = [torch.ones(16 << 10) for _ in range(3200)]  # 200 MiB, each too small for pages of its own
    outlive = tensors[::100]
    del tensors
    if malloc_trim._resident() < before + 100 * MIB:
        pytest.fail("nothing was kept: this test tells nothing")
    tidy.tidy()
    assert malloc_trim._resident() < before + 64 * MIB
    assert all(tensor.all() for tensor in outlive)


def test_nothing_is_done_unless_the_process_has_grown_by_much(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, trims = [300 * MIB], []
    monkeypatch.setattr(malloc_trim, "_resident", lambda: resident[0])
    monkeypatch.setattr(malloc_trim, "_trim", lambda: trims.append)
    tidy = Heap()
    for resident[0], count in [
        (300 * MIB, 1),
        (340 * MIB, 1),
        (370 * MIB, 2),
        (400 * MIB, 2),
        (200 * MIB, 2),
        (265 * MIB, 3),
    ]:
        tidy.tidy()
        assert len(trims) == count


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc_trim, "_trim", lambda: None)
    monkeypatch.setattr(malloc_trim, "_resident", lambda: pytest.fail("there may be no /proc"))
    Heap().tidy()
