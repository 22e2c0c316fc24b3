"""Tensors that stay with each client, or that nobody trains: what travels, what clients end with, what is refused."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    APFL,
    ClientData,
    Ditto,
    FaultTolerance,
    FedAdam,
    FedBN,
    FedDyn,
    FedNova,
    FedPer,
    FedProx,
    FedRep,
    History,
    LGFedAvg,
    Personal,
    Scaffold,
    TrainableOnly,
)
from lightning_fed.errors import ConfigurationError, FederationError
from tests import references
from tests.callbacks.listening import Listens
from tests.callbacks.rounds import (
    COHORTS,
    EPOCHS,
    ROUNDS,
    SIZES,
    WAYS,
    Chosen,
    Stops,
    assert_close,
    assert_equal,
    batches,
    loaders,
    loss,
    momentum,
    sgd,
)
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network


class Personalized(Classifier):
    """As its base, and validates."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss(self.net, batch))


def fit(
    net: nn.Module,
    *callbacks: Any,
    optimizer: Any = momentum,
    rounds: int = ROUNDS,
    kind: type[Personalized] = Personalized,
    **arguments: Any,
) -> tuple[FederatedTrainer, Personalized]:
    module = kind(copy.deepcopy(net), optimizer)
    data = [(train, val) for train, val in zip(loaders(), loaders(), strict=True)]
    arguments = {**QUIET, "local_epochs": EPOCHS, **arguments}
    ckpt_path = arguments.pop("ckpt_path", None)
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=[ClientData(data), Chosen(), *callbacks], **arguments)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module


def by_the_paper(net: nn.Module, personal: Any) -> tuple[references.Weights, list[references.Weights]]:
    data = [list(loader) * EPOCHS for loader in loaders()]
    rounds = [[data[i] if i in cohort else None for i in range(len(SIZES))] for cohort in COHORTS]
    shared, own = references.personal_sgd(copy.deepcopy(net), rounds, SIZES, loss, personal, momentum)
    return shared[-1], own


# Method -> the user's callback, and which tensors of the network are personal.
METHODS: dict[str, tuple[Any, Any]] = {
    "FedPer": (lambda: FedPer("net.3"), lambda name: name.startswith("3.")),
    "LG-FedAvg": (lambda: LGFedAvg("net.0", "net.1"), lambda name: name[0] in "01"),
    "FedBN": (FedBN, lambda name: name.startswith("1.")),
    "by pattern": (lambda: Personal("*.bias", modules=nn.BatchNorm1d), lambda n: n.endswith("bias") or n[0] == "1"),
}


@pytest.mark.parametrize("way", ["in process", *WAYS])
@pytest.mark.parametrize("method", METHODS)
def test_what_travels_and_what_each_client_ends_with(method: str, way: str) -> None:
    net = network(torch.float64, batch_norm=True)
    callback, personal = METHODS[method]
    arguments = WAYS.get(way, {})
    trainer, module = fit(net, callback(), **arguments)
    shared, own = by_the_paper(net, personal)
    assert_close({name: module.net.state_dict()[name] for name in shared}, shared)
    start = net.state_dict()
    for client, theirs in enumerate(own):
        ours = trainer.personal_module(client)
        assert type(ours) is Personalized
        state = ours.net.state_dict()
        assert_close({name: state[name] for name in theirs}, theirs)
        assert_close({name: state[name] for name in shared}, shared)
    assert all(torch.equal(module.net.state_dict()[name], start[name]) for name in start if personal(name))


def test_clients_evaluate_with_their_own() -> None:
    net = network(torch.float64, batch_norm=True)
    trainer, _ = fit(net, FedPer("net.3"), History(), engine="processes")
    losses, total = 0.0, 0
    for client in COHORTS[-1]:
        module = trainer.personal_module(client).eval()
        with torch.no_grad():
            for batch in loaders()[client]:
                losses, total = losses + float(loss(module.net, batch)) * len(batch[0]), total + len(batch[0])
    assert trainer.callback_metrics["clients/val_loss"].item() == pytest.approx(losses / total, rel=1e-6)


