"""What a user would pick for a workload: each peer is a function that runs it in the peer's own best way.

``python benchmarks/peers.py W1 loop --threads 1`` runs one, in this process, and prints its times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from common import SEED, Clock, Workload
from torch import Tensor, nn
from workloads import WORKLOADS

DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "accelerator": DEVICE,
    "devices": 1,
}


def batches(w: Workload, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(w.local_epochs):
        for part in torch.randperm(len(x), device=x.device).split(w.batch):
            yield x[part], y[part]


def train(w: Workload, module: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = w.optimizer(module)
    for inputs, targets in batches(w, x.to(DEVICE), y.to(DEVICE)):
        optimizer.zero_grad()
        w.loss(module(inputs), targets).backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------------ bare PyTorch


def loop(w: Workload, clock: Clock, average: bool = True) -> float:
    """A bare PyTorch loop."""
    module, metric = w.initial().to(DEVICE), float("nan")
    clock.start()
    for round in range(1, w.rounds + 1):
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        mean: dict[str, Tensor] = {}
        for client in sorted(random.Random(f"{SEED}/{round}").sample(range(w.population), w.cohort)):
            if average:
                module.load_state_dict(before)
            train(w, module, *w.client(client))
            if average:
                for name, tensor in module.state_dict().items():
                    mean[name] = mean.get(name, 0) + tensor.detach() / w.cohort
        if average:
            module.load_state_dict(mean)
        if w.due(round):
            metric = w.evaluate(module)
        clock.lap()
    return metric


def steps(w: Workload, clock: Clock) -> float:
    """The local steps alone: nothing is loaded or averaged."""
    return loop(w, clock, average=False)


# -------------------------------------------------------------------------------------------------------- Lightning


def lit(w: Workload, module: nn.Module) -> Any:
    import lightning as L

    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = w.loss(self.net(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("metric", w.metric(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return w.optimizer(self)

    return Lit()


def loaders(w: Workload) -> tuple[Callable[[int], Any], Any]:
    from torch.utils.data import DataLoader, TensorDataset

    def client(k: int) -> Any:
        return DataLoader(TensorDataset(*w.client(k)), batch_size=w.batch, shuffle=True)

    return client, DataLoader(TensorDataset(*w.test()), batch_size=1000)


def laps(clock: Clock) -> Any:
    import lightning as L

    class Laps(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            clock.start()

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch:
                clock.lap()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            clock.lap()

    return Laps()


def central(w: Workload, clock: Clock) -> float:
    """A central Lightning Trainer that does the same number of steps on the pooled data."""
    import lightning as L
    from torch.utils.data import DataLoader, TensorDataset

    parts = [w.client(k) for k in range(w.population)]
    pooled = TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    module = lit(w, w.initial())
    trainer = L.Trainer(max_epochs=w.rounds, check_val_every_n_epoch=w.evaluate_every, callbacks=[laps(clock)], **QUIET)
    trainer.fit(module, DataLoader(pooled, batch_size=w.batch, shuffle=True), loaders(w)[1])
    return float(trainer.callback_metrics.get("metric", float("nan")))


def ours(w: Workload, clock: Clock, engine: str = "in_process", **more: Any) -> float:
    """lightning_fed, in one process."""
    from lightning_fed import FederatedTrainer
    from lightning_fed.callbacks import ClientData, FedAvg, PartialParticipation

    client, test = loaders(w)
    module = lit(w, w.initial())
    trainer = FederatedTrainer(
        max_rounds=w.rounds,
        local_epochs=w.local_epochs,
        engine=engine,
        seed=SEED,
        check_val_every_n_epoch=w.evaluate_every,
        callbacks=[
            laps(clock),
            ClientData(client, num_clients=w.population),
            PartialParticipation(fraction_train=w.cohort / w.population, fraction_evaluate=0),
            FedAvg(weighting="uniform" if w.uniform else "examples"),
        ],
        **more,
        **QUIET,
    )
    trainer.fit(module, val_dataloaders=test)
    return float(trainer.callback_metrics.get("metric", float("nan")))


def ours_processes(w: Workload, clock: Clock) -> float:
    """lightning_fed, in a process for each core."""
    return ours(w, clock, "processes")


def ours_vectorized(w: Workload, clock: Clock) -> float:
    """lightning_fed, vectorized clients, in one process."""
    return ours(w, clock, vectorize_clients="require")


def ours_processes_vectorized(w: Workload, clock: Clock) -> float:
    """lightning_fed, vectorized clients, in a process for each core."""
    return ours(w, clock, "processes", vectorize_clients="require")


def ours_compiled(w: Workload, clock: Clock) -> float:
    """lightning_fed, vectorized clients, compiled, in one process."""
    return ours(w, clock, vectorize_clients="require", compile_clients=True)


def ours_processes_compiled(w: Workload, clock: Clock) -> float:
    """lightning_fed, vectorized clients, compiled, in a process for each core."""
    return ours(w, clock, "processes", vectorize_clients="require", compile_clients=True)


# --------------------------------------------------------------------------------------------------- Flower on Ray


@lru_cache(maxsize=4096)
def _flower_client(name: str, k: int) -> tuple[Tensor, Tensor]:
    return WORKLOADS[name]().client(k)


def flower(w: Workload, clock: Clock, lightning: bool = False) -> float:
    """Flower's simulation on Ray with a bare PyTorch client."""
    for name in ("RAY_USAGE_STATS_ENABLED", "FLWR_TELEMETRY_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        os.environ.setdefault(name, "0")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    from flwr.app import ArrayRecord, Context, Message, MetricRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    name, client, server = w.name, ClientApp(), ServerApp()
    done: list[float] = []

    @client.train()
    def fit(message: Message, context: Context) -> Message:
        return _flower_fit(name, lightning, message, context)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
            if round == 0:
                clock.start()
                return MetricRecord({})
            if w.due(round):
                module = w.initial()
                module.load_state_dict(arrays.to_torch_state_dict())
                done[:] = [w.evaluate(module)]
            clock.lap()
            return MetricRecord({})

        share = w.cohort / w.population
        strategy = FedAvg(fraction_train=share, fraction_evaluate=0.0, min_train_nodes=w.cohort, min_available_nodes=2)
        initial = ArrayRecord(w.initial().state_dict())
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=w.rounds, evaluate_fn=evaluate)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0 if DEVICE == "cpu" else 0.1}}
    run_simulation(server_app=server, client_app=client, num_supernodes=w.population, backend_config=resources)
    return done[0] if done else float("nan")


