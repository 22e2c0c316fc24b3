"""Which of a Trainer's arguments go where, and what is said of those that a federation cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import AsyncCheckpointIO, MixedPrecision

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FedAdam, FedAvg, RoundPrinter
from lightning_fed.engines import InProcess, Processes, SuperLink
from lightning_fed.errors import ConfigurationError
from lightning_fed.server import arguments

NUMBERS: dict[str, int | None] = dict.fromkeys(
    ("max_rounds", "num_clients", "local_epochs", "local_steps", "num_workers", "clients_per_device")
)


def numbers(**given: Any) -> dict[str, Any]:
    return {**NUMBERS, "max_rounds": 3, **given}


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"max_epochs": 7}, "max_epochs=7 is not .*: write max_rounds=7, and local_epochs="),
        ({"max_steps": 7}, "write max_rounds=, and local_steps=7 for"),
        ({"max_steps": 2.5}, r"max_steps=2\.5 is not .*local_steps=n for"),
        ({"min_steps": 4}, "write min_epochs=4,"),
        ({"strategy": "ddp"}, "leave strategy out and choose an engine="),
        ({"num_nodes": 2}, "leave num_nodes out"),
        ({"val_check_interval": 0.5}, r"write check_val_every_n_epoch=n for"),
        ({"barebones": True}, "leave barebones out"),
        ({"sync_batchnorm": True}, "leave sync_batchnorm out"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0: write a whole number, at least 1"),
        ({"accumulate_grad_batches": 1.5}, "write a whole number, at least 1"),
        ({"accumulate_grad_batches": {0: 2}}, r"client_callbacks=\[GradientAccumulationScheduler\({0: 2}\)\]"),
    ],
)
def test_what_a_federation_cannot_take_is_named_with_what_to_write(given: dict[str, Any], instead: str) -> None:
    (fault,) = arguments.refusals({"precision": "32-true", **given})
    with pytest.raises(ConfigurationError, match=instead):
        arguments.refuse([fault])


def test_a_flower_strategy_is_sent_to_its_callback() -> None:
    (fault,) = arguments.refusals({"strategy": FlowerFedAvg()})
    assert fault.endswith("write callbacks=[FlowerStrategy(FedAvg(...))].")


def test_arguments_that_nobody_knows_are_named_with_all_that_are_known() -> None:
    assert arguments.unknown_faults({"precision": "32-true", "max_epochs": 3}, ["max_rounds"]) == []
    [fault] = arguments.unknown_faults({"momentum": 0.9, "logger": False, "gpus": 1}, ["max_rounds", "engine"])
    assert fault.startswith(
        "momentum=0.9, gpus=1: a FederatedTrainer does not know these. It takes max_rounds, engine, and of a Trainer's"
        " arguments accelerator, accumulate_grad_batches, "
    )
    assert " max_epochs," not in fault
    with pytest.raises(ConfigurationError, match=r"gpus=1: .* does not know this\. It takes max_rounds, "):
        FederatedTrainer(max_rounds=1, num_clients=2, gpus=1)


@pytest.mark.parametrize(
    "silent",
    [
        *({"max_epochs": None}, {"max_steps": -1}, {"min_steps": 0}, {"strategy": "auto"}, {"num_nodes": 1}),
        *({"val_check_interval": 1.0}, {"barebones": False}, {"sync_batchnorm": None}, {"accumulate_grad_batches": 4}),
    ],
)
def test_values_that_say_nothing_are_not_refused(silent: dict[str, Any]) -> None:
    assert arguments.refusals(silent) == []


def test_all_faults_are_one_error_and_none_is_none() -> None:
    arguments.refuse([], [])
    with pytest.raises(ConfigurationError) as error:
        arguments.refuse(["one."], [], ["two.", "three."])
    assert str(error.value) == "FederatedTrainer cannot start:\n  - one.\n  - two.\n  - three."


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, []),
        ({"max_rounds": -1}, []),
        ({"max_rounds": 0}, ["max_rounds=0 must be at least 1."]),
        ({"num_clients": -1, "local_steps": 0}, ["num_clients=-1 must be", "local_steps=0 must be"]),
        ({"local_epochs": 1, "local_steps": 1}, ["local_epochs= and local_steps= contradict"]),
        ({"num_workers": 2.5}, ["num_workers=2.5"]),
    ],
)
def test_numbers_that_cannot_be(given: dict[str, Any], found: list[str]) -> None:
    faults = arguments.limit_faults(numbers(**given), endless=False)
    assert len(faults) == len(found)
    assert all(fault.startswith(text) for fault, text in zip(faults, found, strict=True))


@pytest.mark.parametrize(("endless", "faults"), [(True, 0), (False, 1)])
def test_a_run_has_an_end_or_something_else_that_ends_it(endless: bool, faults: int) -> None:
    assert len(arguments.limit_faults(numbers(max_rounds=None), endless)) == faults


@pytest.mark.parametrize(
    ("engine", "given", "found"),
    [
        ("in_process", {}, []),
        (InProcess(), {}, []),
        ("ray", {"num_workers": 2}, []),
        ("processes", {"num_workers": 2, "clients_per_device": 3}, []),
        (InProcess, {}, ["engine=InProcess is a class: write InProcess()."]),
        ("threads", {}, ["engine='threads' is unknown: write one of ['in_process', 'processes', 'ray'],"]),
        ("in_process", {"num_workers": 2}, ["num_workers=2 is for engine='processes' and engine='ray'"]),
        (Processes(1), {"clients_per_device": 2}, ["clients_per_device=2 is for engine='processes'"]),
    ],
)
def test_an_engine_and_what_goes_with_it(engine: Any, given: dict[str, Any], found: list[str]) -> None:
    faults = arguments.engine_faults(engine, ["ray", "processes", "in_process"], numbers(**given))
    assert len(faults) == len(found)
    assert all(fault.startswith(text) for fault, text in zip(faults, found, strict=True))


def one_by_one() -> InProcess:
    engine = InProcess()
    engine.can_vectorize = False
    return engine


@pytest.mark.parametrize(
    ("vectorize", "compiles", "engine", "found"),
    [
        (False, False, "ray", ""),
        (False, True, "in_process", "write vectorize_clients=True, too"),
        (True, True, "processes", ""),
        ("require", False, InProcess(), ""),
        (2, False, "in_process", ""),
        (1, False, "in_process", "vectorize_clients=1: write True"),
        ("yes", False, "in_process", "vectorize_clients='yes': write True"),
        (True, False, "ray", "each client trains by itself"),
        (True, False, SuperLink("127.0.0.1:1", insecure=True), "each client trains by itself"),
        (True, False, one_by_one(), "each client trains by itself"),
        (True, False, "unknown", ""),  # of which something else is said
    ],
)
def test_which_clients_can_be_vectorized(vectorize: Any, compiles: bool, engine: Any, found: str) -> None:
    faults = arguments.vectorize_faults(vectorize, compiles, engine)
    assert len(faults) == bool(found)
    assert all(found in fault for fault in faults)


def test_a_word_is_one_of_those_that_there_are() -> None:
    assert arguments.choice_faults("client_state", "carry", ["carry", "reset"]) == []
    assert arguments.choice_faults("client_state", "kept", iter(["carry", "reset"])) == [
        "client_state='kept' is unknown: write one of ('carry', 'reset')."
    ]


def test_callbacks_in_the_wrong_place_and_of_the_wrong_kind_are_all_named() -> None:
    faults = arguments.placement_faults([FedAvg(), FedAdam(), 3], [FedAvg(), RoundPrinter], num_clients=2)
    for text in ("FedAvg and FedAdam both decide the aggregation", "FedAvg is a federated callback", "RoundPrinter"):
        assert sum(text in fault for fault in faults) == 1, text
    assert arguments.placement_faults([FedAvg()], [], num_clients=2) == []


# -------------------------------------------------------------------------------------------------- what goes where


def test_training_is_the_clients_numerics_are_for_both_and_all_else_is_the_servers() -> None:
    given = {
        **{"gradient_clip_val": 0.5, "overfit_batches": 1, "accelerator": "cpu", "precision": "64-true"},
        **{"max_time": "01", "limit_val_batches": 3, "strategy": "auto", "num_nodes": 1, "devices": 4},
    }
    clients = arguments.take_client_arguments(given, cuda=[], local_epochs=1)
    both = {"accelerator": "cpu", "precision": "64-true", "devices": 1}
    assert clients == {"gradient_clip_val": 0.5, "overfit_batches": 1, **both}
    assert given == {"max_time": "01", "limit_val_batches": 3, **both}


@pytest.mark.parametrize(
    ("accelerator", "devices", "cuda", "expected"),
    [
        ("gpu", [2, 3], [2, 3], [2]),
        ("cpu", 8, [], 1),
        (CPUAccelerator(), 8, [], 8),
        (CPUAccelerator(), None, [], "auto"),
    ],
)
def test_a_fit_has_one_device(accelerator: Any, devices: Any, cuda: list[int], expected: Any) -> None:
    given = {"accelerator": accelerator, **({} if devices is None else {"devices": devices})}
    clients = arguments.take_client_arguments(given, cuda, local_epochs=1)
    assert given["devices"] == clients["devices"] == expected


@pytest.mark.parametrize(("local_epochs", "rounds"), [(1, 4), (2, 2), (3, 1), (9, 1)])
def test_clients_read_their_loaders_anew_by_epoch_and_the_server_by_round(local_epochs: int, rounds: int) -> None:
    given = {"reload_dataloaders_every_n_epochs": 4}
    assert arguments.take_client_arguments(given, [], local_epochs)["reload_dataloaders_every_n_epochs"] == 4
    assert given["reload_dataloaders_every_n_epochs"] == rounds


def test_clients_have_all_plugins_but_those_that_save_checkpoints() -> None:
    precision, saving = MixedPrecision("bf16-mixed", "cpu"), AsyncCheckpointIO()
    given = {"plugins": [precision, saving]}
    assert arguments.take_client_arguments(given, [], 1)["plugins"] == [precision]
    assert given["plugins"] == [precision, saving]
    assert arguments.take_client_arguments({"plugins": saving}, [], 1)["plugins"] == []
    assert arguments.take_client_arguments({"plugins": None}, [], 1)["plugins"] is None


@pytest.mark.parametrize("accelerator", ["cpu", "mps", CPUAccelerator()])
def test_another_accelerator_has_no_cuda_devices(accelerator: Any) -> None:
    assert arguments.cuda_devices(accelerator, "auto") == []


@pytest.mark.parametrize(("there", "expected"), [(True, [0, 1]), (False, [])])
def test_cuda_devices_are_those_that_a_trainer_would_use(
    monkeypatch: pytest.MonkeyPatch, there: bool, expected: list[int]
) -> None:
    asked: list[Any] = []

    def parse(devices: Any) -> list[int]:
        asked.append(devices)
        return [0, 1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr("lightning.pytorch.accelerators.CUDAAccelerator.parse_devices", parse)
    assert arguments.cuda_devices("auto", "auto") == expected
    assert arguments.cuda_devices("gpu", 2) == arguments.cuda_devices("cuda", [0, 1]) == [0, 1]
    assert asked == ([-1] if there else []) + [2, [0, 1]]


@pytest.mark.parametrize(("steps", "heard"), [(None, False), (1, False), (50, True)])
def test_what_log_every_n_steps_means_is_said_where_it_means_something(
    monkeypatch: pytest.MonkeyPatch, steps: int | None, heard: bool
) -> None:
    said: list[str] = []
    monkeypatch.setattr(arguments, "rank_zero_info", said.append)
    arguments.say_what_is_logged(steps)
    assert [f"log_every_n_steps={steps} counts a client's steps" in text for text in said] == [True] * heard