def test_no_message_holds_a_personal_tensor() -> None:
    net, listens = network(torch.float64, batch_norm=True), Listens()
    trainer, _ = fit(net, FedPer("net.3"), Scaffold(), engine=listens, rounds=2)
    values = [net.state_dict()["3.weight"]]
    values += [trainer.personal_module(client).net.state_dict()["3.weight"] for client in range(len(SIZES))]
    assert len(listens.heard) > 8
    for message, data in listens.heard:
        names = [name for record in message.content.values() if isinstance(record, ArrayRecord) for name in record]
        assert not [name for name in names if "net.3" in name]
        for value in values:
            assert value.numpy().tobytes()[:16] not in data


def test_bytes_are_said_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_fed.server.session.rank_zero_info", said.append)
    net, history = network(torch.float64, batch_norm=True), History()
    fit(net, FedPer("net.3"), history)
    sizes = {name: tensor.nbytes for name, tensor in net.state_dict().items()}
    each = sum(size for name, size in sizes.items() if not name.startswith("3."))
    assert [row["bytes/up"] for row in history.rows] == [each * len(cohort) for cohort in COHORTS]
    assert [row["bytes/down"] for row in history.rows] == [each * len(cohort) for cohort in COHORTS]
    line = f"7 of 9 tensors, {each:,} of {sum(sizes.values()):,} bytes each way; not: 2 personal"
    assert line in said[0]


@pytest.mark.parametrize("hook", ["on_client_end", "on_round_end"])
@pytest.mark.parametrize("way", ["in process", "processes"])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(way: str, hook: str, tmp_path: Path) -> None:
    net, arguments = network(torch.float64, batch_norm=True), {**WAYS.get(way, {}), "enable_checkpointing": True}
    whole, expected = fit(net, FedPer("net.3"), Scaffold(), **arguments)
    stops, saves = Stops(hook), OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(net, FedPer("net.3"), Scaffold(), stops, saves, **arguments)
    path = str(tmp_path / "on_exception.ckpt")
    trainer, module = fit(net, FedPer("net.3"), Scaffold(), stops, saves, ckpt_path=path, **arguments)
    for name, tensor in module.net.state_dict().items():
        assert torch.equal(tensor, expected.net.state_dict()[name])
    for client in range(len(SIZES)):
        theirs = whole.personal_module(client).net.state_dict()
        for name, tensor in trainer.personal_module(client).net.state_dict().items():
            assert torch.equal(tensor, theirs[name])


def test_with_scaffold_fedprox_and_fedadam_it_is_the_composed_method() -> None:
    """Only what travels has controls, a proximal term and a server's step."""
    net = network(torch.float64)
    personal = lambda name: name.startswith("2.")  # noqa: E731
    methods = (FedProx(0.5), FedAdam(learning_rate=0.05, weighting="uniform"), Scaffold())
    trainer, module = fit(net, *methods, Personal("net.2"), optimizer=sgd)
    shared, own = composed(net, personal, 0.5)
    assert_close({name: module.net.state_dict()[name] for name in shared}, shared)
    for client, theirs in enumerate(own):
        state = trainer.personal_module(client).net.state_dict()
        assert_close({name: state[name] for name in theirs}, theirs)


def composed(net: nn.Module, personal: Any, mu: float) -> tuple[references.Weights, list[references.Weights]]:
    net = copy.deepcopy(net)
    x = {k: v.detach().clone() for k, v in net.state_dict().items()}
    own = [{k: v for k, v in x.items() if personal(k)} for _ in SIZES]
    x = {k: v for k, v in x.items() if not personal(k)}
    c = {k: torch.zeros_like(v) for k, v in x.items()}
    controls, step, moments = [dict(c) for _ in SIZES], references.fedadam(0.05, 0.9, 0.99, 1e-3), {}
    data = [list(loader) * EPOCHS for loader in loaders()]
    for cohort in COHORTS:
        ys, changes = [], []
        for i in cohort:
            net.load_state_dict({**x, **own[i]})
            total = {k: torch.zeros_like(v) for k, v in x.items()}
            for batch in data[i]:
                net.zero_grad()
                loss(net, batch).backward()
                with torch.no_grad():
                    for k, p in net.named_parameters():
                        g = p.grad
                        if not personal(k):
                            g = g + mu * (p - x[k])
                            total[k] += g
                            g = g + c[k] - controls[i][k]
                        p -= 0.1 * g
            y = {k: v.detach().clone() for k, v in net.state_dict().items()}
            own[i], new = {k: y[k] for k in own[i]}, {k: v / len(data[i]) for k, v in total.items()}
            changes.append({k: new[k] - controls[i][k] for k in x})
            controls[i] = new
            ys.append({k: y[k] for k in x})
        x, moments = step(x, references.weighted_mean(ys, [1.0] * len(ys)), moments)
        c = {k: c[k] + sum(change[k] for change in changes) / len(SIZES) for k in c}
    return x, own


