"""The random streams of vectorized clients: each draws what it would draw alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fed._compat.torch import TorchDispatchMode, is_mutable
from lightning_fed.state.content import Generator, alike

_State = tuple[Any, ...]


class NotStackable(Exception):
    """Clients cannot be vectorized; the message is a clause that says why."""


class Streams:
    """The states of Python's, NumPy's and torch's generators, and of those that data sets hold, for each client.

    The generators themselves are left as the last client had them: whoever uses streams restores them at the end.

    Args:
        seeds: With what each client's generators are seeded.
        device: Whose generator is the client's own, besides the CPU's.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._seeds, self._cuda = seeds, device if device.type == "cuda" else None
        self._torch: list[_State | None] = [None] * len(seeds)
        self._others: list[_State | None] = [None] * len(seeds)
        self._held: list[list[tuple[Generator, Any]]] = [[] for _ in seeds]
        self._last = len(seeds)
        self._left = torch.default_generator.get_state()
        self._others_left = _others()

    def hold(self, client: int, generators: Sequence[Generator]) -> None:
        """Take the states of generators that a client's data holds, and that others may hold, too, for its own."""
        self._held[client] = [(one, one.kind.state(one.thing)) for one in generators]

    @contextmanager
    def torch_of(self, client: int) -> Iterator[None]:
        """Let torch draw from a client's stream in the block."""
        if client <= self._last:  # clients take their turns in order: only our code has run since the one before
            self.check()
        self._last = client
        generators = [torch.default_generator]
        if self._cuda is not None:
            generators.append(torch.cuda.default_generators[self._cuda.index or 0])
        state = self._torch[client]
        for i, generator in enumerate(generators):
            if state is None:
                generator.manual_seed(self._seeds[client])
            else:
                generator.set_state(state[i])
        try:
            yield
        finally:
            self._torch[client] = state = tuple(generator.get_state() for generator in generators)
            self._left = state[0]

    @contextmanager
    def of(self, client: int) -> Iterator[None]:
        """Let Python, NumPy, torch and the client's data draw from the client's stream in the block."""
        state = self._others[client]
        if state is None:
            random.seed(self._seeds[client])
            np.random.seed(self._seeds[client])
        else:
            random.setstate(state[0])
            np.random.set_state(state[1])
        for generator, own in self._held[client]:
            generator.kind.load(generator.thing, own)
        try:
            with self.torch_of(client):
                yield
        finally:
            self._others[client] = self._others_left = _others()
            self._held[client] = [(one, one.kind.state(one.thing)) for one, _ in self._held[client]]

    def check(self) -> None:
        """Check that nobody drew from torch's generator what is no client's own.

        Raises:
            NotStackable: If something was drawn.
        """
        if not torch.equal(torch.default_generator.get_state(), self._left):
            raise NotStackable("random numbers are drawn outside of its step, where they are nobody's own")

    def check_all(self) -> None:
        """Do as ``check``, also of Python's and NumPy's generators.

        Raises:
            NotStackable: If something was drawn, and is no client's own.
        """
        self.check()
        python, numpy = _others()
        if python != self._others_left[0] or not alike(numpy, self._others_left[1]):
            raise NotStackable("it draws from Python's or NumPy's generator, once for all clients")


def _others() -> _State:
    return random.getstate(), np.random.get_state()


class DrawsApart(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random operations on stacked tensors are made one client after the other, each from the client's own stream.

    Under ``vmap(randomness="different")`` such an operation has the clients in front: of the tensor, or of the size
    that it fills. A permutation is asked for once for each client.

    Args:
        streams: The clients' streams.
        clients: Who is stacked, in order.
    """

    def __init__(self, streams: Streams, clients: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._streams, self._clients = streams, clients
        self._asked = 0
        self.drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.drawn = True
        if func.overloadpacket is torch.ops.aten.randperm:
            client = self._clients[self._asked % len(self._clients)]
            self._asked += 1
            with self._streams.torch_of(client):
                return func(*args, **kwargs)
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.dim()]
        length = len(tensors[0]) if tensors else 0
        each = length // len(self._clients)  # more rows than clients: what vmap makes of (clients, rows, ...)
        drawn = []
        for part, client in zip(self._parts(args, length, each), self._clients, strict=True):
            with self._streams.torch_of(client):
                drawn.append(func(*part, **kwargs))
        if is_mutable(func):
            return args[0]
        return _together(drawn, torch.cat if each > 1 else torch.stack)

    def _parts(self, args: Sequence[Any], length: int, each: int) -> list[list[Any]]:
        """Return the arguments for each client."""
        count = len(self._clients)

        def part(arg: Any, i: int) -> Any:
            if isinstance(arg, Tensor) and arg.dim() and len(arg) == length:
                return arg[i] if each == 1 else arg[i * each : (i + 1) * each]
            if not length and isinstance(arg, (list, tuple)) and arg and arg[0] == count:
                return list(arg[1:])
            return arg

        return [[part(arg, i) for arg in args] for i in range(count)]


def _together(drawn: list[Any], put: Callable[[list[Tensor]], Tensor]) -> Any:
    if isinstance(drawn[0], tuple):
        return tuple(put(list(column)) for column in zip(*drawn, strict=True))
    return put(drawn)
