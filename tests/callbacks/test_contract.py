"""What every federated callback keeps to, whoever writes the next one."""

import copy
import inspect
import io
import pickle
from typing import get_args

import pytest
import torch
from flwr.serverapp.strategy import FedAvgM as FlowerFedAvgM
from flwr.serverapp.strategy import Strategy
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer, callbacks
from lightning_fed._compat.torch import tree_flatten
from lightning_fed.callbacks import FederatedCallback
from lightning_fed.callbacks.base import Decision
from lightning_fed.errors import ConfigurationError
from lightning_fed.testing import ToyModule, toy_data

# A callback that is exported and missing here fails the suite: give it simple arguments.
SIMPLE = {
    "APFL": lambda: callbacks.APFL(),
    "Averaging": lambda: callbacks.Averaging(),
    "ClientData": lambda: callbacks.ClientData(client_loader, num_clients=2),
    "ClientMetrics": lambda: callbacks.ClientMetrics(),
    "CohortOwner": lambda: callbacks.CohortOwner(),
    "Deadline": lambda: callbacks.Deadline(60.0),
    "DeviceSpeed": lambda: callbacks.DeviceSpeed(0.01),
    "FailureOwner": lambda: callbacks.FailureOwner(),
    "FaultTolerance": lambda: callbacks.FaultTolerance(),
    "FedAdagrad": lambda: callbacks.FedAdagrad(),
    "FedAdam": lambda: callbacks.FedAdam(),
    "FedAsync": lambda: callbacks.FedAsync(2),
    "FedAvg": lambda: callbacks.FedAvg(),
    "FedAvgM": lambda: callbacks.FedAvgM(),
    "FedBuff": lambda: callbacks.FedBuff(2, 2),
    "FedDyn": lambda: callbacks.FedDyn(),
    "FedNova": lambda: callbacks.FedNova(),
    "FedProx": lambda: callbacks.FedProx(mu=0.1),
    "FedYogi": lambda: callbacks.FedYogi(),
    "FederatedCallback": lambda: callbacks.FederatedCallback(),
    "FlowerStrategy": lambda: callbacks.FlowerStrategy(FlowerFedAvgM(min_available_nodes=1, min_train_nodes=1)),
    "History": lambda: callbacks.History(),
    "Moon": lambda: callbacks.Moon(representation="net.0"),
    "OverSelection": lambda: callbacks.OverSelection(0.5),
    "PartialParticipation": lambda: callbacks.PartialParticipation(0.5),
    "Participation": lambda: callbacks.Participation(everybody),
    "Partition": lambda: callbacks.Partition(2),
    "FedBN": lambda: callbacks.FedBN(),
    "Ditto": lambda: callbacks.Ditto(),
    "FedRep": lambda: callbacks.FedRep("net.0"),
    "FedPer": lambda: callbacks.FedPer("net.0"),
    "LGFedAvg": lambda: callbacks.LGFedAvg("net.0"),
    "Personal": lambda: callbacks.Personal("net.0.bias"),
    "TrainableOnly": lambda: callbacks.TrainableOnly(),
    "RichRoundBar": lambda: callbacks.RichRoundBar(),
    "RoundPrinter": lambda: callbacks.RoundPrinter(),
    "Scaffold": lambda: callbacks.Scaffold(),
    "TQDMRoundBar": lambda: callbacks.TQDMRoundBar(),
}

BY_CLOCK = {"Deadline", "FedAsync", "FedBuff", "OverSelection"}


def everybody(round, clients, generator):
    return clients