def _flower_fit(name: str, lightning: bool, message: Any, context: Any) -> Any:
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    torch.set_num_threads(1)
    w = WORKLOADS[name]()
    module = w.model().to(DEVICE)
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = _flower_client(name, int(context.node_config["partition-id"]))
    if lightning:
        import lightning as L
        from torch.utils.data import DataLoader, TensorDataset

        data = DataLoader(TensorDataset(x, y), batch_size=w.batch, shuffle=True)
        L.Trainer(max_epochs=w.local_epochs, **QUIET).fit(lit(w, module), data)
    else:
        train(w, module, x, y)
    content = {"arrays": ArrayRecord(module.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
    return Message(content=RecordDict(content), reply_to=message)


def flower_lightning(w: Workload, clock: Clock) -> float:
    """Flower's simulation on Ray with a Lightning client, as its quickstart has it, logger and checkpoints off."""
    return flower(w, clock, lightning=True)


# --------------------------------------------------------------------------------------------------- pfl-research


def pfl(w: Workload, clock: Clock) -> float:
    """Apple's pfl-research with its simulated backend."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints, WeightByUser
    from pfl.algorithm import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = w.initial()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
            self.train(not eval)
            return w.loss(self(x), y)

        def metrics(self, x: Tensor, y: Tensor, eval: bool = True) -> dict[str, Any]:
            return {"loss": Weighted(0.0, len(y))}

    net = Net()
    last = [float("nan")]

    class Laps(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            if w.due(central_iteration + 1):
                last[0] = w.evaluate(net.net)
            clock.lap()
            return False, Metrics()

    @lru_cache(maxsize=None if w.population < 10_000 else 1)
    def user(k: int) -> Any:
        return Dataset(raw_data=w.client(k), user_id=k)

    data = FederatedDataset(user, MinimizeReuseUserSampler(list(range(w.population))))
    weighting = WeightByUser() if w.uniform else WeightByDatapoints()
    model = PyTorchModel(
        model=net, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(net.parameters(), 1.0)
    )
    clock.start()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=w.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=w.cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=data, val_data=None, postprocessors=[weighting]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=w.lr, local_num_epochs=w.local_epochs, local_batch_size=w.batch
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=1000),
        callbacks=[Laps()],
    )
    return last[0]


# ------------------------------------------------------------------------------------------------------------- JAX


def jax(w: Workload, clock: Clock) -> float:
    """W2 alone: one jitted step in flax and optax, Python loops over clients and epochs."""
    import flax.linen as fnn
    import jax
    import jax.numpy as jnp
    import optax
    from flax.training.train_state import TrainState

    class Net(fnn.Module):
        @fnn.compact
        def __call__(self, x: Any) -> Any:
            x = fnn.relu(fnn.Dense(128)(x))
            return fnn.Dense(1)(fnn.relu(fnn.Dense(64)(x)))

    parts = [tuple(jnp.asarray(t.numpy()) for t in w.client(k)) for k in range(w.population)]
    net = Net()
    parameters = net.init(jax.random.PRNGKey(SEED), jnp.ones((1, 1)))["params"]
    state = TrainState.create(apply_fn=net.apply, params=parameters, tx=optax.sgd(w.lr, momentum=w.momentum))

    def loss(parameters: Any, x: Any, y: Any) -> Any:
        return jnp.mean((net.apply({"params": parameters}, x) - y) ** 2)

    @jax.jit
    def step(state: Any, x: Any, y: Any) -> Any:
        return state.apply_gradients(grads=jax.grad(loss)(state.params, x, y))

    @jax.jit
    def average(many: Any) -> Any:
        return jax.tree_util.tree_map(lambda *one: jnp.mean(jnp.stack(one), axis=0), *many)

    @jax.jit
    def everywhere(parameters: Any) -> Any:
        return sum(loss(parameters, x, y) for x, y in parts) / len(parts)

    value = jnp.nan
    clock.start()
    for _ in range(w.rounds):
        trained = []
        for x, y in parts:
            local = state
            for _ in range(w.local_epochs):
                local = step(local, x, y)
            trained.append(local.params)
        state = state.replace(params=average(trained))
        value = float(everywhere(state.params))
        clock.lap()
    return value


PEERS: dict[str, Callable[[Workload, Clock], float]] = {
    "steps": steps, "loop": loop, "central": central, "ours": ours, "ours_processes": ours_processes,
    "ours_vectorized": ours_vectorized, "ours_processes_vectorized": ours_processes_vectorized,
    "ours_compiled": ours_compiled, "ours_processes_compiled": ours_processes_compiled,
    "flower": flower, "flower_lightning": flower_lightning, "pfl": pfl, "jax": jax,
}  # fmt: skip


def version(*names: str) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    random.seed(SEED)
    np.random.seed(SEED)
    w, clock = WORKLOADS[args.workload](), Clock()
    w.rounds = args.rounds or w.rounds
    clock.report(PEERS[args.peer](w, clock))


if __name__ == "__main__":
    import peers  # Ray's workers look for its functions by this name

    peers.main()
