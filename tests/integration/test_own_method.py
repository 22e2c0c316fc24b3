"""What users write themselves: a method in three parts, an engine, and the two apps on somebody else's grid."""

from __future__ import annotations

import copy
import re
from functools import partial

import lightning as L
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp import strategy as flower
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAUROC

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    FedAdam,
    FedAvg,
    FedAvgM,
    FederatedCallback,
    FlowerStrategy,
    History,
    PartialParticipation,
    Partition,
)
from lightning_fed.engines import Engine, InProcess
from lightning_fed.wire import messages
from tests.helpers import QUIET, sweep
from tests.integration import plain

SIZES = (6, 12, 22)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()


class Classifier(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def client_loaders():
    generator = torch.Generator().manual_seed(11)
    made = []
    for client, size in enumerate(SIZES):
        x = torch.randn(size, 6, generator=generator).double() + client
        y = (torch.randint(0, 3, (size,), generator=generator) + client) % 3
        made.append(DataLoader(TensorDataset(x, y), batch_size=4))
    return made


def federated(*callbacks, rounds=3, **arguments):
    module = Classifier(network())
    callbacks = [ClientData(client_loaders()), *callbacks]
    trainer = FederatedTrainer(max_rounds=rounds, seed=0, callbacks=callbacks, **{**QUIET, **arguments})
    trainer.fit(module)
    return module.net.state_dict()


def by_hand(server, lr=0.1):
    data = [list(loader) for loader in client_loaders()]
    return plain.federate(network(), data, rounds=3, server=server, epochs=1, optimizer=partial(torch.optim.SGD, lr=lr))


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-13)


# --------------------------------------------------------------------------------------------- a method in three parts


class Halfway(flower.Strategy):
    """Wraps a strategy and goes only a part of its way."""

    def __init__(self, inner, part):
        self.inner, self.part = inner, part

    def configure_train(self, server_round, arrays, config, grid):
        self.before = messages.unpack(arrays)
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = self.inner.aggregate_train(server_round, replies)
        after = messages.unpack(arrays)
        part_of_it = {name: w + self.part * (after[name] - w) for name, w in self.before.items()}
        return messages.pack(part_of_it), metrics

    def configure_evaluate(self, server_round, arrays, config, grid):
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round, replies):
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self):
        self.inner.summary()


class ScaledGradients(L.Callback):
    def __init__(self, factor):
        self.factor = factor

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for p in pl_module.parameters():
            p.grad.mul_(self.factor)


class Timid(FederatedCallback):
    """Halves gradients, sends a quarter of the update, and takes four fifths of that at the server."""

    def __init__(self):
        self.stages = []

    def server_strategy(self, strategy):
        return Halfway(strategy, 0.8)

    def client_mods(self, stage):
        self.stages.append(stage)

        def quarter(message, context, call_next):
            got = {name: a.numpy() for name, a in next(iter(message.content.array_records.values())).items()}
            reply = call_next(message, context)
            if stage == "train":
                sent = reply.content["arrays"]
                scaled = {name: got[name] + 0.25 * (a.numpy() - got[name]) for name, a in sent.items()}
                reply.content["arrays"] = ArrayRecord({name: plain.array(w) for name, w in scaled.items()})
            return reply

        return [quarter]

    def local_callbacks(self):
        return [ScaledGradients(0.5)]


def test_a_method_s_three_parts_act_at_server_wire_and_client():
    method = Timid()
    # Half the gradient is half the learning rate; the other two factors scale the mean update.
    assert_close(federated(method), by_hand(plain.Momentum(0.8 * 0.25, 0.0), lr=0.05))
    assert sorted(method.stages) == ["evaluate", "train"]


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_method_wraps_whatever_decides_the_aggregation_in_any_order(order):
    callbacks = [FedAvgM(learning_rate=0.7, momentum=0.6), Timid()]
    ours = federated(*(callbacks if order == "after" else callbacks[::-1]))

    class Server(plain.Momentum):
        def step(self, name, x, delta):
            return x + 0.8 * (super().step(name, x, 0.25 * delta) - x)

    assert_close(ours, by_hand(Server(0.7, 0.6), lr=0.05))


def test_each_part_of_a_method_works_alone():
    class Server(Timid):
        client_mods, local_callbacks = FederatedCallback.client_mods, FederatedCallback.local_callbacks

    class Wire(Timid):
        server_strategy, local_callbacks = FederatedCallback.server_strategy, FederatedCallback.local_callbacks

    class Local(Timid):
        server_strategy, client_mods = FederatedCallback.server_strategy, FederatedCallback.client_mods

    assert_close(federated(Server()), by_hand(plain.Momentum(0.8, 0.0)))
    assert_close(federated(Wire()), by_hand(plain.Momentum(0.25, 0.0)))
    assert_close(federated(Local()), by_hand(plain.TakeMean(), lr=0.05))


