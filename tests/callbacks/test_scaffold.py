"""SCAFFOLD against the paper's equations, with unequal clients, part of whom take part in a round."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from flwr_datasets.partitioner import ExponentialPartitioner
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FedAdam, FedDyn, FederatedCallback, FedProx, Moon, Partition, Scaffold
from lightning_fed.errors import ConfigurationError, FederationError
from tests import references
from tests.callbacks.rounds import (
    HOOKS,
    WAYS,
    UnfreezesLate,
    adam,
    assert_close,
    assert_equal,
    assert_resumes,
    batches,
    encoded,
    federated,
    loaders,
    loss,
    momentum,
    sgd,
)
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

OPTIMIZERS = {"SGD": sgd, "momentum": momentum, "Adam": adam}


def by_the_paper(net: nn.Module, optimizer: Any, **how: Any) -> references.Weights:
    return references.scaffold(copy.deepcopy(net), batches(), loss, optimizer, **how)[-1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_running_mean_of_gradients_with_any_optimizer(name: str) -> None:
    net = network(torch.float64, batch_norm=name != "Adam")  # which makes steps of the noise of a bias before a norm
    ours = federated(net, OPTIMIZERS[name], Scaffold())
    assert_close(ours, by_the_paper(net, OPTIMIZERS[name]))


def everything() -> list[Any]:
    """All data of each client as one batch."""
    return [tuple(map(torch.cat, zip(*loader, strict=True))) for loader in loaders()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_option_i_is_the_gradient_of_a_clients_whole_objective_at_the_weights_received(name: str) -> None:
    net = network(torch.float64)
    assert any(len(loader.dataset) % loader.batch_size for loader in loaders())
    ours = federated(net, OPTIMIZERS[name], Scaffold(option="I"))
    assert_close(ours, by_the_paper(net, OPTIMIZERS[name], option_i=everything()))


@pytest.mark.parametrize("option", ["running", "II"])
def test_for_plain_sgd_both_options_are_the_papers_option_ii(option: Any) -> None:
    net = network(torch.float64)
    assert_close(federated(net, sgd, Scaffold(option=option)), by_the_paper(net, sgd, option_ii=0.1))


def test_the_servers_learning_rate() -> None:
    net = network(torch.float64)
    assert_close(federated(net, sgd, Scaffold(server_learning_rate=0.3)), by_the_paper(net, sgd, server_lr=0.3))


@pytest.mark.parametrize("hook", ["on_client_end", "on_round_end"])
@pytest.mark.parametrize("way", ["in process", "processes"])
def test_option_i_goes_on_bit_for_bit(way: str, hook: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, hook, momentum, lambda: Scaffold(option="I"), **WAYS.get(way, {}))


def test_option_i_on_processes_is_the_same_bit_for_bit() -> None:
    net = network(torch.float64, batch_norm=True)
    alone = federated(net, momentum, Scaffold(option="I"))
    assert_equal(federated(net, momentum, Scaffold(option="I"), **WAYS["processes"]), alone)


def test_with_option_i_clients_train_one_after_the_other() -> None:
    net = network(torch.float64)
    with pytest.warns(UserWarning, match="one after the other: each client passes over its data before it trains"):
        ours = federated(net, sgd, Scaffold(option="I"), vectorize_clients=True)
    assert_equal(ours, federated(net, sgd, Scaffold(option="I")))
    with pytest.raises(ConfigurationError, match="each client passes over its data before it trains"):
        federated(net, sgd, Scaffold(option="I"), vectorize_clients="require")


class Shuffled(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(loaders((50,))[0].dataset, batch_size=4, shuffle=True)


class Drops(Classifier):
    """With Dropout, BatchNorm, a generator and a counter of its own, and a schedule that knows the steps of the run."""

    def __init__(self, net: nn.Module, optimizer: Any = sgd) -> None:
        super().__init__(nn.Sequential(*net[:3], nn.Dropout(0.4), net[3]), optimizer)
        self.generator, self.steps = torch.Generator().manual_seed(3), 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.steps += 1
        noise = torch.randn(batch[0].shape, generator=self.generator, dtype=batch[0].dtype)
        return super().training_step((batch[0] + 0.1 * noise * self.steps, batch[1]), batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer, steps = self.optimizer(self.parameters()), int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Keeps(Classifier):
    """Steps by hand an optimizer and a schedule that it keeps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.kept = sgd(self.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.kept, 2, 0.7)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss(self.net, batch))
        optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        return [self.kept], [{"scheduler": self.schedule, "interval": "step"}]


