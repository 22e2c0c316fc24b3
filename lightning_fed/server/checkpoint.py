"""A run in its checkpoints: what goes in, what comes back, and what a resumed run has that differs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp.strategy import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed import checks
from lightning_fed.engines.base import ClientGrid, LocalGrid
from lightning_fed.errors import ConfigurationError
from lightning_fed.server.script import Script
from lightning_fed.wire.checkpoint_file import FEDERATION
from lightning_fed.wire.plain import from_plain, to_plain
from lightning_fed.wire.strategy_state import names_in, state_of

_KINDS: dict[str, type] = {
    **dict.fromkeys(("seed", "num_clients"), int),
    "names": list,
    **dict.fromkeys(("setup", "arguments", "configuration", "clients"), dict),
    "method": str,
}


@dataclass
class Found:
    """What a checkpoint holds for a run that is to go on from it.

    Attributes:
        path: The file.
        rounds: How many rounds it has done.
        callbacks: The keys of the callbacks that have something in it.
        state: What ``RunState.save`` gave.
    """

    path: str
    rounds: int
    callbacks: Collection[str]
    state: dict[str, Any] = field(default_factory=dict)


class RunState:
    """What a run keeps from round to round: the state of its strategy, and of its clients where the grid has it.

    Args:
        seed: The run's seed.
        num_clients: How many clients there are.
        clients: The grid, where it can tell and take what clients keep, or ``None``.
        strategy: The strategy as it was built.
        script: How the run is set up.
        names: What the data calls the clients, where it has names for them.
    """

    def __init__(
        self,
        seed: int,
        num_clients: int,
        clients: ClientGrid | None,
        strategy: Strategy,
        script: Script,
        names: Sequence[str] = (),
    ) -> None:
        self.seed, self.num_clients, self.script = seed, num_clients, script
        self._clients, self._names = clients, list(names)
        self._strategy = state_of(strategy)
        self._snapshot: dict[str, Any] | None = None
        self._said: list[str] = []

    def kept_by(self, client: int) -> RecordDict:
        """Return what a client keeps: as it is, or in the middle of a round, and after one that failed, as that began.

        Raises:
            ConfigurationError: If there is no such client, or the client keeps it itself.
        """
        self.require_client(client)
        if not isinstance(self._clients, LocalGrid):
            raise ConfigurationError(f"What client {client} keeps is with it, and not on this machine.")
        return self._clients.state_of(client, before_round=self._snapshot is not None)

    def require_client(self, client: int) -> None:
        """Check that there is such a client.

        Raises:
            ConfigurationError: If there is none.
        """
        if not checks.is_whole(client) or not 0 <= client < self.num_clients:
            raise ConfigurationError(f"There is no client {client!r}: there are clients 0 to {self.num_clients - 1}.")

    def require_here(self, call: str, way_out: str) -> None:
        """Check that clients, and what they keep, are on this machine.

        Args:
            call: What the user wants of them, as typed.
            way_out: What to do where they are elsewhere.

        Raises:
            ConfigurationError: If they are elsewhere.
        """
        if not isinstance(self._clients, LocalGrid):
            raise ConfigurationError(f"{call}: clients, with what they keep, are not on this machine. {way_out}")

    def begin_round(self) -> None:
        """Save what is there now, until ``end_round``: a round that was not ended will be run again."""
        self._snapshot = self._strategy.snapshot()
        if self._clients is not None:
            self._clients.begin_round()

    def end_round(self) -> None:
        """Note that the round's new weights are the module's."""
        self._snapshot = None

    def save(self) -> dict[str, Any]:
        """Return what goes into a checkpoint: tensors, numbers, strings, lists and dicts."""
        state: dict[str, Any] = {
            "seed": self.seed,
            "num_clients": self.num_clients,
            "names": self._names,
            "setup": self.script.setup,
            "arguments": self.script.arguments,
            "method": self._strategy.method,
            "configuration": self._strategy.configuration(),
            "strategy": self._strategy.dump(self._snapshot),
        }
        if self._clients is not None:
            kept = self._clients.client_states(before_round=self._snapshot is not None)
            state["clients"] = {client: to_plain(record) for client, record in kept.items()}
        self._name_unsaved()
        return state

    def saved_at(self, path: str) -> None:
        """Note where the checkpoint is that has what ``save`` gave last."""
        if self._clients is not None:
            self._clients.saved_at(path)

    def restore(self, found: Found, loaded: Mapping[str, dict[str, str]]) -> None:
        """Take up what a checkpoint holds, and say once all that this run has otherwise.

        Args:
            found: What the checkpoint holds.
            loaded: The arguments of all callbacks, now that they have loaded what it holds.

        Raises:
            ConfigurationError: If the strategy cannot take what the checkpoint has of it, or it is no state of a run.
        """
        try:
            notes = self._take_up(found, loaded)
        except ConfigurationError:
            raise
        except Exception as error:  # whatever reading something else may raise
            raise ConfigurationError(
                f"{found.path}: what it holds as {FEDERATION!r} is no state of a run, or a damaged one:"
                f" {type(error).__name__}: {error}. Begin with the weights alone:"
                f" {self.script.module}.load_from_checkpoint({found.path!r}), and fit that without ckpt_path."
            ) from error
        if notes:
            rank_zero_warn("\n- ".join([f"Going on from {found.path}, otherwise than before:", *notes]))

    def _take_up(self, found: Found, loaded: Mapping[str, dict[str, str]]) -> list[str]:
        _require_kinds(found.state)
        notes = self._restore_strategy(found) + self._restore_clients(found)
        told = ("seed", "num_clients", "setup", "method") if "configuration" in found.state else ("seed",)
        if unknown := [name for name in told if name not in found.state]:
            notes.append(f"The checkpoint does not tell {', '.join(unknown)} of its run: they may have been others.")
        if found.state.get("seed", self.seed) != self.seed:
            notes.append(
                f"The checkpoint is of a run with seed {found.state['seed']}, this one has seed {self.seed}: data and"
                f" cohorts will not be those of that run. Write FederatedTrainer(seed={found.state['seed']}) to go on"
                " with it."
            )
        if found.rounds:
            notes += self.script.new_callbacks(found.callbacks, found.state.get("arguments", {}))
        overwritten = self.script.overwritten(loaded, found.state.get("arguments", {}))
        notes += self.script.differences(found.state.get("setup", self.script.setup), overwritten)
        return [*notes, *overwritten.values()]

    def _restore_strategy(self, found: Found) -> list[str]:
        state, now = found.state, self._strategy.method
        then = state.get("method", now)
        if "strategy" not in state:
            return [f"The checkpoint has no state of the strategy: {now} begins anew."]
        if then != now:
            return [f"The run aggregated with {then}, this one does with {now}, which begins anew."]
        try:
            failed = self._strategy.load(state["strategy"])
        except Exception as error:
            held = ", ".join(map(repr, names_in(state["strategy"]))) or "nothing"
            raise ConfigurationError(
                f"{found.path}: {now} cannot take its state, of which the checkpoint has {held}:"
                f" {type(error).__name__}: {error}."
                " Resume with the strategy as it was written then, or begin with the weights alone:"
                " MyModule.load_from_checkpoint(path), and fit that without ckpt_path."
            ) from error
        notes = [f"{now}.{what} is not restored: it is as this script builds it." for what in failed]
        return notes + self._configuration_notes(state)

    def _configuration_notes(self, state: dict[str, Any]) -> list[str]:
        """Return what of the strategy is built otherwise than it was, and which of the two holds."""
        now, built, present = self._strategy.method, self._strategy.configuration(), self._strategy.present()
        if "configuration" not in state:  # of an earlier version, which saved and restored every attribute
            simple = {name for name, v in state["strategy"].items() if isinstance(v, (bool, int, float, str))}
            return [
                f"{now}: {name} is {present[name]} as in the checkpoint, and not {built[name]} as it is built now."
                for name in sorted(simple & built.keys())
                if present[name] != built[name]
            ]
        notes = []
        for name, before in sorted(state["configuration"].items()):
            if name not in built or built[name] == before:
                continue
            if present.get(name) != built[name]:
                notes.append(
                    f"{now}: {name} goes on at {present.get(name)}, to where the run took it from {before};"
                    f" {built[name]}, as it is built now, is not used."
                )
            elif not self.script.tells(name.rpartition(".")[2], built[name], before, state.get("setup", {})):
                notes.append(f"{now}: {name}={built[name]} holds, the run had {before}.")
        return notes

    def _restore_clients(self, found: Found) -> list[str]:
        then = found.state.get("num_clients", self.num_clients)
        records = found.state.get("clients", {})
        gone = sorted(client for client in records if client >= self.num_clients)
        notes = []
        if then != self.num_clients or gone:
            had = f"{then} clients" if then != self.num_clients else f"client {gone[-1]}"
            notes.append(f"The run had {had}, this one has {self.num_clients}: they have other data than before.")
            notes += [f"What clients {', '.join(map(str, gone))} kept is dropped."] if gone else []
        named = zip(found.state.get("names", ()), self._names, strict=False)
        if moved := [(client, was, name) for client, (was, name) in enumerate(named) if was != name]:
            client, was, name = moved[0]
            more = f", and {len(moved) - 1} more are others" if moved[1:] else ""
            notes.append(
                f"Client {client} was {was} and is {name} now{more}: what a client kept goes on with another's data."
                " Resume with the same values, or begin with the weights alone."
            )
        carries = self.script.setup["FederatedTrainer"]["client_state"] == "'carry'"
        if self._clients is None:
            lost = records or (carries and found.rounds)
            return notes + (["What clients kept cannot be given back to them on this grid."] if lost else [])
        kept: dict[int, RecordDict] = {c: from_plain(plain) for c, plain in records.items() if c not in gone}
        if foreign := [client for client, record in kept.items() if not isinstance(record, RecordDict)]:
            raise TypeError(f"what it has of client {foreign[0]} is a {type(kept[foreign[0]]).__name__}")
        self._clients.load_client_states(kept)
        if carries and not records and found.rounds:
            notes.append("The checkpoint has nothing that clients kept: their optimizers begin anew.")
        if not carries and "clients" not in found.state and found.rounds:
            notes.append("The checkpoint has nothing that clients kept: what their callbacks remember begins anew.")
        if carries and records and self.script.has_another_module(found.state.get("setup", {})):
            notes.append("What clients' optimizers kept goes on, learning rates included (client_state='carry').")
        return notes

    def _name_unsaved(self) -> None:
        unsaved = self._strategy.unsaved
        if unsaved and unsaved != self._said:
            self._said = unsaved
            rank_zero_warn(
                f"{self._strategy.method} holds {', '.join(unsaved)}, which cannot go into a checkpoint: a resumed run"
                " starts with it new. A strategy with state_dict and load_state_dict decides itself what is saved."
            )


def _require_kinds(state: Mapping[str, Any]) -> None:
    """Check that what a checkpoint has of a run is of the kinds that ``RunState.save`` gives.

    Raises:
        TypeError: If something is of another.
        ValueError: If a number cannot be.
    """
    for name, kind in _KINDS.items():
        if name in state and type(state[name]) is not kind:
            raise TypeError(f"its {name!r} is {state[name]!r}, a {type(state[name]).__name__} and no {kind.__name__}")
    for name, least in {"seed": 0, "num_clients": 1}.items():
        if state.get(name, least) < least:
            raise ValueError(f"its {name!r} is {state[name]}")
    if foreign := [client for client in state.get("clients", {}) if type(client) is not int or client < 0]:
        raise ValueError(f"among its 'clients' is {foreign[0]!r}")