def test_mods_run_outermost_first_in_the_order_of_callbacks():
    calls = []

    class Said(FederatedCallback):
        def __init__(self, *names):
            self.names = names

        def client_mods(self, stage):
            def mod(name):
                def run(message, context, call_next):
                    calls.append(f"{name} in")
                    reply = call_next(message, context)
                    calls.append(f"{name} out")
                    return reply

                return run

            return [mod(name) for name in self.names]

    class One(Said):
        pass

    class Two(Said):
        pass

    federated(One("a", "b"), Two("c"), rounds=1)
    assert calls == ["a in", "b in", "c in", "c out", "b out", "a out"] * 3


def test_a_mod_sees_neither_integers_nor_metric_states():
    seen = []

    class Looking(FederatedCallback):
        def client_mods(self, stage):
            def look(message, context, call_next):
                reply = call_next(message, context)
                for content in (message.content, reply.content):
                    seen.append((list(content), {a.dtype for r in content.array_records.values() for a in r.values()}))
                return reply

            return [look]

    module = Everything()
    data = ClientData([(everything_loader(), everything_loader())])
    FederatedTrainer(max_rounds=1, callbacks=[data, Looking()], **QUIET).fit(module)
    keys = [["arrays", "config"], ["arrays", "metrics"], ["arrays", "config"], ["metrics"]]
    assert [key for key, _ in seen] == keys
    assert [dtypes for _, dtypes in seen] == [{"float32"}, {"float32"}, {"float32"}, set()]


def test_an_own_aggregation_takes_the_place_of_fedavg():
    class First(FederatedCallback):
        """The first client is always right."""

        decides = frozenset({"aggregation"})

        def server_strategy(self, strategy):
            assert strategy is None

            class TakeFirst(flower.FedAvg):
                def aggregate_train(self, server_round, replies):
                    contents = [reply.content for reply in replies]
                    return contents[0]["arrays"], contents[0]["metrics"]

            return TakeFirst()

    data = [list(client_loaders()[0])]
    how = {"rounds": 3, "server": plain.TakeMean(), "epochs": 1, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    assert_close(federated(First()), plain.federate(network(), data, **how))


def test_a_strategy_wrapped_without_a_state_dict_of_its_own_resumes_with_the_inner_one_s_moments(tmp_path):
    def method():
        return [FedAdam(learning_rate=0.1, beta_1=0.8, beta_2=0.6, tau=0.05), Timid()]

    whole = federated(*method(), rounds=4)
    arguments = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    federated(*method(), ModelCheckpoint(tmp_path, save_last=True), rounds=2, **arguments)
    module = Classifier(network())
    callbacks = [ClientData(client_loaders()), *method(), ModelCheckpoint(tmp_path, save_last=True)]
    trainer = FederatedTrainer(max_rounds=4, seed=0, callbacks=callbacks, **{**QUIET, **arguments})
    trainer.fit(module, ckpt_path="last")
    assert trainer.current_epoch == 4
    for name, value in whole.items():
        assert torch.equal(module.net.state_dict()[name], value), name


# ------------------------------------------------------------------------------------------------------- two deciders


class OwnAggregation(FederatedCallback):
    decides = frozenset({"aggregation"})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FedAvg(), FedAdam()),
        (FedAvg(), OwnAggregation()),
        (FlowerStrategy(flower.FedAvg()), FedAvgM()),
        (FedAvg(), FedAvg()),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_two_aggregations_are_an_error_that_names_both(first, second):
    both = f"{type(first).__name__} and {type(second).__name__} both decide the aggregation"
    with pytest.raises(ConfigurationError, match=both):
        FederatedTrainer(max_rounds=1, num_clients=2, callbacks=[first, second], **QUIET)


def test_a_method_that_forgets_to_return_the_strategy_is_an_error_that_names_it():
    class Forgetful(FederatedCallback):
        def server_strategy(self, strategy):
            Halfway(strategy, 0.5)

    with pytest.raises(ConfigurationError, match=re.escape("Forgetful.server_strategy() gave no strategy")):
        federated(FedAvg(), Forgetful())


def test_an_aggregation_that_gives_no_strategy_is_an_error_that_names_it():
    with pytest.raises(ConfigurationError, match=re.escape("OwnAggregation.server_strategy() gave no strategy")):
        federated(OwnAggregation())


# ------------------------------------------------------------------------------------------------------------- engines


class Watched(Engine):
    """An engine of one's own around the in-process one."""

    name = "watched"

    def __init__(self):
        self.events = []

    def run(self, main, client_app, num_clients):
        def watched_main(grid):
            self.events.append(f"main with {num_clients()} clients")
            return main(grid)

        def watched_app(message, context):
            self.events.append(message.metadata.message_type)
            return client_app(message, context)

        try:
            return InProcess().run(watched_main, watched_app, num_clients)
        finally:
            self.events.append("done")


