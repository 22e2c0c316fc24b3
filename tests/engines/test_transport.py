import socket

import pytest
import torch
from torch import Tensor

from lightning_fed.engines import transport


class MadeWhilePickled:
    """Has no tensor but the one that it makes for pickle, as torch.Generator does with its state."""

    def __init__(self, size: int, value: int) -> None:
        self.size, self.value = size, value

    def __reduce__(self) -> tuple[type, tuple[list[Tensor]]]:
        return list, ([torch.full((self.size,), self.value)],)


@pytest.mark.parametrize("size", [1, 100, 1 << 10, 1 << 20])
@pytest.mark.parametrize("by_value", [False, True])
def test_a_tensor_made_while_pickled_arrives_as_it_was(size, by_value):
    packed = transport.dump([MadeWhilePickled(size, value) for value in range(5)], by_value=by_value)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport.transmit(ours, packed)
        arrived = transport.receive(theirs)

    for value, [tensor] in enumerate(arrived):
        torch.testing.assert_close(tensor, torch.full((size,), value))