# ------------------------------------------------------------------------------------------------------ what is frozen


@pytest.mark.parametrize("way", ["in process", *WAYS])
def test_frozen_parameters_do_not_travel_and_nothing_else_changes(way: str) -> None:
    net = network(torch.float64, batch_norm=True)
    net[0].requires_grad_(False)
    history, arguments = History(), WAYS.get(way, {})
    _, all_of_it = fit(net, **arguments)
    _, module = fit(net, TrainableOnly(), history, **arguments)
    for name, tensor in module.net.state_dict().items():
        assert torch.equal(tensor, all_of_it.net.state_dict()[name])
    each = sum(tensor.nbytes for name, tensor in net.state_dict().items() if not name.startswith("0."))
    assert [row["bytes/up"] for row in history.rows] == [each * len(cohort) for cohort in COHORTS]


# -------------------------------------------------------------------------------------------------------------- errors


class Tied(Personalized):
    def __init__(self, net: nn.Module, optimizer: Any = sgd) -> None:
        super().__init__(net, optimizer)
        self.again = net[2]


ERRORS: dict[str, tuple[Any, str]] = {
    "nothing of that name": (
        lambda: Personal("ned.2"),
        r"Personal\('ned.2'\): 'ned.2' names nothing of the module. It has 'net.2', ",
    ),
    "not a prefix": (lambda: Personal("net.2", "net.2.w"), r"'net.2.w' names nothing of the module"),
    "a layer without tensors": (
        lambda: Personal("net.1"),
        r"'net.1' names nothing of the module \(Tanh has no tensors\). It has 'net.2', ",
    ),
    "no such layer": (lambda: Personal(modules=nn.LSTM), r"no layer is a LSTM. There are .*Linear"),
    "no normalization": (FedBN, "FedBN.*: no layer is a BatchNorm1d or .*SyncBatchNorm. There are Linear, "),
    "all of it": (lambda: Personal("net"), "Nothing of Personalized travels: 4 of its 4 tensors are personal"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_cannot_be_is_refused(what: str) -> None:
    callback, said = ERRORS[what]
    with pytest.raises(ConfigurationError, match=said):
        fit(network(torch.float64), callback())


def test_a_tied_tensor_is_personal_under_all_its_names_or_none() -> None:
    module = Tied(network(torch.float64))
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(loaders()), Personal("net.2")], **QUIET)
    with pytest.raises(ConfigurationError, match=r"'net.2.weight' is tied to 'again.weight', which it does not name"):
        trainer.fit(module)


def test_nothing_that_trains_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"TrainableOnly\(\): no parameter of Personalized trains"):
        fit(network(torch.float64).requires_grad_(False), TrainableOnly())


def test_a_layer_is_named_by_its_path_and_not_by_how_that_begins() -> None:
    class Two(Personalized):
        def __init__(self) -> None:
            super().__init__(network(torch.float64))
            self.head, self.head2 = nn.Linear(1, 1), nn.Linear(1, 1)

    assert Personal("head").stays(Two()).personal == {"head.weight", "head.bias"}
    both = {f"{head}.{what}" for head in ("head", "head2") for what in ("weight", "bias")}
    assert Personal("head*").stays(Two()).personal == both


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"Personal\(\) names nothing"):
        Personal()
    with pytest.raises(ConfigurationError, match="patterns are strings, modules= are classes"):
        Personal(nn.BatchNorm1d)  # type: ignore[arg-type]


def test_there_is_no_module_of_a_client_that_is_not_there() -> None:
    trainer, _ = fit(network(torch.float64), Personal("net.2"), rounds=1)
    with pytest.raises(ConfigurationError, match="There is no client 4: there are clients 0 to 3"):
        trainer.personal_module(4)
    fresh = FederatedTrainer(max_rounds=1, num_clients=2, **QUIET)
    with pytest.raises(ConfigurationError, match="there has been no fit"):
        fresh.personal_module(0)