class Foreign(Engine):
    """Hands over a grid that is none of ours."""

    name = "foreign"

    def run(self, main, client_app, num_clients):
        with plain.flower_identity():
            return main(plain.ForeignGrid(client_app, num_clients()))


def test_an_own_engine_runs_the_clients():
    engine = Watched()
    ours, theirs = federated(FedAvgM(), engine=engine, rounds=2), federated(FedAvgM(), rounds=2)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert engine.events == ["main with 3 clients", *["train"] * 6, "done"]


def test_an_engine_with_a_foreign_grid_gives_bitwise_the_same():
    ours, theirs = federated(FedAvgM(), engine=Foreign()), federated(FedAvgM())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_engine_ends_also_when_a_client_fails():
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            raise LookupError("no such thing")

    engine = Watched()
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(client_loaders())], engine=engine, **QUIET)
    with pytest.raises(ClientError, match="LookupError: no such thing"):
        trainer.fit(Failing(network()))
    assert engine.events == ["main with 3 clients", "train", "done"]


# ------------------------------------------------------------------------------------------ the apps on another's grid


class Everything(L.LightningModule):
    """Layers built in ``configure_model``, BatchNorm, Dropout, noise, a metric with list states."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain, self.net = gain, None
        self.auroc = MulticlassAUROC(3, thresholds=None)

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
            with torch.no_grad():
                for p in self.net.parameters():
                    p.copy_(self.gain * torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view_as(p))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.auroc.update(logits.softmax(1), batch[1])
        self.log("auroc", self.auroc)
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def everything_loader(count=64, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, drop_last=True)


def everything_trainer(**arguments):
    history = History()
    callbacks = [Partition(4, val_fraction=0.25), PartialParticipation(0.5, 0.75), FedAdam(), history]
    trainer = FederatedTrainer(max_rounds=3, local_epochs=2, seed=8, callbacks=callbacks, **{**QUIET, **arguments})
    return trainer, history


@pytest.mark.parametrize("client_state", sweep(["global", "reset", "carry"], ["carry"]))
def test_the_apps_on_a_foreign_grid_give_what_fit_gives(client_state):
    trainer, expected = everything_trainer(client_state=client_state)
    ours = Everything()
    trainer.fit(ours, everything_loader(), val_dataloaders=everything_loader(16, seed=6))

    # As in two processes: another trainer and another instance of the module, with other weights at first. Only the
    # clients have training data.
    server, history = everything_trainer(client_state=client_state)
    clients, _ = everything_trainer(client_state=client_state)
    theirs = Everything()
    server_app = server.server_app(theirs, val_dataloaders=everything_loader(16, seed=6))
    client_app = clients.client_app(Everything(gain=-7.0), everything_loader())
    with plain.flower_identity():
        server_app(plain.ForeignGrid(client_app, 4, seed=1), Context(7, 1, {}, RecordDict(), {}))

    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    assert len(expected.rows) == 3
    assert {"train_loss", "clients/auroc", "auroc"} <= set(expected.rows[0])
    assert history.rows == expected.rows


class Split(L.LightningDataModule):
    """Splits at random in ``setup``, with torch's global random state."""

    def setup(self, stage):
        self.train, self.val = random_split(everything_loader().dataset, [48, 16])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=8)


@pytest.mark.parametrize("outside", [1, 2])
def test_a_random_split_in_a_datamodule_is_the_same_at_server_and_clients(outside):
    trainer, expected = everything_trainer()
    ours, theirs = Everything(), Everything()
    trainer.fit(ours, datamodule=Split())

    server, history = everything_trainer()
    client_app = everything_trainer()[0].client_app(Everything(), datamodule=Split())
    with isolate_rng(), plain.flower_identity():
        torch.manual_seed(outside)
        server.server_app(theirs, datamodule=Split())(
            plain.ForeignGrid(client_app, 4), Context(7, 1, {}, RecordDict(), {})
        )
    assert all(torch.equal(theirs.state_dict()[name], value) for name, value in ours.state_dict().items())
    assert history.rows == expected.rows


def test_a_module_is_set_up_once_in_a_process_of_clients_and_keeps_what_it_built():
    calls = []

    class Counting(Everything):
        def setup(self, stage):
            calls.append("setup for fit" if stage == "fit" else "setup")
            self.scale = 2.0

        def configure_model(self):
            calls.append("build" if self.net is None else "keep")
            super().configure_model()

        def training_step(self, batch, batch_idx):
            return self.scale * super().training_step(batch, batch_idx)

    clients = Counting()
    server = FederatedTrainer(max_rounds=2, seed=0, callbacks=[Partition(3)], **QUIET)
    client_app = FederatedTrainer(max_rounds=2, seed=0, callbacks=[Partition(3)], **QUIET).client_app(
        clients, everything_loader()
    )
    with plain.flower_identity():
        server.server_app(Everything())(plain.ForeignGrid(client_app, 3), Context(7, 1, {}, RecordDict(), {}))
    assert calls == ["setup for fit", "build", *["keep"] * 6]
    assert type(clients) is Counting


