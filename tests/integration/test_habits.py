"""A client's work depends on the weights, its data and the seed: not on who trained before it, where, or with whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, History, Partition
from lightning_fed.engines import Engine, InProcess, Processes
from lightning_fed.testing import toy_data
from lightning_fed.values.weights import Weights, read
from tests.habits import DATA_HABITS, LOADERS, MODULE_HABITS, Data, DrawsAtModuleLevel, Habitual, go_together
from tests.helpers import QUIET, LastFirst, sweep

# What the library says of habits is true of each of them, and has tests of its own; those here are about the numbers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* grew in a client's fit:UserWarning"),
    pytest.mark.filterwarnings("ignore:vectorize_clients. .*clients train one after the other:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:.*state_dict\(\) leaves out what trains:UserWarning"),
]

SIZES = (24, 16, 9)


def run(module: Any, data: Any, engine: Engine, rounds: int = 2, **options: Any) -> tuple[Weights, list[Any]]:
    """A short run; its weights and history."""
    history = History(per_client=True)
    loader = None if isinstance(data, ClientData) else data
    owner = data if isinstance(data, ClientData) else Partition(3, val_fraction=0.25)
    trainer = FederatedTrainer(
        max_rounds=rounds, seed=3, engine=engine, callbacks=[owner, history], **{**QUIET, **options}
    )
    trainer.fit(module, loader, DataLoader(toy_data(8, seed=9), 8))
    return read(module), [history.rows, history.clients]


def module(*habits: str) -> Habitual:
    torch.manual_seed(0)
    return Habitual(habits)


def shared_loader(*habits: str) -> DataLoader:
    return DataLoader(Data(toy_data(48), habits), 8, shuffle=True)


def own_loaders(how: str, *habits: str) -> ClientData:
    return ClientData([LOADERS[how](Data(toy_data(size, seed=size), habits)) for size in SIZES])


def made_loaders(how: str, *habits: str) -> ClientData:
    kept = [Data(toy_data(size, seed=size), habits) for size in SIZES]
    return ClientData(lambda client: LOADERS[how](kept[client]), num_clients=len(SIZES))


def same(one: tuple[Weights, list[Any]], other: tuple[Weights, list[Any]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert one[1] == other[1]


@pytest.mark.parametrize("habit", MODULE_HABITS)
def test_what_a_client_leaves_in_the_module_no_other_finds(habit: str) -> None:
    """The other way round each client has other predecessors."""
    same(run(module(habit), shared_loader(), InProcess()), run(module(habit), shared_loader(), LastFirst()))


def groups() -> list[list[str]]:
    """All habits of modules, as many in one module as go together."""
    found: list[list[str]] = []
    for habit in MODULE_HABITS:
        for group in found:
            if len(group) < 8 and go_together([*group, habit]):
                group.append(habit)
                break
        else:
            found.append([habit])
    return found


# What the first client does for good is the same in any order: in workers the others have no predecessor.
@pytest.mark.parametrize(
    "habits",
    sweep([["freezes a weight"], ["turns a square weight"], *groups()], [["freezes a weight"], *groups()[:2]]),
    ids=lambda group: f"{group[0]} and {len(group) - 1} more",
)
def test_nor_does_who_trains_in_another_process(habits: list[str]) -> None:
    same(run(module(*habits), shared_loader(), InProcess()), run(module(*habits), shared_loader(), Processes(3)))


def test_a_worker_s_module_can_do_what_the_user_s_can() -> None:
    made = module("resizes a buffer")
    same(
        run(made, shared_loader(), Processes(2, start_method="forkserver")),
        run(module("resizes a buffer"), shared_loader(), InProcess()),
    )
    made.extra.resize_(7)  # what was sent is still its own


# Some of each kind: what is drawn, counted, kept.
OF_DATA = (
    "a data set that draws",
    "a data set that counts",
    "a data set with a cache",
    "a transform that seeds itself",
)


@pytest.mark.parametrize("habit", sweep(DATA_HABITS, OF_DATA))
@pytest.mark.parametrize("data", [shared_loader, own_loaders, made_loaders])
def test_what_a_client_leaves_in_the_data_no_other_finds(data: Any, habit: str) -> None:
    arguments = (habit,) if data is shared_loader else ("a shuffled loader", habit)
    others = Processes(2, start_method="fork") if data is shared_loader else LastFirst()
    same(run(module(), data(*arguments), InProcess()), run(module(), data(*arguments), others))


OF_LOADERS = (
    *("a shuffled loader", "a sampler with a generator", "a collate function that fits itself"),
    *("a split at random", "a datamodule of its own"),
)


@pytest.mark.parametrize("how", sweep(LOADERS, OF_LOADERS))
@pytest.mark.parametrize("data", [own_loaders, made_loaders])
def test_what_loaders_draw_is_the_client_s_own(data: Any, how: str) -> None:
    others = Processes(2, start_method="fork") if data is made_loaders else LastFirst()
    same(run(module(), data(how), InProcess()), run(module(), data(how), others))


def test_a_generator_that_is_a_variable_of_a_file_is_seeded_too() -> None:
    def build() -> DrawsAtModuleLevel:
        torch.manual_seed(0)
        return DrawsAtModuleLevel()

    same(run(build(), shared_loader(), InProcess()), run(build(), shared_loader(), Processes(3)))


def _later(habit: str) -> type[Habitual]:
    """A module whose habit begins only after the trial: in the second round, and not with the first batch."""

    class Later(Habitual):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            habits = self.habits
            self.__dict__["habits"] = habits if self.trainer.current_round > 1 and batch_idx > 0 else ()
            try:
                return super().training_step(batch, batch_idx)
            finally:
                self.__dict__["habits"] = habits

    return Later


# Some of each kind: what is set, written into, drawn, hooked in.
OF_MODULES = (
    *("counts in an attribute", "appends to a list", "writes into a buffer", "writes into an array"),
    *("a NumPy generator", "everybody's generators", "registers a forward hook", "freezes a weight"),
)


@pytest.mark.parametrize("when", [lambda habit: Habitual, _later], ids=["from the start", "later"])
@pytest.mark.parametrize("habit", sweep(MODULE_HABITS, OF_MODULES))
def test_clients_trained_as_one_get_what_each_gets_alone(habit: str, when: Any) -> None:
    """Within the rounding of stacked products; where that could not be they train one after the other."""
    ends = []
    for vectorize in (False, 3):
        torch.manual_seed(0)
        made = when(habit)([habit]).double()
        data = DataLoader(TensorDataset(toy_data(48).tensors[0].double(), toy_data(48).tensors[1]), 8, shuffle=True)
        history = History()
        FederatedTrainer(
            max_rounds=3,
            seed=3,
            vectorize_clients=vectorize,
            callbacks=[Partition(3), history],
            **QUIET,
        ).fit(made, data)
        ends.append((read(made), [row["train_loss"] for row in history.rows]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-7, atol=1e-9)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-7)


@pytest.mark.parametrize("habit", sweep([*DATA_HABITS, *LOADERS], [*OF_DATA, *OF_LOADERS[1:3]]))
def test_clients_trained_as_one_read_what_each_reads_alone(habit: str) -> None:
    ends = []
    for vectorize in (False, 3):
        made, how = module(), (habit,) if habit in LOADERS else ("a shuffled loader", habit)
        data = [LOADERS[how[0]](Data(toy_data(24, seed=seed), how[1:])) for seed in range(3)]
        made_weights = run(made, ClientData(data), InProcess(), vectorize_clients=vectorize)[0]
        ends.append(made_weights)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


def test_who_collects_in_the_module_is_told_where_to_collect() -> None:
    with pytest.warns(UserWarning, match=r"module.kept grew in a client's fit. .* a variable of your script") as said:
        run(module("appends to a list"), shared_loader(), InProcess())
    assert len([one for one in said if "grew in a client's fit" in str(one.message)]) == 1
