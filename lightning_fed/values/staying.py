"""Which tensors of a module do not travel: personal ones stay with each client, frozen ones are the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lightning_fed.errors import ConfigurationError
from lightning_fed.values.weights import Weights, entries_of_parameters, place_of, read


@dataclass(frozen=True)
class Staying:
    """The entries of a state dict that do not travel.

    Attributes:
        personal: Those of which each client has its own.
        frozen: Those that nobody trains.
        personal_parameters: The parameters that are personal, by the names that the module has for them, which may be
            others than its state dict's; ``staying`` finds them.
        frozen_parameters: Those that are frozen, likewise.
    """

    personal: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    personal_parameters: frozenset[str] = frozenset()
    frozen_parameters: frozenset[str] = frozenset()

    def __or__(self, other: Staying) -> Staying:
        personal = self.personal | other.personal
        return Staying(personal, (self.frozen | other.frozen) - personal)

    def __bool__(self) -> bool:
        return bool(self.personal or self.frozen)

    def __contains__(self, name: str) -> bool:
        return name in self.personal or name in self.frozen

    def with_parameters(self, module: nn.Module) -> Staying:
        """Return the same with the parameters of the module that are personal or frozen."""
        entries = entries_of_parameters(module).items()
        personal, frozen = (
            frozenset(name for name, entry in entries if entry in own) for own in (self.personal, self.frozen)
        )
        return replace(self, personal_parameters=personal, frozen_parameters=frozen)

    def shared(self, weights: Mapping[str, Tensor]) -> Weights:
        """Return those that travel."""
        return {name: tensor for name, tensor in weights.items() if name not in self}


def frozen_in(module: nn.Module) -> frozenset[str]:
    """Return the entries of a module's state dict that are parameters which are not trained."""
    return _entries(module, (p for p in module.parameters() if not p.requires_grad))


def named_by(
    module: nn.Module, patterns: Iterable[str], types: tuple[type[nn.Module], ...], who: str
) -> frozenset[str]:
    """Return the entries of a module's state dict that patterns and types name.

    Args:
        module: The module.
        patterns: Each the path of a layer, with all below it, or of a tensor; ``*``, ``?`` and ``[...]`` as in a shell.
        types: Of layers, subclasses with them.
        who: The call, for errors.

    Raises:
        ConfigurationError: If one names nothing, or a tensor that another name ties to one that is not named.
    """
    state, layers = read(module, copy=False), dict(module.named_modules())
    names: set[str] = set()
    for pattern in patterns:
        found = {name for name in state if any(fnmatchcase(path, pattern) for path in _paths(name))}
        if not found:
            kind = f" ({type(layers[pattern]).__name__} has no tensors)" if pattern in layers else ""
            raise ConfigurationError(f"{who}: {pattern!r} names nothing of the module{kind}. {_near(pattern, state)}")
        names |= found
    if types:
        own = [layer for layer in layers.values() if isinstance(layer, types)]
        if not (entries := _entries(module, (t for layer in own for t in (*layer.parameters(), *layer.buffers())))):
            kinds = sorted({type(layer).__name__ for layer in layers.values()})
            wanted = " or ".join(kind.__name__ for kind in types)
            raise ConfigurationError(f"{who}: no layer is a {wanted}. There are {', '.join(kinds)}.")
        names |= entries
    places = {place_of(state[name]): name for name in names if state[name].numel()}
    for name, tensor in state.items():
        if name not in names and place_of(tensor) in places:
            raise ConfigurationError(
                f"{who}: {places[place_of(tensor)]!r} is tied to {name!r}, which it does not name: name both, or none."
            )
    return frozenset(names)


def _paths(name: str) -> list[str]:
    """Return an entry's own path and those of all layers that it is in."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _near(pattern: str, state: Iterable[str]) -> str:
    paths = list(dict.fromkeys(path for name in state for path in _paths(name)))
    near = get_close_matches(pattern, paths, n=5, cutoff=0.5) or paths[:10]
    return f"It has {', '.join(map(repr, near))}{', ...' if len(paths) > len(near) else ''}."


def _entries(module: nn.Module, tensors: Iterable[Tensor]) -> frozenset[str]:
    """Return the entries of a state dict, which may be renamed, that are some of a module's tensors."""
    places = {place_of(tensor.detach()) for tensor in tensors if tensor.numel()}
    return frozenset(name for name, tensor in read(module, copy=False).items() if place_of(tensor) in places)


def staying(module: nn.Module, of: Iterable[Callable[[nn.Module], Staying]]) -> Staying:
    """Return what does not travel of all that methods want to stay.

    Raises:
        ConfigurationError: If nothing travels.
    """
    all_of_them = Staying()
    for one in of:
        all_of_them |= one(module)
    state = read(module, copy=False)
    if all_of_them and not all_of_them.shared(state):
        raise ConfigurationError(
            f"Nothing of {type(module).__name__} travels: {len(all_of_them.personal)} of its {len(state)} tensors are"
            f" personal and {len(all_of_them.frozen)} are frozen, so no client would learn from another."
        )
    return all_of_them.with_parameters(module) if all_of_them else all_of_them