def test_a_client_that_raises_on_a_foreign_grid_is_named_with_its_traceback():
    class Failing(Everything):
        def training_step(self, batch, batch_idx):
            if self.trainer.client_id == 1:
                raise LookupError("no such thing")
            return super().training_step(batch, batch_idx)

    server, clients = (FederatedTrainer(max_rounds=1, seed=0, callbacks=[Partition(3)], **QUIET) for _ in range(2))
    grid = plain.ForeignGrid(clients.client_app(Failing(), everything_loader()), 3)
    with plain.flower_identity(), pytest.raises(ClientError, match=r"client 1 raised LookupError: no such") as caught:
        server.server_app(Everything())(grid, Context(7, 1, {}, RecordDict(), {}))
    assert (caught.value.client, caught.value.round, caught.value.stage) == (1, 1, "train")
    assert "in training_step" in str(caught.value)


def test_a_second_copy_of_the_module_on_a_foreign_grid_is_left_alone_by_the_server():
    clients, module = everything_trainer()[0], Everything()
    untouched = copy.deepcopy(module)
    server_app = everything_trainer()[0].server_app(module)
    client_app = clients.client_app(Everything(), everything_loader())
    with plain.flower_identity():
        server_app(plain.ForeignGrid(client_app, 4), Context(7, 1, {}, RecordDict(), {}))
    assert type(module) is Everything
    assert untouched.net is None
    assert not any(torch.equal(a, torch.zeros_like(a)) for a in module.net[0].parameters())


# -------------------------------------------------------------------------------------- engines and names of one's own


class Wrapped:
    """A grid around another, as one writes to log or to delay what goes through it."""

    def __init__(self, grid):
        self.__dict__["grid"] = grid

    def __getattr__(self, name):
        return getattr(self.grid, name)


class WrapsItsGrid(InProcess):
    def run(self, main, client_app, num_clients):
        return super().run(lambda grid: main(Wrapped(grid)), client_app, num_clients)


def test_a_grid_that_hides_what_it_can_do_is_refused_with_the_way_out():
    with pytest.raises(ConfigurationError, match=r"a Wrapped around one of ours.*engines\.base\.LocalGrid"):
        federated(engine=WrapsItsGrid())


class DealsItsWay(FederatedCallback):
    decides = frozenset({"partition"})


def test_a_partition_of_one_s_own_is_told_its_base():
    with pytest.raises(ConfigurationError, match=r"DealsItsWay decides the partition: derive it from .*PartitionOwner"):
        FederatedTrainer(max_rounds=1, callbacks=[DealsItsWay()])


class SaysWhatIsABatch(Classifier):
    """Its method has a name that nobody would think is taken."""

    def is_batch(self, value):
        return isinstance(value, list)

    def validation_step(self, batch, batch_idx):
        self.log("is_batch", float(self.is_batch(batch[0])))


def test_a_module_s_own_methods_are_its_own_under_the_server_s_view():
    trainer = FederatedTrainer(max_rounds=1, callbacks=[ClientData(client_loaders())], **QUIET)
    trainer.fit(SaysWhatIsABatch(network()), val_dataloaders=client_loaders()[0])
    assert trainer.callback_metrics["is_batch"] == 0.0


class Delegates(FederatedCallback):
    """A strategy around another that does as it does."""

    def server_strategy(self, strategy):
        return Around(strategy)


class Around(flower.Strategy):
    def __init__(self, inner):
        self.inner = inner

    def configure_train(self, *arguments):
        return self.inner.configure_train(*arguments)

    def aggregate_train(self, *arguments):
        return self.inner.aggregate_train(*arguments)

    def configure_evaluate(self, *arguments):
        return self.inner.configure_evaluate(*arguments)

    def aggregate_evaluate(self, *arguments):
        return self.inner.aggregate_evaluate(*arguments)

    def summary(self):
        self.inner.summary()


class Counts(Classifier):
    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("steps", torch.tensor(0))

    def on_train_batch_end(self, *arguments):
        self.steps += 10


def test_integers_are_weighed_as_the_strategy_within_weighs():
    steps = []
    for callbacks in ([FedAvg(weighting="uniform")], [FedAvg(weighting="uniform"), Delegates()], [FedAvg()]):
        module = Counts(network())
        FederatedTrainer(max_rounds=1, callbacks=[ClientData(client_loaders()), *callbacks], **QUIET).fit(module)
        steps.append(int(module.steps))
    assert steps[0] == steps[1] != steps[2]
