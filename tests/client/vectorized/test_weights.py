"""Stacked weights: what is put in place, and what comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_fed.client.vectorized.rng import NotStackable, Streams
from lightning_fed.client.vectorized.weights import Stack, clip_each_by_norm
from lightning_fed.values.weights import share_weights


def stacked(module: nn.Module, count: int = 3) -> Stack:
    base = {name: value.clone() for name, value in module.state_dict().items()}
    weights = [{name: value + client for name, value in base.items()} for client in range(count)]
    return Stack(module, weights, Streams(range(count), torch.device("cpu")), draws=False)


def test_a_stack_holds_each_clients_weights_and_gives_the_module_its_own_back() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    own, before = list(module.parameters()), {name: value.clone() for name, value in module.state_dict().items()}
    stack = stacked(module)
    stack.install()
    assert module[0].weight.shape == (3, 3, 2)
    for client, result in enumerate(stack.results()):
        for name, value in result.items():
            torch.testing.assert_close(value, before[name] + client)
    stack.restore()
    assert all(one is other for one, other in zip(module.parameters(), own, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_that_all_have_in_common_are_known_without_a_look_at_their_values() -> None:
    tensor = torch.ones(3)
    assert share_weights([{"w": tensor}, {"w": tensor.detach()}])
    assert not share_weights([{"w": tensor}, {"w": tensor.clone()}])
    assert not share_weights([{"w": torch.ones(2, 2)}, {"w": torch.ones(2, 2).mT}])


def test_an_optimizer_steps_the_stack_and_its_state_moves_along() -> None:
    module = nn.Linear(2, 3)
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1, initial_accumulator_value=0.5)
    stack = stacked(module)
    stack.install([optimizer])
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(3, 3, 2), (3, 3)]
    assert {state["sum"].shape for state in optimizer.state.values()} == {(3, 3, 2), (3, 3)}


def test_an_optimizer_with_a_tensor_of_its_own_is_refused() -> None:
    module, foreign = nn.Linear(2, 3), nn.Parameter(torch.zeros(2))
    with pytest.raises(NotStackable, match="SGD has a tensor that is no parameter of the module"):
        stacked(module).install([torch.optim.SGD([*module.parameters(), foreign], lr=0.1)])


def test_the_norm_of_each_clients_gradients_is_clipped_as_torch_clips_it() -> None:
    draws = torch.Generator().manual_seed(0)
    clients = [
        [torch.randn(4, 3, generator=draws) * scale, torch.randn(4, generator=draws) * scale] for scale in (0.01, 1, 50)
    ]
    parameters = [nn.Parameter(torch.zeros(3, 4, 3)), nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 2))]
    parameters[0].grad, parameters[1].grad = (torch.stack(column) for column in zip(*clients, strict=True))
    clip_each_by_norm(torch.optim.SGD(parameters, lr=1.0), 1.5)
    for row, gradients in enumerate(clients):
        alone = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(alone, gradients, strict=True):
            parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_(alone, 1.5)
        for parameter, together in zip(alone, parameters, strict=False):
            torch.testing.assert_close(together.grad[row], parameter.grad)
