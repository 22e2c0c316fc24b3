"""Features that differ from client to client: the same in every round, with any engine, and beside everything else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import PartialParticipation, Partition
from lightning_fed.engines import Processes
from lightning_fed.errors import ConfigurationError
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.weights import Weights, read
from tests.helpers import QUIET

SIZES = (18, 20, 33)  # of the first two, as many batches an epoch


def shift(by: float, example: Any) -> Any:
    return example[0] + by * torch.randn(8), example[1]


def skew(client: int) -> Any:
    """None, noise, more noise."""
    return partial(shift, client / 3) if client else None


def data() -> TensorDataset:
    return toy_data(sum(SIZES))


def partition(**arguments: Any) -> Partition:
    who = [client for client, size in enumerate(SIZES) for _ in range(size)]
    return Partition(by=who, val_fraction=0.2, **{"transform": skew, **arguments})


def examples(dealt: Partition, client: int, round: int = 1) -> list[torch.Tensor]:
    loaders = dealt.client(client, round=round)
    return [torch.cat([batch[0] for batch in loader]) for loader in (loaders.train, loaders.val)]


def prepared(seed: int = 0, **arguments: Any) -> Partition:
    dealt = partition(**arguments)
    dealt.prepare(DataLoader(data(), batch_size=4), seed)
    return dealt


def test_each_client_s_examples_go_through_its_own_function_held_out_ones_too():
    dealt, plain = prepared(), prepared(transform=None)
    for client in range(3):
        for own, before in zip(examples(dealt, client), examples(plain, client), strict=True):
            assert len(own) == len(before)
            assert ((own - before).abs().mean() > 0.1 * client) if client else torch.equal(own, before)


def test_an_example_is_the_same_in_each_round_and_another_with_another_seed():
    first = examples(prepared(), 2, 1)
    assert all(map(torch.equal, first, examples(prepared(), 2, 5)))
    assert not torch.equal(first[0], examples(prepared(seed=1), 2)[0])


def test_kept_in_memory_it_is_the_same():
    kept = prepared(cache=True)
    for _ in range(2):
        assert all(map(torch.equal, examples(kept, 1), examples(prepared(), 1)))
    assert isinstance(kept.client(1, round=1).train.dataset, TensorDataset)


@pytest.mark.filterwarnings("ignore:DataLoader\\(num_workers=1\\) starts")
def test_read_by_a_loader_s_own_worker_it_is_the_same():
    own = partition()
    own.prepare(DataLoader(data(), batch_size=4, num_workers=1), 0)
    assert all(map(torch.equal, examples(own, 1), examples(prepared(), 1)))


def test_what_makes_a_client_s_function_may_draw_too():
    def rotated(client: int) -> Any:
        angle = torch.rand(1)
        return lambda example: (example[0] * angle, example[1])

    first, again = (examples(prepared(transform=rotated), 1, round)[0] for round in (1, 2))
    assert torch.equal(first, again)


class Fitted:
    """Weights after some rounds; two of three clients in each."""

    def __init__(self, tmp_path: Any) -> None:
        self.folder = tmp_path

    def __call__(
        self, rounds: int = 3, resume: bool = False, cache: bool = False, fraction: float = 0.67, **options: Any
    ) -> Weights:
        torch.manual_seed(1)
        module = ToyModule()
        saving = ModelCheckpoint(self.folder, save_last=True, enable_version_counter=False)
        trainer = FederatedTrainer(
            max_rounds=rounds,
            local_epochs=2,
            callbacks=[
                partition(cache=cache),
                PartialParticipation(fraction),
                saving,
            ],
            **{**QUIET, "enable_checkpointing": True, "default_root_dir": self.folder, "seed": 0, **options},
        )
        trainer.fit(module, DataLoader(data(), batch_size=4, shuffle=True), ckpt_path="last" if resume else None)
        return read(module)


def test_weights_are_those_of_one_process_in_workers_from_memory_and_after_a_resume(tmp_path):
    fitted = Fitted(tmp_path)
    expected = fitted()
    for options in ({"engine": Processes(2, start_method="fork")}, {"cache": True}):
        torch.testing.assert_close(fitted(**options), expected, rtol=0, atol=0)
    fitted(rounds=1)
    torch.testing.assert_close(fitted(resume=True), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("error:vectorize_clients")
@pytest.mark.parametrize("cache", [False, True])
def test_clients_can_be_vectorized(cache, tmp_path):
    fitted = Fitted(tmp_path)
    found = fitted(fraction=1.0, vectorize_clients=True, cache=cache)
    torch.testing.assert_close(found, fitted(fraction=1.0), rtol=1e-4, atol=1e-6)


@pytest.mark.landing
def test_clean_workers_give_the_same_weights(tmp_path):
    fitted = Fitted(tmp_path)
    torch.testing.assert_close(fitted(engine=Processes(2, start_method="forkserver")), fitted(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (torch.nn.Identity(), r"Partition\(transform=Identity\(\.\.\.\)\): write a function of a client's index"),
        (3, r"Partition\(transform=3\): write"),
        (lambda client: 2.5, r"Partition\(transform=\.\.\., which gave 2\.5 for 1\): write a function"),
    ],
)
def test_what_is_no_function_of_a_client_is_refused(transform, message):
    with pytest.raises(ConfigurationError, match=message):
        prepared(transform=transform).client(1, round=1)
