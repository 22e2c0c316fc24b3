"""Random operations under vmap draw for each client what it draws alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from lightning_fed.client.vectorized.rng import DrawsApart, NotStackable, Streams
from lightning_fed.state.snapshot import DataSnapshot

SEEDS = (11, 12, 13)
X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "dropout2d": lambda x: F.dropout2d(x.view(1, 2, 2, 6), 0.5, True),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(4, 6) + x,
    "rand, a number": lambda x: torch.rand(()) * x,
    "randint": lambda x: torch.randint(0, 10, (5,)),
    "randint, one bound": lambda x: torch.randint(10, (5,)),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "multinomial": lambda x: torch.multinomial(torch.softmax(x, -1), 2),
    "normal": lambda x: torch.normal(x, x.abs()),
    "poisson": lambda x: torch.poisson(x.abs()),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "gumbel_softmax": F.gumbel_softmax,
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.3),
    "randperm, twice": lambda x: x[torch.randperm(4)] * torch.randn(4)[torch.randperm(4)][:, None],
    "several": lambda x: F.dropout(F.dropout(x, 0.2) + torch.randn_like(x), 0.3),
}


@pytest.mark.parametrize("name", DRAWS)
def test_each_client_draws_what_it_draws_alone(name: str) -> None:
    alone = []
    for seed, x in zip(SEEDS, X, strict=True):
        torch.manual_seed(seed)
        alone += [torch.stack([DRAWS[name](x).float() for _ in range(2)])]
    streams = Streams(SEEDS, torch.device("cpu"))
    together = []
    for _ in range(2):  # a stream goes on where it was
        with DrawsApart(streams, range(3)) as mode:
            together.append(vmap(DRAWS[name], randomness="different")(X).float())
        assert mode.drawn
    torch.testing.assert_close(torch.stack(together, 1), torch.stack(alone), rtol=0, atol=0)


def test_some_of_the_clients_draw_from_their_own_streams() -> None:
    streams = Streams(SEEDS, torch.device("cpu"))
    with DrawsApart(streams, [2, 0]):
        drawn = vmap(torch.rand_like, randomness="different")(X[[2, 0]])
    for row, client in enumerate((2, 0)):
        torch.manual_seed(SEEDS[client])
        assert torch.equal(drawn[row], torch.rand_like(X[client]))


def test_nothing_is_drawn_where_nothing_is_random() -> None:
    with DrawsApart(Streams(SEEDS, torch.device("cpu")), range(3)) as mode:
        vmap(torch.tanh, randomness="different")(X)
    assert not mode.drawn


def test_the_streams_of_python_numpy_and_torch() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), float(torch.rand(()))

    streams = Streams(SEEDS, torch.device("cpu"))
    drawn: dict[int, list[tuple[float, float, float]]] = {0: [], 1: []}
    for client in (0, 1, 1, 0, 1):
        with streams.of(client):
            drawn[client].append(draw())
    for client, got in drawn.items():
        random.seed(SEEDS[client])
        np.random.seed(SEEDS[client])
        torch.manual_seed(SEEDS[client])
        assert got == [draw() for _ in got]


def test_streams_notice_what_is_drawn_from_none_of_them() -> None:
    streams = Streams(SEEDS, torch.device("cpu"))
    for client in (0, 1, 0):
        with streams.torch_of(client):
            torch.rand(2)
    streams.check()
    torch.rand(1)
    with pytest.raises(NotStackable, match="drawn outside of its step"), streams.torch_of(0):
        pass


def test_streams_notice_what_is_drawn_from_python_or_numpy_and_is_no_client_s_own() -> None:
    for draw in (random.random, np.random.rand):
        streams = Streams(SEEDS, torch.device("cpu"))
        with streams.of(0):
            random.random(), np.random.rand()
        streams.check_all()
        draw()
        with pytest.raises(NotStackable, match="Python's or NumPy's generator"):
            streams.check_all()


def test_generators_that_clients_share_have_a_state_for_each() -> None:
    shared = np.random.default_rng(0)
    snapshot = DataSnapshot({"data": [shared]})
    streams = Streams(SEEDS, torch.device("cpu"))
    for client in (0, 1):
        snapshot.seed(lambda path, client=client: 100 + client)
        streams.hold(client, snapshot.generators)
    drawn: dict[int, list[float]] = {0: [], 1: []}
    for client in (0, 1, 1, 0, 1):
        with streams.of(client):
            drawn[client].append(shared.random())
    for client, got in drawn.items():
        alone = np.random.default_rng(100 + client)
        assert got == [alone.random() for _ in got]