@pytest.mark.parametrize("what", ["the module", "a layer", "around it"])
def test_a_compiled_module_s_copy_computes_with_its_own_tensors(what: str) -> None:
    """The compiled call and steps are the original's, whose layers have the server's tensors."""

    class Called(Personalized):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    module = Called(network(torch.float64), sgd)
    given: Any = torch.compile(module, backend="eager") if what == "around it" else module
    if given is module:
        (module if what == "the module" else module.net).compile(backend="eager")
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(loaders()), Personal("net.2")], **QUIET)
    trainer.fit(given)
    for client in range(len(SIZES)):
        own = trainer.personal_module(client)
        plain = Called(network(torch.float64), sgd)
        plain.load_state_dict(own.state_dict())
        x = torch.randn(4, 6, dtype=torch.float64)
        assert torch.allclose(own(x), plain(x))


def test_what_the_server_validates_is_said_once(tmp_path: Path) -> None:
    module = Personalized(network(torch.float64), sgd)
    callbacks = [ClientData(loaders()), Personal("net.2")]
    trainer = FederatedTrainer(max_rounds=2, callbacks=callbacks, accelerator="cpu", default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="the server validates with the personal tensors as they were") as said:
        trainer.fit(module, val_dataloaders=loaders()[0])
    assert sum("the server validates" in str(one.message) for one in said) == 1


