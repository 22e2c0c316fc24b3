"""How clients' steps are compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._inductor import config

from lightning_fed.client.vectorized.compiled_step import CompiledStep


@pytest.fixture
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("threads", "allowed", "processes"), [(1, 2, 1), (2, 8, 2), (4, 2, 2)])
def test_kernels_are_compiled_by_as_many_processes_as_there_are_threads(
    threads: int, allowed: int, processes: int
) -> None:
    torch.set_num_threads(threads)
    with config.patch(compile_threads=allowed):
        with CompiledStep.configured():
            assert config.compile_threads == processes
            assert torch._dynamo.config.assume_static_by_default
        assert config.compile_threads == allowed
