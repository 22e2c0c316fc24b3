"""How a script sets a run up, in lines of text that are compared when the run is resumed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from flwr.serverapp.strategy import Strategy
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fed.callbacks import DeviceSpeed
from lightning_fed.callbacks.base import CohortOwner, FailureOwner, FederatedCallback
from lightning_fed.client.local.work import LocalOptions
from lightning_fed.wire.fingerprint import arguments_in, describe

Arguments = dict[str, str]


@dataclass
class Script:
    """A run's arguments, as its callbacks are before they load what a checkpoint holds.

    Attributes:
        module: The module's class.
        setup: By class, those of the trainer's local fits, of the module (its ``hparams``), and of the callbacks that
            decide or do something.
        arguments: By their keys in a checkpoint, those of all callbacks but the ones that save it.
        stateful: The classes of federated callbacks that have a state, by key.
    """

    module: str
    setup: dict[str, Arguments]
    arguments: dict[str, Arguments]
    stateful: dict[str, str]

    @classmethod
    def of(
        cls,
        options: LocalOptions,
        module: LightningModule,
        federated: Sequence[FederatedCallback],
        callbacks: Sequence[Callback],
    ) -> Script:
        """Return that of a run with these options of local fits, federated callbacks, and callbacks of the trainer."""
        epochs = options.epochs_by or options.epochs
        local = {"local_epochs": epochs, "local_steps": options.steps, "client_state": options.client_state}
        own = {str(name): value for name, value in module.hparams.items() if not str(name).startswith("_")}
        name = type(module).__name__
        groups = {"FederatedTrainer": local, name: own} if own else {"FederatedTrainer": local}
        setup = {key: {argument: describe(v) for argument, v in group.items()} for key, group in groups.items()}
        for one in federated:
            if type(one) not in (CohortOwner, FailureOwner) and _acts(one):
                key = type(one).__name__
                setup[key if key not in setup else f"{key} {len(setup)}"] = _arguments_of(one)
        stateful = [one for one in federated if is_overridden("state_dict", one, Callback)]
        return cls(name, setup, arguments_of(callbacks), {one.state_key: type(one).__name__ for one in stateful})

    def differences(self, then: Mapping[str, Arguments], overwritten: Collection[tuple[str, str]] = ()) -> list[str]:
        """Return what another run's ``setup`` has otherwise; this one's holds, but for what was overwritten."""
        now = self.setup
        gone, new = [name for name in then if name not in now], [name for name in now if name not in then]
        notes = [f"{_call(name, then[name])} was part of the run, and is none of this one." for name in gone]
        notes += [f"{_call(name, now[name])} was no part of the run." for name in new]
        for name in (name for name in now if name in then):
            notes += [
                f"{name}({argument}={value}) holds, the run had {argument}={then[name][argument]}."
                for argument, value in now[name].items()
                if then[name].get(argument, value) != value
                and (name, argument) not in overwritten
                and (name, value) != ("FederatedTrainer", "None")
            ]
        return notes

    def has_another_module(self, then: Mapping[str, Arguments]) -> bool:
        """Return whether the module is built with other ``hparams`` than it was."""
        return self.module in then and then[self.module] != self.setup.get(self.module)

    def tells(self, argument: str, value: str, before: str, then: Mapping[str, Arguments]) -> bool:
        """Return whether ``differences`` says of an argument that it has this value, and had that one before."""
        return any(
            arguments.get(argument) == value and then.get(name, {}).get(argument) == before
            for name, arguments in self.setup.items()
        )

    def new_callbacks(self, saved: Collection[str], then: Mapping[str, Arguments]) -> list[str]:
        """Return the federated callbacks that neither have anything in a checkpoint nor were part of its run."""
        new = [name for key, name in self.stateful.items() if key not in saved and key not in then]
        return [f"{name} has nothing in the checkpoint: it begins in this round." for name in new]

    def overwritten(self, loaded: Mapping[str, Arguments], then: Mapping[str, Arguments]) -> dict[tuple[str, str], str]:
        """Return what callbacks' states overwrote of the arguments that this script sets otherwise than the run's did.

        Args:
            loaded: The arguments of all callbacks after they have loaded their states.
            then: Those of the run as its script set them.

        Returns:
            What to say, by class and argument.
        """
        notes = {}
        for key, arguments in loaded.items():
            for argument, value in arguments.items():
                built = self.arguments.get(key, {}).get(argument, value)
                # Where that run's script had the same, the run has changed it: then it is state.
                if built not in (value, then.get(key, {}).get(argument)):
                    name = key.partition("{")[0].rpartition(".")[2]
                    said = f"{name}({argument}={value}) holds, as in the checkpoint; {built} is not used."
                    notes[name, argument] = said
        return notes


def arguments_of(callbacks: Sequence[Callback]) -> dict[str, Arguments]:
    """Return the arguments that callbacks were built with, by their keys in a checkpoint; not of those that save it."""
    return {one.state_key: _arguments_of(one) for one in callbacks if not isinstance(one, Checkpoint)}


def _arguments_of(callback: Callback) -> Arguments:
    """Return those that a callback keeps under their names."""
    found = arguments_in(callback)
    return {name: describe(value) for name, value in found.items() if not isinstance(value, Strategy)}


def _acts(callback: FederatedCallback) -> bool:
    parts = ("server_strategy", "client_mods", "local_callbacks", "stays", "pass_before", "second_fit", "in_time")
    goes_by = isinstance(callback, DeviceSpeed)  # what goes by the clock
    return goes_by or bool(callback.decides) or any(is_overridden(part, callback, FederatedCallback) for part in parts)


def _call(name: str, arguments: Arguments) -> str:
    return f"{name}({', '.join(f'{argument}={value}' for argument, value in arguments.items())})"