class Spoils(Callback):
    """Client 1's own head becomes NaN in its last step, which nothing that travels shows."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.client_id == 1:
            pl_module.net[2].bias.data[0] = float("nan")


@pytest.mark.parametrize("way", ["in process", "processes"])
def test_nan_in_a_clients_own_tensors_is_its_failure_and_does_not_stay(way: str) -> None:
    with pytest.warns(UserWarning, match=r"client 1 .*own tensors that cannot be used: it sent 'net.2.bias' with NaN"):
        trainer, _ = fit(
            network(torch.float64),
            Personal("net.2"),
            FaultTolerance(min_results=1),
            client_callbacks=[Spoils()],
            **WAYS.get(way, {}),
        )
    state = trainer.personal_module(1).net.state_dict()
    assert torch.equal(state["2.bias"], network(torch.float64).state_dict()["2.bias"])


# -------------------------------------------------------------------------------------------------------------- FedRep


def head_then_body(net: nn.Module, head: Any) -> tuple[references.Weights, list[references.Weights]]:
    """Collins et al. 2021, Algorithm 1, with momentum and weight decay: one epoch for the head, one for the body."""
    net = copy.deepcopy(net)
    x = {k: v.detach().clone() for k, v in net.state_dict().items()}
    own, shared = [{k: v for k, v in x.items() if head(k)} for _ in SIZES], {k: v for k, v in x.items() if not head(k)}
    for cohort in COHORTS:
        ys = []
        for i in cohort:
            net.load_state_dict({**shared, **own[i]})
            for is_heads in (True, False):
                part = [p for name, p in net.named_parameters() if head(name) == is_heads]
                optimizer = momentum(part)  # the other part's momentum has not begun, or does not move it any more
                for batch in list(loaders()[i]):
                    net.zero_grad()
                    loss(net, batch).backward()
                    optimizer.step()
            y = {k: v.detach().clone() for k, v in net.state_dict().items()}
            own[i] = {k: y[k] for k in own[i]}
            ys.append({k: y[k] for k in shared})
        shared = references.weighted_mean(ys, [SIZES[i] for i in cohort])
    return shared, own


@pytest.mark.parametrize("way", ["in process", "processes"])
def test_fedrep_trains_the_head_and_then_the_body(way: str) -> None:
    net = network(torch.float64)
    trainer, module = fit(net, FedRep("net.2"), **WAYS.get(way, {}))
    shared, own = head_then_body(net, lambda name: name.startswith("2."))
    assert_close({name: module.net.state_dict()[name] for name in shared}, shared)
    for client, theirs in enumerate(own):
        state = trainer.personal_module(client).net.state_dict()
        assert_close({name: state[name] for name in theirs}, theirs)
    assert all(p.requires_grad for p in module.parameters())


def test_fedrep_says_how_many_local_epochs_it_has() -> None:
    said = r"FedRep\(head_epochs=5, body_epochs=1\) has 6 local epochs a round, and the run has local_epochs=2"
    with pytest.raises(ConfigurationError, match=said):
        fit(network(torch.float64), FedRep("net.2", head_epochs=5))
    with pytest.raises(ConfigurationError, match="body_epochs=0 must be a whole number, at least 1"):
        FedRep("net.2", body_epochs=0)


def test_fedrep_needs_a_body_that_trains() -> None:
    net = network(torch.float64)
    net[0].requires_grad_(False)
    with pytest.raises(FederationError, match="FedRep: no parameter of the body trains"):
        fit(net, FedRep("net.2"))


def test_with_feddyn_only_what_travels_has_its_terms() -> None:
    net = network(torch.float64)
    trainer, module = fit(net, FedDyn(alpha=0.1), Personal("net.2"), optimizer=sgd, rounds=1)
    shared, own = composed_with_feddyn(net, 0.1)
    assert_close({name: module.net.state_dict()[name] for name in shared}, shared)
    for client in COHORTS[0]:
        state = trainer.personal_module(client).net.state_dict()
        assert_close({name: state[name] for name in own[client]}, own[client])


def composed_with_feddyn(net: nn.Module, alpha: float) -> tuple[references.Weights, dict[int, references.Weights]]:
    """One round from zero: ``g + alpha (w - x)`` on what travels, plain gradients on the rest."""
    net = copy.deepcopy(net)
    x = {k: v.detach().clone() for k, v in net.state_dict().items()}
    ys, own = [], {}
    for i in COHORTS[0]:
        net.load_state_dict(x)
        for batch in list(loaders()[i]) * EPOCHS:
            net.zero_grad()
            loss(net, batch).backward()
            with torch.no_grad():
                for k, p in net.named_parameters():
                    p -= 0.1 * (p.grad if k.startswith("2.") else p.grad + alpha * (p - x[k]))
        y = {k: v.detach().clone() for k, v in net.state_dict().items()}
        own[i] = {k: v for k, v in y.items() if k.startswith("2.")}
        ys.append({k: v for k, v in y.items() if k not in own[i]})
    return references.weighted_mean(ys, [1.0] * len(ys)), own


# --------------------------------------------------------------------------------------------------------------- Ditto


@pytest.mark.parametrize("way", ["in process", "processes"])
def test_ditto_trains_a_second_model_near_the_one_that_came(way: str) -> None:
    """Li et al. 2021, Algorithm 1: the global model is FedAvg's, and v follows grad F(v) + lam (v - x)."""
    lam, net = 0.5, network(torch.float64, batch_norm=True)
    shared, _ = by_the_paper(net, lambda name: False)
    data, own, x = [list(loader) * EPOCHS for loader in loaders()], {}, copy.deepcopy(net).state_dict()
    for round, cohort in enumerate(COHORTS):
        for i in cohort:
            v = copy.deepcopy(net).train()
            v.load_state_dict(own.get(i, x))
            optimizer = momentum(v.parameters())
            for batch in data[i]:
                optimizer.zero_grad()
                loss(v, batch).backward()
                for name, p in v.named_parameters():
                    p.grad += lam * (p.detach() - x[name])
                optimizer.step()
            own[i] = {name: tensor.clone() for name, tensor in v.state_dict().items()}
        everything = references.personal_sgd(
            copy.deepcopy(net), batches()[: round + 1], SIZES, loss, lambda name: False, momentum
        )
        x = everything[0][-1]
    trainer, module = fit(net, Ditto(lam), History(), **WAYS.get(way, {}))
    assert_close(module.net.state_dict(), shared)
    for client, theirs in own.items():
        assert_close(trainer.personal_module(client).net.state_dict(), theirs)
    losses = 0.0
    for client in COHORTS[-1]:
        v = trainer.personal_module(client).eval()
        with torch.no_grad():
            losses += sum(float(loss(v.net, batch)) * len(batch[0]) for batch in loaders()[client])
    assert trainer.callback_metrics["clients/val_loss"].item() == pytest.approx(losses / sum(SIZES), rel=1e-6)


def test_ditto_stopped_in_a_round_goes_on_bit_for_bit(tmp_path: Path) -> None:
    net, stops, saves = network(torch.float64), Stops("on_client_end"), OnExceptionCheckpoint(tmp_path)
    whole, _ = fit(net, Ditto(), enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(net, Ditto(), stops, saves, enable_checkpointing=True)
    path = str(tmp_path / "on_exception.ckpt")
    trainer, _ = fit(net, Ditto(), stops, saves, ckpt_path=path, enable_checkpointing=True)
    for client in range(len(SIZES)):
        theirs = whole.personal_module(client).net.state_dict()
        for name, tensor in trainer.personal_module(client).net.state_dict().items():
            assert torch.equal(tensor, theirs[name])


def test_two_second_models_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="Ditto and Ditto both train a second model of each client"):
        fit(network(torch.float64), Ditto(), Ditto())