class WithNorm(ToyModule):
    """A module for all of them: FedBN wants a BatchNorm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(torch.nn.BatchNorm1d(2))


def client_loader(client: int) -> DataLoader:
    return DataLoader(toy_data(16, seed=client), batch_size=8)


def exported() -> dict[str, type[FederatedCallback]]:
    names = {name: getattr(callbacks, name) for name in callbacks.__all__}
    found = {name: c for name, c in names.items() if inspect.isclass(c) and issubclass(c, FederatedCallback)}
    del found["PartitionOwner"]  # which knows of no clients yet
    return found


each = pytest.mark.parametrize("name", sorted(exported()))
DECISIONS = set(get_args(Decision))


def made(name: str) -> FederatedCallback:
    return SIMPLE[name]()


def run(name: str, quiet, rounds: int = 2) -> FederatedCallback:
    """The callback after a run with it."""
    callback = made(name)
    owners = [] if "partition" in callback.decides else [callbacks.Partition(2, val_fraction=0.25)]
    if name in BY_CLOCK:
        owners.append(callbacks.DeviceSpeed(0.01))
    bar = {"enable_progress_bar": isinstance(callback, ProgressBar)}
    how = {**quiet, **bar, "local_epochs": 2 if name == "FedRep" else 1}
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=[*owners, callback], **how)
    trainer.fit(WithNorm(), None if name == "ClientData" else client_loader(0))
    assert trainer.global_step == rounds
    return callback


def test_every_exported_callback_is_in_this_suite():
    assert set(SIMPLE) == set(exported())


@each
def test_it_runs_alone_in_a_fit_with_simple_arguments(name, quiet):
    run(name, quiet)


@each
def test_it_decides_only_what_is_known(name):
    decides = made(name).decides
    assert isinstance(decides, frozenset)
    assert decides <= DECISIONS


@pytest.mark.parametrize("name", [name for name in sorted(SIMPLE) if made(name).decides])
def test_two_that_decide_the_same_are_refused_by_name(name):
    first, second = made(name), made(name)
    (decision,) = first.decides
    with pytest.raises(ConfigurationError, match=f"{name} and {name} both decide the {decision}: keep one"):
        FederatedTrainer(max_rounds=1, callbacks=[first, second])


@each
def test_it_can_be_copied_and_pickled_and_the_copy_is_its_own(name):
    callback = made(name)
    for again in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(again) is type(callback)
        assert again.decides == callback.decides
        assert set(vars(again)) == set(vars(callback))
        mutable = [k for k, v in vars(callback).items() if isinstance(v, (list, dict, set))]
        assert all(vars(again)[k] is not vars(callback)[k] for k in mutable)


@each
def test_its_state_comes_back_from_a_checkpoint_that_is_loaded_with_weights_only(name, quiet):
    callback = run(name, quiet)
    buffer = io.BytesIO()
    torch.save(callback.state_dict(), buffer)
    buffer.seek(0)
    fresh = made(name)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    loaded, state = tree_flatten(fresh.state_dict()), tree_flatten(callback.state_dict())
    assert loaded[1] == state[1]
    for one, other in zip(loaded[0], state[0], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@each
def test_local_callbacks_are_new_each_time(name):
    callback = made(name)
    first, second = callback.local_callbacks(), callback.local_callbacks()
    assert [type(c) for c in first] == [type(c) for c in second]
    assert not {id(c) for c in first} & {id(c) for c in second}
    # They run in the clients' trainers: a federated callback would run there as if at the server.
    assert all(isinstance(c, Callback) and not isinstance(c, FederatedCallback) for c in first)


@each
def test_strategy_is_new_for_each_fit(name):
    callback = made(name)
    strategies = [callback.server_strategy(None) for _ in range(2)]
    if "aggregation" in callback.decides:
        assert all(isinstance(strategy, Strategy) for strategy in strategies)
        assert strategies[0] is not strategies[1]
    else:
        built = callbacks.FedAvg().server_strategy(None)
        assert isinstance(callback.server_strategy(built), Strategy)
        assert strategies == [None, None]


@each
def test_mods_are_functions_for_either_stage(name):
    callback = made(name)
    for stage in ("train", "evaluate"):
        assert all(callable(mod) for mod in callback.client_mods(stage))


@each
def test_class_and_its_public_methods_are_documented(name):
    cls = exported()[name]
    assert cls.__doc__
    for attribute, value in vars(cls).items():
        if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            assert value.__doc__, f"{name}.{attribute}"


@each
def test_every_argument_is_documented(name):
    cls = exported()[name]
    if "__init__" not in vars(cls):
        return
    arguments = set(inspect.signature(cls.__init__).parameters) - {"self", "args", "kwargs"}
    assert all(f"{argument}:" in cls.__doc__ for argument in arguments), arguments


@each
def test_it_is_built_without_touching_data_or_the_global_generators(name):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    made(name)
    assert torch.equal(torch.rand(1), expected)