@pytest.mark.parametrize("kind", [Drops, Keeps])
@pytest.mark.parametrize("how", [{"local_epochs": 2}, {"local_steps": 3}, {"local_steps": 30}], ids=str)
def test_the_pass_of_option_i_leaves_no_trace(how: Any, kind: Any) -> None:
    """In the first round all controls are zero, so what clients end with is as with the other options."""

    def trained(option: Any) -> references.Weights:
        module = kind(network(torch.float64, batch_norm=True))
        methods = [Partition(ExponentialPartitioner(3)), Scaffold(option=option)]
        FederatedTrainer(max_rounds=1, callbacks=methods, **how, **QUIET).fit(module, datamodule=Shuffled())
        return module.state_dict()

    assert_equal(trained("I"), trained("running"))


ARGUMENTS = [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 1e-3}, {"local_steps": 2}]


@pytest.mark.parametrize("how", ARGUMENTS, ids=str)
def test_the_gradient_of_option_i_is_of_all_batches_whatever_a_fit_takes_of_them(how: Any) -> None:
    net = network(torch.float64)
    scaffold, how = Scaffold(option="I"), how if "local_steps" in how else {"local_epochs": 2, **how}
    federated_by(Classifier(copy.deepcopy(net), sgd), scaffold, **how)
    assert_close(scaffold.state_dict()["control"], mean_gradient(net))


def mean_gradient(net: nn.Module) -> references.Weights:
    """Over clients, each over all its data."""
    net = copy.deepcopy(net)
    torch.stack([loss(net, batch) for batch in everything()]).mean().backward()
    return {f"net.{name}": p.grad for name, p in net.named_parameters()}


def test_the_gradient_of_option_i_with_two_optimizers_by_hand() -> None:
    net, scaffold = network(torch.float64), Scaffold(option="I")
    federated_by(TwoOptimizers(copy.deepcopy(net)), scaffold)
    assert_close(scaffold.state_dict()["control"], mean_gradient(net))


def federated_by(module: Any, *methods: Any, **how: Any) -> None:
    """Trains with all clients in all rounds, by default in one."""
    how = {"max_rounds": 1, **QUIET, **how}
    FederatedTrainer(callbacks=[ClientData(loaders()), *methods], **how).fit(module)


@pytest.mark.parametrize("order", [1, -1])
def test_the_gradient_of_option_i_has_the_terms_of_the_objective(order: int) -> None:
    """FedDyn's are ``-lambda_i`` at the weights received; in the first round zero, in the second not."""
    net, scaffold = network(torch.float64), Scaffold(option="I")
    federated_by(Classifier(copy.deepcopy(net), sgd), *[scaffold, FedDyn(0.3)][::order], max_rounds=2)
    assert_close(scaffold.state_dict()["control"], feddyn_and_option_i(net, 0.3))


def feddyn_and_option_i(net: nn.Module, alpha: float) -> references.Weights:
    """The server's control after the second round, all clients in both."""
    net, n = copy.deepcopy(net), len(everything())
    names = [name for name, _ in net.named_parameters()]
    x = {k: v.detach().clone() for k, v in net.state_dict().items()}
    c = {k: torch.zeros_like(v) for k, v in x.items()}
    own, linear = [dict(c) for _ in range(n)], [dict(c) for _ in range(n)]
    for _ in range(2):
        ys = []
        for i, loader in enumerate(loaders()):
            net.load_state_dict(x)
            net.zero_grad()
            loss(net, everything()[i]).backward()
            new = {k: p.grad - linear[i][k] for k, p in net.named_parameters()}
            for batch in loader:
                net.zero_grad()
                loss(net, batch).backward()
                with torch.no_grad():
                    for k, p in net.named_parameters():
                        p -= 0.1 * (p.grad - linear[i][k] + alpha * (p - x[k]) + c[k] - own[i][k])
            y = {k: v.detach().clone() for k, v in net.state_dict().items()}
            linear[i] = {k: linear[i][k] - alpha * (y[k] - x[k]) for k in names}
            own[i] = new
            ys.append(y)
        c = {k: sum(one[k] for one in own) / n for k in names}
        h = {k: alpha * (x[k] - sum(y[k] for y in ys) / n) for k in names}
        x = {k: sum(y[k] for y in ys) / n - h[k] / alpha for k in names}
    return {f"net.{k}": v for k, v in c.items()}


