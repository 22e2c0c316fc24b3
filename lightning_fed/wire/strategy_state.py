"""What of a strategy goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard

from flwr.serverapp.strategy import Strategy

from lightning_fed.wire.fingerprint import text_of
from lightning_fed.wire.plain import Classes, Reader, Writer, from_plain

State = dict[str, Any]
_STATE_DICT, _STRATEGY = "__state_dict__", "__strategy__"


class StrategyState:
    """A strategy's state, which is what a run has changed, and its configuration, which is how it was built.

    A strategy with ``state_dict`` and ``load_state_dict`` says itself what its state is. Of any other it is all
    attributes that are not as they were built; what the run never changed is left to the script that resumes it. An
    attribute that has these two methods (a module, an optimizer, a privacy accountant) is loaded in place, and so are
    strategies that the strategy wraps.

    Args:
        strategy: The strategy as it was built.

    Attributes:
        wrapped: The same for strategies among its attributes.
        built: Its other attributes as they were built, each as a line of text.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.wrapped = {name: state_of(value) for name, value in vars(strategy).items() if isinstance(value, Strategy)}
        self._unsaved: list[str] = []
        self._classes = _classes_of(type(strategy))
        self._factories = {n: v.default_factory for n, v in vars(strategy).items() if isinstance(v, defaultdict)}
        self._classes.learns = True
        plain, _ = self._write(vars(strategy))
        self._classes.learns = False
        self.built = {name: text_of(value) for name, value in plain.items()}
        self._forms = {name: text_of(value, contents=False) for name, value in plain.items()}

    @property
    def method(self) -> str:
        """The classes of the strategy and of those that it wraps."""
        name, wrapped = type(self.strategy).__name__, [state.method for state in self.wrapped.values()]
        return f"{name}({', '.join(wrapped)})" if wrapped else name

    @property
    def unsaved(self) -> list[str]:
        """What could not be written when the state was asked for last; by dotted name, sorted."""
        inner = [f"{name}.{one}" for name, state in self.wrapped.items() for one in state.unsaved]
        return sorted([*self._unsaved, *inner])

    def configuration(self) -> dict[str, str]:
        """Return how the strategy, and those that it wraps, were built; by dotted name."""
        inner = {f"{n}.{k}": text for n, state in self.wrapped.items() for k, text in state.configuration().items()}
        return {**self.built, **inner}

    def present(self) -> dict[str, str]:
        """Do as ``configuration``, of what the attributes are now."""
        inner = {f"{n}.{k}": text for n, state in self.wrapped.items() for k, text in state.present().items()}
        plain, _ = self._write(vars(self.strategy))
        return {**{name: text_of(value) for name, value in plain.items()}, **inner}

    def snapshot(self) -> State:
        """Return all that the strategy holds now, in memory of its own, for ``dump``."""
        strategy: object = self.strategy
        if _has_state(strategy):
            if self._is_ours:
                return dict(strategy.state_dict())
            told, self._unsaved = self._write(strategy.state_dict())
            return {_STATE_DICT: [[name, plain] for name, plain in told.items()]}
        state, self._unsaved = self._write(vars(self.strategy))
        return {**state, **{name: {_STRATEGY: inner.snapshot()} for name, inner in self.wrapped.items()}}

    def dump(self, snapshot: State | None = None) -> State:
        """Return what goes into a checkpoint.

        Args:
            snapshot: What the strategy held when ``snapshot`` was called; by default what it holds now.
        """
        snapshot = self.snapshot() if snapshot is None else snapshot
        if _has_state(self.strategy):
            return snapshot
        changed = {
            name: plain
            for name, plain in snapshot.items()
            if name not in self.wrapped and self._is_changed(name, plain)
        }
        inner = {name: {_STRATEGY: state.dump(snapshot[name][_STRATEGY])} for name, state in self.wrapped.items()}
        return {**changed, **inner}

    def load(self, state: State) -> list[str]:
        """Take back what ``dump`` gave.

        Returns:
            What could not be made again, by dotted name, with the reason; it stays as it was built.

        Raises:
            Exception: Whatever the strategy's own ``load_state_dict`` raises.
        """
        strategy: object = self.strategy
        if _has_state(strategy):
            told = state.get(_STATE_DICT)
            strategy.load_state_dict(state if told is None else dict(from_plain(told, self._classes)))
            return []
        failed = []
        reader = Reader(self._classes, None)
        for name, plain in state.items():
            if isinstance(plain, dict) and _STRATEGY in plain:
                failed += [f"{name}.{one}" for one in self.wrapped[name].load(plain[_STRATEGY])]
                continue
            reader.factory = self._factories.get(name)
            try:
                self._set(name, plain, reader)
            except Exception as error:
                failed.append(f"{name} ({error})")
        return failed

    @property
    def _is_ours(self) -> bool:
        """Ours hold tensors, which they replace and never write into: they need no copy. A user's subclass may."""
        return type(self.strategy).__module__.partition(".")[0] == __name__.partition(".")[0]

    def _write(self, values: Mapping[str, Any]) -> tuple[State, list[str]]:
        """Named values as a checkpoint takes them, without code and wrapped strategies; and the names that fail."""
        writer, state, unsaved = Writer(self._classes, None), {}, []
        for name, value in values.items():
            if name in self.wrapped or _is_code(value):
                continue
            writer.factory = self._factories.get(name)
            try:
                state[name] = {_STATE_DICT: writer(value.state_dict())} if _has_state(value) else writer(value)
            except Exception:
                unsaved.append(str(name))
        return state, unsaved

    def _is_changed(self, name: str, plain: Any) -> bool:
        # Moments that were not there at first are told without looking into them.
        return self._forms.get(name) != text_of(plain, contents=False) or self.built.get(name) != text_of(plain)

    def _set(self, name: str, plain: Any, reader: Reader) -> None:
        if isinstance(plain, dict) and _STATE_DICT in plain:
            getattr(self.strategy, name).load_state_dict(reader(plain[_STATE_DICT]))
        else:
            setattr(self.strategy, name, reader(plain))


class StandIn(Strategy):
    """The base of strategies that stand for another one: their name and state are those of the strategy behind them.

    Args:
        inner: The strategy behind it.
    """

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner
        self.name = type(inner).__name__
        self.checkpoint_state = StrategyState(inner)


def state_of(strategy: Strategy) -> StrategyState:
    """Return a strategy's state."""
    return strategy.checkpoint_state if isinstance(strategy, StandIn) else StrategyState(strategy)


def names_in(state: State) -> list[str]:
    """Return what a state that ``StrategyState.dump`` gave has, by name."""
    return [str(name) for name, _ in state[_STATE_DICT]] if _STATE_DICT in state else list(state)


class _Stateful(Protocol):
    def state_dict(self) -> State: ...
    def load_state_dict(self, state: State) -> object: ...


def _has_state(value: object) -> TypeGuard[_Stateful]:
    is_object = not isinstance(value, type)
    return is_object and all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def _is_code(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, (type, functools.partial))


def _classes_of(strategy: type) -> Classes:
    """Return the classes that a strategy's own code works with: in its modules' namespaces, and in its class's."""
    classes = Classes()
    for cls in strategy.__mro__[:-1]:
        for holder in (sys.modules.get(cls.__module__, cls), cls):
            found = [value for value in vars(holder).values() if isinstance(value, type)]
            classes.update({f"{one.__module__}:{one.__qualname__}": one for one in found})
    return classes
