"""Steps and batches come without hooks and labels only where there are none and nobody reads them."""

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_fed._compat.torch import step_of, unlabel


def optimizer(kind=torch.optim.SGD):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 0.5)
    return kind([weight], lr=0.1)


def value(of):
    return of.param_groups[0]["params"][0].detach()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_step_is_the_optimizers(kind):
    one, other = optimizer(kind), optimizer(kind)
    losses = [step_of(one)(closure=lambda: 3.0), other.step(closure=lambda: 3.0)]
    assert losses == [3.0, 3.0]
    assert torch.equal(value(one), value(other))
    assert torch.is_grad_enabled()


def test_steps_of_a_subclass_and_of_its_base_are_its_own():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            super().step()

    one, other = optimizer(Twice), optimizer(Twice)
    step_of(one)()
    other.step()
    assert torch.equal(value(one), value(other))


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_are_called(register):
    heard, one = [], optimizer()
    getattr(one, register)(lambda *args: heard.append(args[0]))
    step_of(one)()
    assert heard == [one]


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_of_all_optimizers_are_called(register):
    heard, one = [], optimizer()
    handle = register(lambda *args: heard.append(args[0]))
    try:
        step_of(one)()
    finally:
        handle.remove()
    assert heard == [one]


def test_schedule_sees_the_step():
    one = optimizer()
    schedule = torch.optim.lr_scheduler.StepLR(one, 1)
    step_of(one)()
    assert one._opt_called
    schedule.step()


def test_what_was_put_around_a_step_is_called(monkeypatch):
    heard, one, step = [], optimizer(), torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: heard.append(self) or step(self, closure))
    step_of(one)()
    assert heard == [one]


def test_profiler_sees_the_label():
    one = optimizer()
    with torch.profiler.profile() as profile:
        step_of(one)()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


class Iterable(IterableDataset):
    def __iter__(self):
        yield from (torch.tensor(float(i)) for i in range(5))


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": True}, {"drop_last": True}, {"batch_size": None}, {"collate_fn": len}], ids=str
)
def test_batches_without_a_label_are_the_loaders(options):
    loader = DataLoader(TensorDataset(torch.arange(10.0)), **{"batch_size": 3, **options})
    batches = []
    for labelled in (True, False):
        torch.manual_seed(0)
        iterator = iter(loader)
        if not labelled:
            unlabel(iterator)
            assert type(iterator).__name__ == "_Unlabelled"
        batches.append((list(iterator), iterator._num_yielded, torch.rand(1)))
    assert repr(batches[0]) == repr(batches[1])


def test_other_iterators_stay_as_they_are():
    for iterator in (iter(DataLoader(Iterable())), iter([1])):
        before = type(iterator)
        unlabel(iterator)
        assert type(iterator) is before


def test_profiler_sees_the_label_of_a_batch():
    iterator = iter(DataLoader(TensorDataset(torch.arange(4.0))))
    unlabel(iterator)
    with torch.profiler.profile() as profile:
        next(iterator)
    assert any("enumerate(DataLoader)" in event.key for event in profile.key_averages())
