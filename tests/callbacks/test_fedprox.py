"""FedProx adds the exact gradient of mu/2 ||w - w_t||^2, before clipping, with any optimizer."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FedProx
from lightning_fed.callbacks.fedprox import ProximalTerm
from lightning_fed.errors import ConfigurationError
from lightning_fed.testing import ToyModule, toy_data
from tests import references
from tests.helpers import QUIET

MU = 0.7


class Net(LightningModule):
    """A loss in which every parameter plays a part; the term is added by autograd if ``augmented``."""

    def __init__(self, optimizer, augmented: bool, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.make, self.augmented = optimizer, augmented
        self.automatic_optimization = not manual

    def on_train_start(self) -> None:
        self.start = {k: p.detach().clone() for k, p in self.named_parameters()}

    def loss(self, batch):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.augmented:
            loss = loss + MU / 2 * sum(((p - self.start[k]) ** 2).sum() for k, p in self.named_parameters())
        return loss

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return self.make([p for p in self.parameters() if p.requires_grad])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
}
TRAINERS = {
    "plain": {},
    "clip-norm": {"gradient_clip_val": 0.05},
    "clip-value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 3},
}


def trained(optimizer, augmented, manual=False, **trainer):
    module = Net(OPTIMIZERS[optimizer], augmented, manual)
    callbacks = [] if augmented else FedProx(MU).local_callbacks()
    trainer = Trainer(max_epochs=3, callbacks=callbacks, **QUIET, **trainer)
    trainer.fit(module, DataLoader(toy_data(48), batch_size=8))
    return module


@pytest.mark.parametrize(
    ("optimizer", "trainer"),
    [
        *((optimizer, "plain") for optimizer in OPTIMIZERS),
        *(("sgd", trainer) for trainer in TRAINERS if trainer != "plain"),
        ("adam", "clip-norm"),
    ],
)
def test_training_is_that_of_the_augmented_loss_by_autograd(optimizer, trainer):
    ours = trained(optimizer, augmented=False, **TRAINERS[trainer])
    expected = trained(optimizer, augmented=True, **TRAINERS[trainer])
    for (name, a), b in zip(ours.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    without = Net(OPTIMIZERS[optimizer], augmented=False)
    Trainer(max_epochs=3, **QUIET, **TRAINERS[trainer]).fit(without, DataLoader(toy_data(48), batch_size=8))
    assert not torch.allclose(ours.net[0].weight, without.net[0].weight, rtol=1e-2)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_manual_optimization_gets_the_term_too(optimizer):
    ours, expected = trained(optimizer, False, manual=True), trained(optimizer, True, manual=True)
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-6)


def test_gradient_that_the_optimizer_sees_is_the_papers():
    # Three SGD steps on fixed gradients: w_{i+1} = w_i - lr (g + mu (w_i - w_t)).
    class Linear(LightningModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, -2.0]))

        def training_step(self, batch, batch_idx):
            return (self.w * batch[0][0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    gradients = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.25, -1.0]])
    module = Linear()
    loader = DataLoader(TensorDataset(gradients), batch_size=1)
    Trainer(max_epochs=1, callbacks=[ProximalTerm(MU)], **QUIET).fit(module, loader)
    w_t = w = {"w": torch.tensor([1.0, -2.0])}
    for g in gradients:
        w = {"w": w["w"] - 0.1 * references.fedprox_gradient({"w": g}, w, w_t, MU)["w"]}
    torch.testing.assert_close(module.w.detach(), w["w"])


def test_sparse_gradients_get_the_term_too():
    class Sparse(LightningModule):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(5, 3, sparse=sparse)

        def training_step(self, batch, batch_idx):
            return self.embedding(batch[0]).pow(2).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    modules = [Sparse(sparse) for sparse in (True, False)]
    for module in modules:
        loader = DataLoader(TensorDataset(torch.tensor([0, 3, 3, 1])), batch_size=2)
        Trainer(max_epochs=2, callbacks=[ProximalTerm(MU)], **QUIET).fit(module, loader)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


def test_each_of_several_optimizers_gets_the_term_for_its_own_parameters_only():
    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.manual_backward(self.a.sum() + self.b.sum())
            first.step()
            first.zero_grad()
            second.step()
            second.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD([p], lr=lr) for p, lr in ((self.a, 0.1), (self.b, 0.2))]

    module = Two()
    loader = DataLoader(TensorDataset(torch.zeros(2)), batch_size=1)
    Trainer(max_epochs=1, callbacks=[ProximalTerm(1.0)], **QUIET).fit(module, loader)
    # w1 = -lr, w2 = w1 - lr (1 + w1)
    assert module.a.item() == pytest.approx(-0.1 - 0.1 * 0.9)
    assert module.b.item() == pytest.approx(-0.2 - 0.2 * 0.8)


def test_logged_loss_is_without_the_term():
    module = Net(OPTIMIZERS["sgd"], augmented=False)
    trainer = Trainer(max_epochs=1, callbacks=[ProximalTerm(1e6)], gradient_clip_val=1e-9, **QUIET)
    trainer.fit(module, DataLoader(toy_data(40), batch_size=40))
    with torch.no_grad():
        loss = module.loss(toy_data(40)[:])
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_anchor_is_let_go_also_when_training_fails():
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            raise ValueError("no")

    for module_class in (Net, Failing):
        term = ProximalTerm(MU)
        trainer = Trainer(max_epochs=1, callbacks=[term], **QUIET)
        module = module_class(OPTIMIZERS["sgd"], augmented=False)
        if module_class is Failing:
            with pytest.raises(ValueError, match="no"):
                trainer.fit(module, DataLoader(toy_data(8)))
        else:
            trainer.fit(module, DataLoader(toy_data(8)))
        assert term._anchor == {}


def test_federated_run_is_the_papers_over_unequal_clients_and_rounds(quiet):
    sizes = (8, 40, 16)
    data = [toy_data(size, seed=i) for i, size in enumerate(sizes)]
    torch.manual_seed(0)
    module = ToyModule(lr=0.5)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    plain.load_state_dict(module.net.state_dict())
    batches = [[[batch for _ in range(2) for batch in DataLoader(d, batch_size=8)] for d in data]] * 3
    expected = references.plain_federated_sgd(
        plain, batches, sizes, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), lr=0.5, mu=MU
    )
    loaders = [DataLoader(d, batch_size=8) for d in data]
    trainer = FederatedTrainer(max_rounds=3, local_epochs=2, callbacks=[ClientData(loaders), FedProx(MU)], **quiet)
    trainer.fit(module)
    torch.testing.assert_close(dict(module.net.state_dict()), expected[-1], rtol=1e-5, atol=1e-6)


def test_term_of_one_client_does_not_reach_the_next():
    first, second = FedProx(MU).local_callbacks(), FedProx(MU).local_callbacks()
    assert first[0] is not second[0]


def test_mu_of_zero_changes_nothing_bitwise():
    def weights(callbacks):
        module = Net(OPTIMIZERS["adam"], augmented=False)
        Trainer(max_epochs=2, callbacks=callbacks, **QUIET).fit(module, DataLoader(toy_data(40), batch_size=8))
        return module.net[0].weight

    assert torch.equal(weights([ProximalTerm(0.0)]), weights([]))


@pytest.mark.parametrize("mu", [-0.1, float("nan")])
def test_negative_mu_is_refused(mu):
    with pytest.raises(ConfigurationError, match=r"FedProx: mu=.* must be (a finite number )?>= 0"):
        FedProx(mu)