def test_the_gradient_of_option_i_has_moons_term() -> None:
    """Which is constant in the first round; in the second a client has features of its own."""
    net, scaffold, last, came = encoded(), Scaffold(option="I"), {}, {}

    class Notes(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_round == 1:
                note(last, trainer.client_id, pl_module)

    class NotesRound(FederatedCallback):
        def on_round_start(self, trainer: Any, round: int, stage: str, cohort: Any) -> None:
            note(came, round, trainer.lightning_module)

    def note(where: dict[int, nn.Module], key: int, module: Any) -> None:
        where[key] = copy.deepcopy(module.net)

    methods = [Moon(mu=2.0, temperature=0.5, representation="net.encoder"), scaffold, NotesRound()]
    federated_by(Classifier(copy.deepcopy(net), sgd), *methods, max_rounds=2, client_callbacks=[Notes()])
    ours = came[2]
    ours.zero_grad()
    for client, batch in enumerate(everything()):
        with torch.no_grad():
            z_x, z_p = ours.encoder(batch[0]), last[client].encoder(batch[0])
        z = ours.encoder(batch[0])
        near, far = (nn.functional.cosine_similarity(z, other).div(0.5).exp() for other in (z_x, z_p))
        objective = nn.functional.cross_entropy(ours.head(z), batch[1]) - 2.0 * (near / (near + far)).log().mean()
        (objective / len(everything())).backward()
    assert_close(scaffold.state_dict()["control"], {f"net.{name}": p.grad for name, p in ours.named_parameters()})


class Scales(Precision):
    """Has a gradient scaler."""

    scaler = object()


class Clamps(Classifier):
    def on_train_batch_end(self, *_: Any) -> None:
        for p in self.parameters():
            p.data.clamp_(-0.05, 0.05)


NO_PASS: dict[str, tuple[Any, Any, str]] = {
    "a gradient scaler": (Classifier, {"plugins": Scales()}, "trains in float16, where batches whose scaled gradients"),
    "weights that are clamped": (Clamps, {}, r"changes 'net.0.weight' in a pass in which no optimizer steps"),
}


@pytest.mark.parametrize("what", NO_PASS)
def test_what_has_no_gradient_at_the_weights_received_is_refused(what: str) -> None:
    kind, how, said = NO_PASS[what]
    with pytest.raises(FederationError, match=said):
        federated_by(kind(network(torch.float64)), Scaffold(option="I"), **how)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield torch.randn(6, dtype=torch.float64), torch.tensor(1)


def test_option_i_needs_an_end_of_the_data() -> None:
    data = ClientData([DataLoader(Endless(), batch_size=4)])
    with pytest.raises(FederationError, match="has a loader without length and trains local_steps= a round"):
        FederatedTrainer(max_rounds=1, local_steps=3, callbacks=[data, Scaffold(option="I")], **QUIET).fit(
            Classifier(network(torch.float64))
        )


@pytest.mark.parametrize("way", WAYS)
def test_engines_and_vectorized_clients_give_the_same(way: str) -> None:
    net = network(torch.float64, batch_norm=True)
    alone = federated(net, OPTIMIZERS["momentum"], Scaffold())
    other = federated(net, OPTIMIZERS["momentum"], Scaffold(), **WAYS[way])
    if "vectorize_clients" in WAYS[way]:
        assert_close(other, alone)
    else:
        assert_equal(other, alone)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("way", ["in process", "vectorized", "processes"])
def test_a_run_that_is_stopped_in_a_round_goes_on_bit_for_bit(way: str, hook: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, hook, OPTIMIZERS["momentum"], Scaffold, **WAYS.get(way, {}))


def test_with_fedprox_and_fedadam_it_is_the_composed_method() -> None:
    """Its gradients are those of the objective with the proximal term; the server steps with all clients' mean."""
    net, mu = network(torch.float64), 0.5
    ours = federated(net, sgd, FedProx(mu), FedAdam(learning_rate=0.05, weighting="uniform"), Scaffold())
    anchor: dict[str, torch.Tensor] = {}

    def objective(net: nn.Module, batch: Any) -> torch.Tensor:
        term = sum(((p - anchor[name]) ** 2).sum() for name, p in net.named_parameters())
        return loss(net, batch) + mu / 2 * term

    def begin(parameters: Any) -> torch.optim.Optimizer:
        anchor.update({name: p.detach().clone() for name, p in theirs.named_parameters()})
        return sgd(parameters)

    theirs, x = copy.deepcopy(net), {}
    step, moments = references.fedadam(0.05, 0.9, 0.99, 1e-3), [{}]

    def server(x: references.Weights, mean: references.Weights) -> references.Weights:
        x, moments[0] = step(x, mean, moments[0])
        return x

    x = references.scaffold(theirs, batches(), objective, begin, server=server)[-1]
    assert_close(ours, x)


@pytest.mark.parametrize("term", [FedProx(0.5), FedDyn(0.3)], ids=lambda term: type(term).__name__)
def test_terms_of_the_objective_are_in_its_gradients_whatever_the_order(term: Any) -> None:
    net = network(torch.float64)
    ours = federated(net, sgd, Scaffold(), term)
    assert_equal(ours, federated(net, sgd, term, Scaffold()))
    assert_close(ours, federated(net, sgd, term, Scaffold(option="II")))


class TwoOptimizers(Classifier):
    """Two optimizers by hand, one of which steps twice as often."""

    def __init__(self, net: nn.Module, optimizer: Any = sgd) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second, first):
            optimizer.zero_grad()
            self.manual_backward(loss(self.net, batch))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer(self.net[0].parameters()), torch.optim.Adam(self.net[2].parameters(), lr=0.01)]


