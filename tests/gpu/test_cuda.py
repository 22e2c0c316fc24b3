"""On a CUDA device: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import gc
import socket
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, DeviceSpeed, FedAdam, FedAsync, FedBuff, History, Partition
from lightning_fed.callbacks.base import CohortOwner
from lightning_fed.engines import transport
from lightning_fed.testing import ToyModule, toy_data

pytestmark = pytest.mark.gpu


def fit(accelerator: str, *methods: Any, **kwargs: Any) -> tuple[FederatedTrainer, ToyModule]:
    torch.manual_seed(0)
    module = ToyModule()
    trainer = FederatedTrainer(
        max_rounds=3,
        callbacks=[Partition(3, val_fraction=0.2), *(methods or [FedAdam(learning_rate=0.01)])],
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(module, DataLoader(toy_data(), batch_size=8, shuffle=True), DataLoader(toy_data(seed=1), batch_size=32))
    return trainer, module.cpu()


def test_cuda_gives_what_the_cpu_gives() -> None:
    cpu, cpu_module = fit("cpu")
    cuda, cuda_module = fit("cuda")
    torch.testing.assert_close(dict(cuda_module.state_dict()), dict(cpu_module.state_dict()), rtol=1e-3, atol=1e-5)
    for name in ("train_loss", "val_loss", "clients/val_loss"):
        assert cuda.callback_metrics[name].item() == pytest.approx(cpu.callback_metrics[name].item(), rel=1e-3)


@pytest.mark.parametrize("method", [lambda: FedBuff(3, 2), lambda: FedAsync(3)], ids=["FedBuff", "FedAsync"])
@pytest.mark.parametrize("how", [{}, {"engine": "processes"}, {"vectorize_clients": True}], ids=str)
def test_asynchronous_training_gives_what_the_cpu_gives(method: Any, how: dict[str, Any]) -> None:
    _, cpu = fit("cpu", method(), DeviceSpeed([0.1, 0.2, 0.7]), seed=0)
    trainer, cuda = fit("cuda", method(), DeviceSpeed([0.1, 0.2, 0.7]), seed=0, **how)
    assert trainer.callback_metrics["staleness/mean"] >= 0
    torch.testing.assert_close(dict(cuda.state_dict()), dict(cpu.state_dict()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains(precision: str) -> None:
    trainer, module = fit("cuda", precision=precision)
    assert trainer.global_step == 3
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_other_engines_give_what_one_process_gives(engine: str) -> None:
    _, one = fit("cuda")
    trainer, other = fit("cuda", engine=engine, clients_per_device=2)
    assert trainer.global_step == 3
    torch.testing.assert_close(dict(other.state_dict()), dict(one.state_dict()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compiles", [False, True])
def test_clients_trained_as_one_give_what_each_gives_alone(compiles: bool) -> None:
    _, one = fit("cuda")
    trainer, other = fit("cuda", vectorize_clients="require", compile_clients=compiles)
    assert trainer.global_step == 3
    torch.testing.assert_close(dict(other.state_dict()), dict(one.state_dict()), rtol=1e-3, atol=1e-5)


def test_clients_do_not_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: moved.append("empty_cache"))
    monkeypatch.setattr(ToyModule, "cpu", lambda self: moved.append("cpu") or super(ToyModule, self).cpu())
    _, module = fit("cuda")
    # Once at the end of the run, and once in the line above.
    assert moved.count("cpu") <= 2
    assert moved.count("empty_cache") <= 3  # the server's, as of any fit: when it is set up, has resumed, is torn down
    assert not any(value.is_cuda for value in module.state_dict().values())


def test_memory_is_returned() -> None:
    held = []
    for _ in range(3):
        fit("cuda")
        gc.collect()  # trainers are in cycles
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1] <= held[0], held


class Habits(ToyModule):
    """State on the device, where one client may leave it to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("extra", torch.ones(1), persistent=False)
        self.register_buffer("large", torch.ones(300_000), persistent=False)
        self.kept: list[torch.Tensor] = []
        self.generator: torch.Generator | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.generator is None:
            self.generator = torch.Generator(self.device)
        self.extra = self.extra * 1.1
        self.large.mul_(1.01)
        self.kept.append(batch[0].mean().detach())
        noise = torch.randn(batch[0].shape, generator=self.generator, device=self.device)
        x = batch[0] * self.extra * self.large.mean() + sum(self.kept) + noise + torch.randn_like(batch[0])
        return super().training_step((x, batch[1]), batch_idx)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_client_finds_the_device_as_the_first_one_did(order: list[int]) -> None:
    def run(clients: list[int]) -> dict[int, dict[str, float]]:
        torch.manual_seed(0)
        history = History(per_client=True)
        data = ClientData([DataLoader(toy_data(24, seed=seed), 8) for seed in range(3)])
        options = {"logger": False, "enable_checkpointing": False, "deterministic": True}
        FederatedTrainer(
            max_rounds=1, callbacks=[data, Chosen(clients), history], accelerator="cuda", devices=1, **options
        ).fit(Habits())
        return {row["client"]: row["train_loss"] for row in history.clients}

    together, alone = run(order), {}
    for client in order:
        alone |= run([client])
    assert together == alone


class Chosen(CohortOwner):
    """Takes the clients that it is told."""

    def __init__(self, clients: list[int]) -> None:
        self.clients = clients

    def sample(self, stage: Any, round: int, num_clients: int, seed: int) -> list[int]:
        return self.clients


def test_what_is_sent_of_a_device_arrives_as_it_was() -> None:
    sent = [torch.full((1 << size,), float(size), device="cuda") for size in range(4, 20)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport.transmit(ours, transport.dump(sent))
        arrived = transport.receive(theirs)
    for tensor, own in zip(arrived, sent, strict=True):
        torch.testing.assert_close(tensor, own.cpu(), rtol=0, atol=0)