def test_clients_with_a_second_model_train_one_after_the_other() -> None:
    with pytest.warns(UserWarning, match="one after the other: each client trains a second model of its own"):
        fit(network(torch.float64), Ditto(), vectorize_clients=True)


class Renamed(Personalized):
    """Its state dict has other names than its parameters."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        super().__init__(net, optimizer)
        self.register_state_dict_post_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._name_back)

    @staticmethod
    def _rename(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in list(state):
            state[name.replace("net.", "net/")] = state.pop(name)

    @staticmethod
    def _name_back(module: Any, state: dict[str, Any], *rest: Any) -> None:
        for name in list(state):
            state[name.replace("net/", "net.")] = state.pop(name)


# Method -> the user's callbacks, where the head's state dict entries match a pattern.
WITH_PERSONAL: dict[str, Any] = {
    "FedProx": lambda head: [FedPer(head), FedProx(0.5)],
    "Scaffold": lambda head: [FedPer(head), Scaffold()],
    "Scaffold, option I": lambda head: [FedPer(head), Scaffold(option="I")],
    "FedDyn": lambda head: [FedPer(head), FedDyn(0.3)],
    "FedNova": lambda head: [FedPer(head), FedNova()],
    "FedRep": lambda head: [FedRep(head), Scaffold()],
    "Ditto": lambda head: [FedPer(head), Ditto(0.7)],
    "Ditto alone": lambda head: [Ditto(0.7)],
    "APFL": lambda head: [FedPer(head), APFL()],
}


@pytest.mark.parametrize("way", ["in process", "processes"])
@pytest.mark.parametrize("method", WITH_PERSONAL)
def test_where_the_state_dict_has_other_names_the_same_parameters_are_personal(method: str, way: str) -> None:
    net, optimizer = network(torch.float64), partial(torch.optim.SGD, lr=0.05)
    trained = []
    for kind, head in ((Personalized, "net.2"), (Renamed, "net/2.*")):
        trainer, module = fit(net, *WITH_PERSONAL[method](head), optimizer=optimizer, kind=kind, **WAYS.get(way, {}))
        own = [trainer.personal_module(client).net.state_dict() for client in range(len(SIZES))]
        trained.append([module.net.state_dict(), *own])
    for theirs, ours in zip(*trained, strict=True):
        assert_equal(ours, theirs)


class Unfreezes(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[0].requires_grad_(True)


@pytest.mark.parametrize("kind", [Personalized, Renamed])
def test_what_is_frozen_has_to_stay_so_whatever_the_state_dict_calls_it(kind: type[Personalized]) -> None:
    net = network(torch.float64)
    net[0].requires_grad_(False)
    with pytest.raises(FederationError, match=r"client 0 trains 'net.0.weight', which was frozen when the run began"):
        fit(net, TrainableOnly(), kind=kind, client_callbacks=[Unfreezes()])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Ditto, lambda: []),
        (APFL, lambda: [Ditto()]),
        (Ditto, lambda: [APFL()]),
        (lambda: FedPer("net.2"), lambda: []),
        (lambda: FedPer("net.2"), lambda: [FedPer("net.0")]),
    ],
    ids=["Ditto, none", "APFL, Ditto", "Ditto, APFL", "FedPer, none", "FedPer, other layers"],
)
def test_what_a_client_kept_in_another_way_of_training_is_not_its_own(before: Any, after: Any, tmp_path: Path) -> None:
    """The run that goes on has no rounds left, so nobody has trained in the new way yet."""
    net, how = network(torch.float64), {"enable_checkpointing": True, "default_root_dir": str(tmp_path)}
    saves = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(net, before(), Stops("on_round_start"), saves, **how)
    path = str(tmp_path / "on_exception.ckpt")
    trainer, module = fit(net, *after(), rounds=2, ckpt_path=path, **how)
    for client in range(len(SIZES)):
        assert_equal(trainer.personal_module(client).state_dict(), module.state_dict())