def test_two_optimizers_each_have_the_mean_of_their_own_steps() -> None:
    module, recorded = TwoOptimizers(network(torch.float64)), {}

    class Records(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    name = next(name for name, other in pl_module.named_parameters() if other is p)
                    recorded.setdefault(name, []).append(p.grad.clone())

    class Watches(FederatedCallback):
        def on_round_end(self, trainer: Any, round: int, metrics: dict[str, float]) -> None:
            control.append({name: sum(gradients) / len(gradients) for name, gradients in recorded.items()})

    control, scaffold = [], Scaffold()
    # The first round's correction is zero, so what a later callback sees is the gradient itself.
    callbacks = [ClientData(loaders()[:1]), scaffold, Watches()]
    FederatedTrainer(max_rounds=1, callbacks=callbacks, client_callbacks=[Records()], **QUIET).fit(module)
    assert {name: len(gradients) for name, gradients in recorded.items()} == {
        "net.0.weight": 4,
        "net.0.bias": 4,
        "net.2.weight": 2,
        "net.2.bias": 2,
    }
    assert_close(scaffold.state_dict()["control"], control[0])


def test_a_second_fit_begins_anew() -> None:
    net, scaffold = network(torch.float64), Scaffold()
    first = federated(net, sgd, scaffold)
    assert all(torch.equal(tensor, first[name]) for name, tensor in federated(net, sgd, scaffold).items())


ERRORS: dict[str, tuple[Any, Any, str]] = {
    "momentum with option II": (
        lambda: [Scaffold(option="II")],
        OPTIMIZERS["momentum"],
        r"trains with SGD\(momentum=0.9, weight_decay=0.01\); Scaffold\(option='II'\) is for plain SGD",
    ),
    "Adam with option II": (lambda: [Scaffold(option="II")], OPTIMIZERS["Adam"], r"trains with Adam\(\); Scaffold"),
    "two learning rates of the server": (
        lambda: [Scaffold(server_learning_rate=0.5), FedAdam()],
        sgd,
        r"Scaffold\(server_learning_rate=0.5\) goes with its own aggregation, and another callback decides it \(AdamM",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_cannot_be_is_refused(what: str) -> None:
    methods, optimizer, said = ERRORS[what]
    with pytest.raises(FederationError, match=said):
        federated(network(torch.float64), optimizer, *methods())


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"Scaffold\(option='III'\): write 'running', 'I' or 'II'"):
        Scaffold(option="III")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="server_learning_rate=0 must be > 0"):
        Scaffold(server_learning_rate=0)


def test_a_layer_that_is_unfrozen_at_an_epochs_start_is_corrected() -> None:
    net = network(torch.float64)
    ours = federated(net, sgd, Scaffold(), client_callbacks=[UnfreezesLate()])
    assert_equal(ours, federated(net, sgd, Scaffold()))


def test_a_layer_that_trains_in_the_second_epoch_alone_has_the_mean_of_that_ones_gradients() -> None:
    net, late = network(torch.float64), [UnfreezesLate(epoch=1)]
    ours = federated(net, sgd, Scaffold(), client_callbacks=late)
    assert_close(ours, federated(net, sgd, Scaffold(option="II"), client_callbacks=late))


class Unfreezes(FederatedCallback):
    def on_round_start(self, trainer: Any, round: int, stage: str, cohort: Any) -> None:
        trainer.lightning_module.net[0].requires_grad_(round > 1)


def test_a_parameter_that_begins_to_train_later_has_no_control_and_that_is_said() -> None:
    net = network(torch.float64)
    net[0].requires_grad_(False)
    with pytest.raises(FederationError, match=r"trains 'net.0.weight', of which Scaffold has no control"):
        federated(net, sgd, Scaffold(), Unfreezes())
