"""Who takes part: from (seed, round) alone, rounded to the nearest, never fewer than asked for."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FederatedCallback, PartialParticipation, Participation, Partition
from lightning_fed.callbacks.base import CohortOwner
from lightning_fed.engines import Processes
from lightning_fed.errors import ConfigurationError, RoundError
from lightning_fed.testing import ToyModule, toy_data
from lightning_fed.values.weights import read
from tests.helpers import QUIET, pooled


@pytest.mark.parametrize(
    ("fraction", "clients", "size"),
    [
        (0.29, 100, 29),  # int(100 * 0.29) is 28
        (0.5, 5, 3),  # halves up
        (0.25, 10, 3),
        (0.1, 10, 1),
        (0.01, 10, 1),  # at least one
        (1.0, 7, 7),
        (0.3, 1, 1),
        (0.07, 100, 7),
        (0.29, 50, 15),  # 0.29 * 50 is 14.499999999999998
    ],
)
def test_size_is_the_fraction_rounded_to_the_nearest_and_at_least_one(fraction, clients, size):
    assert PartialParticipation(fraction_train=fraction).size("train", clients) == size


def test_each_stage_has_its_own_fraction_and_minimum():
    method = PartialParticipation(0.1, 0.5, min_train_clients=3, min_evaluate_clients=7)
    assert (method.size("train", 10), method.size("evaluate", 10)) == (3, 7)


def test_nobody_evaluates_with_fraction_zero_whatever_the_minimum():
    method = PartialParticipation(fraction_evaluate=0, min_evaluate_clients=4)
    assert method.sample("evaluate", 1, 10, 0) == []
    assert method.size("evaluate", 2) == 0


@pytest.mark.parametrize(
    "arguments", [{"min_train_clients": 4}, {"min_available_clients": 4}, {"min_evaluate_clients": 4}]
)
def test_fewer_clients_than_a_minimum_is_an_error_that_names_it(arguments):
    ((name, _),) = arguments.items()
    stage = "evaluate" if "evaluate" in name else "train"
    with pytest.raises(ConfigurationError, match=rf"{name}=4\) asks for more clients than there are: 3\. Lower {name}"):
        PartialParticipation(**arguments).size(stage, 3)


def test_cohort_is_sorted_without_repeats_and_within_the_clients():
    cohort = PartialParticipation(fraction_train=0.3).sample("train", 4, 50, 1)
    assert len(cohort) == len(set(cohort)) == 15
    assert cohort == sorted(cohort)
    assert set(cohort) <= set(range(50))


def test_cohort_depends_on_seed_round_and_stage_alone():
    method, other = PartialParticipation(0.3, 0.3), PartialParticipation(0.3, 0.3, min_train_clients=2)
    random.seed(1)
    first = method.sample("train", 4, 50, 0)
    random.seed(2)
    assert other.sample("train", 4, 50, 0) == method.sample("train", 4, 50, 0) == first
    cohorts = [("train", 4, 0), ("train", 5, 0), ("train", 4, 1), ("evaluate", 4, 0)]
    assert len({tuple(method.sample(stage, round, 50, seed)) for stage, round, seed in cohorts}) == 4


def test_sampling_leaves_the_global_generator_alone():
    random.seed(1)
    expected = random.random()
    random.seed(1)
    PartialParticipation(0.3).sample("train", 1, 10, 0)
    assert random.random() == expected


def test_every_client_takes_part_now_and_then_and_about_equally_often():
    method = PartialParticipation(fraction_train=0.2)
    counts = [0] * 10
    for round in range(1, 501):
        for client in method.sample("train", round, 10, 0):
            counts[client] += 1
    # 500 rounds at 0.2: mean 100, standard deviation 9.
    assert min(counts) > 60
    assert max(counts) < 140


def test_without_it_everybody_takes_part():
    assert CohortOwner().sample("train", 3, 4, 0) == [0, 1, 2, 3]


def test_all_faults_are_reported_together():
    with pytest.raises(ConfigurationError) as caught:
        PartialParticipation(0, 1.5, min_train_clients=0, min_available_clients=-1)
    for part in (
        r"PartialParticipation: ",
        "min_train_clients=0 must be at least 1",
        "min_available_clients=-1 must be at least 1",
        "fraction_train=0 must be in (0, 1]",
        "fraction_evaluate=1.5 must be in [0, 1]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigurationError, match=r"fraction_train=.* must be in \(0, 1\]"):
        PartialParticipation(fraction_train=fraction)


# ------------------------------------------------------------------------------------------------- by round


@pytest.mark.parametrize("fractions", [[0.1, 0.5, 0.3], lambda round: (0.1, 0.5, 0.3)[min(round, 3) - 1]])
def test_fraction_by_round_is_a_list_whose_last_goes_on_or_a_function(fractions):
    method = PartialParticipation(fraction_train=fractions, fraction_evaluate=fractions)
    for stage in ("train", "evaluate"):
        assert [len(method.sample(stage, round, 10, 0)) for round in (1, 2, 3, 4, 9)] == [1, 5, 3, 3, 3]
    assert method.varies
    assert not PartialParticipation(0.5).varies


def test_nobody_evaluates_in_the_rounds_whose_fraction_is_zero():
    method = PartialParticipation(fraction_evaluate=lambda round: float(round % 5 == 0))
    assert [len(method.sample("evaluate", round, 4, 0)) for round in (4, 5, 6)] == [0, 4, 0]


def test_the_cohort_of_a_round_is_that_of_its_fraction_whatever_the_others_are():
    assert PartialParticipation([0.1, 0.5]).sample("train", 2, 10, 0) == PartialParticipation(0.5).sample(
        "train", 2, 10, 0
    )


@pytest.mark.parametrize("wrong", [0, 1.5, None, "half", float("nan")])
def test_a_function_that_gives_no_fraction_is_refused_with_its_round(wrong):
    with pytest.raises(ConfigurationError, match=r"fraction_train=\.\.\.\) gave .* for round 3: it must be in"):
        PartialParticipation(lambda round: wrong if round == 3 else 1).sample("train", 3, 10, 0)


# ------------------------------------------------------------------------------------------------- weighted


def test_weights_give_the_probabilities_of_drawing_one_after_the_other():
    weights = torch.tensor([1.0, 2.0, 0.0, 5.0])
    method = PartialParticipation(0.5, weights=weights)
    found = Counter(tuple(method.sample("train", round, 4, 0)) for round in range(1, 4001))
    p = {i: float(w) / 8 for i, w in enumerate(weights) if w}
    expected = {(i, j): p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])) for i in p for j in p if i < j}
    assert set(found) == set(expected)
    for pair, probability in expected.items():
        assert found[pair] / 4000 == pytest.approx(probability, abs=4 * (probability / 4000) ** 0.5)


def test_weights_leave_evaluation_alone_and_may_leave_fewer_than_the_fraction():
    method, plain = PartialParticipation(0.5, 0.5, weights=[0, 1, 0, 0]), PartialParticipation(0.5, 0.5)
    assert method.sample("train", 1, 4, 0) == [1]
    assert method.sample("evaluate", 1, 4, 0) == plain.sample("evaluate", 1, 4, 0)


def test_too_few_clients_with_a_weight_are_an_error():
    method = PartialParticipation(0.5, min_train_clients=2, weights=[0, 1, 0, 0])
    with pytest.raises(RoundError, match=r"Round 3: 1 of 4 clients are available to train, and min_train_clients=2"):
        method.sample("train", 3, 4, 0)


@pytest.mark.parametrize("weights", [[], [1, -1], [0, 0], [1, float("inf")], [1, None], "size", {0: 1.0}, 3])
def test_what_are_no_weights_is_refused(weights):
    with pytest.raises(ConfigurationError, match=r"weights=.* must be 'examples', or a list with a number for each"):
        PartialParticipation(weights=weights)


def test_weights_of_other_clients_are_refused():
    with pytest.raises(ConfigurationError, match=r"weights=\.\.\.\) has 2 entries for 3 clients"):
        PartialParticipation(weights=[1, 2]).size("train", 3)


def fit(tmp_path, *callbacks, rounds=4, resume=False, **options):
    """Weights after some rounds over unequal clients, and who trained in each of those that ran."""
    torch.manual_seed(1)
    module, cohorts = ToyModule(), Cohorts()
    saving = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    sizes = (8, 16, 40, 16, 24)
    data = [DataLoader(toy_data(size, seed), batch_size=8, shuffle=True) for seed, size in enumerate(sizes)]
    who = [client for client, size in enumerate(sizes) for _ in range(size)]
    apart = any(isinstance(callback, ClientData) for callback in callbacks)
    owners = [] if apart else [Partition(by=who, val_fraction=0.25)]
    options = {**QUIET, "enable_checkpointing": True, "default_root_dir": tmp_path, "seed": 0, **options}
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=[*owners, *callbacks, cohorts, saving], **options)
    loader = None if apart else DataLoader(pooled([one.dataset for one in data]), batch_size=8, shuffle=True)
    trainer.fit(module, loader, ckpt_path="last" if resume else None)
    return read(module), cohorts.seen


class Cohorts(FederatedCallback):
    def __init__(self):
        self.seen = {}

    def on_round_start(self, trainer, round, stage, cohort):
        self.seen[stage, round] = list(cohort)


def by_size_of_the_day(round, client):
    return (client + round) % 3 != 0


def largest_generator_says(round, clients, generator):
    return generator.permutation(clients)[: 1 + round % 3]


class LargestLosses(CohortOwner):
    """The two clients whose last loss was the largest; a client that has not trained yet comes first."""

    def __init__(self):
        self.losses = {}

    def size(self, stage, num_clients):
        return 2

    def sample(self, stage, round, num_clients, seed):
        return sorted(sorted(range(num_clients), key=lambda client: -self.losses.get(client, 9.0))[:2])

    def on_client_end(self, trainer, round, stage, report):
        if stage == "train":
            self.losses[report.client] = report.metrics["train_loss"]

    def state_dict(self):
        return {"losses": dict(self.losses)}

    def load_state_dict(self, state_dict):
        self.losses = dict(state_dict["losses"])


METHODS = {
    "learns": LargestLosses,
    "by round": lambda: PartialParticipation([0.4, 1.0, 0.2], lambda round: 0.4 + 0.2 * (round % 2)),
    "by examples": lambda: PartialParticipation(0.4, 0.6, weights="examples"),
    "available": lambda: PartialParticipation(0.4, weights=[1, 2, 3, 4, 5], available=by_size_of_the_day),
    "sampler": lambda: Participation(largest_generator_says, available=by_size_of_the_day),
}


@pytest.mark.parametrize("name", METHODS)
def test_cohorts_and_weights_are_the_same_in_workers_and_after_a_resume(name, tmp_path):
    weights, cohorts = fit(tmp_path, METHODS[name]())
    assert len({tuple(cohort) for cohort in cohorts.values()}) > 2
    forked, again = fit(tmp_path, METHODS[name](), engine=Processes(2, start_method="fork"))
    assert again == cohorts
    torch.testing.assert_close(forked, weights, rtol=0, atol=0)
    fit(tmp_path, METHODS[name](), rounds=2)
    resumed, rest = fit(tmp_path, METHODS[name](), resume=True)
    assert rest == {key: cohort for key, cohort in cohorts.items() if key[1] > 2}
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)


def test_weights_by_examples_are_those_of_the_training_examples(tmp_path):
    _, by_examples = fit(tmp_path, PartialParticipation(0.4, weights="examples"), rounds=20)
    _, by_list = fit(tmp_path, PartialParticipation(0.4, weights=[6, 12, 30, 12, 18]), rounds=20)
    assert by_examples == by_list


def test_weights_by_examples_need_clients_whose_examples_are_known(tmp_path):
    clients = ClientData(lambda client: DataLoader(toy_data(8)), num_clients=2)
    with pytest.raises(ConfigurationError, match=r"weights='examples'\): ClientData does not tell .*weights=\[120, 80"):
        fit(tmp_path, clients, PartialParticipation(0.5, weights="examples"))


def test_the_summary_says_that_other_rounds_have_other_cohorts(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_fed.server.session.rank_zero_info", said.append)
    fit(tmp_path, PartialParticipation([0.4, 1.0]), rounds=1)
    assert "2 train, 5 evaluate in the first; rounds: 1" in said[0]


# ------------------------------------------------------------------------------------------------- available


TABLE = [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    "available",
    [TABLE, np.array(TABLE), torch.tensor(TABLE), lambda round, client: (client < 2) == (round % 2 == 1)],
    ids=["list", "array", "tensor", "function"],
)
def test_only_clients_that_are_available_take_part(available):
    method = PartialParticipation(0.4, 0.8, available=available)
    assert [method.sample("train", round, 5, 0) for round in (1, 3)] == [[0, 1]] * 2
    assert method.sample("evaluate", 2, 5, 0) == [2, 3, 4]
    drawn = {tuple(method.sample("train", round, 5, 0)) for round in range(2, 60, 2)}
    assert drawn == {(2, 3), (2, 4), (3, 4)}


def test_too_few_available_clients_are_an_error_with_the_numbers():
    method = PartialParticipation(1.0, min_train_clients=3, available=TABLE)
    assert method.sample("train", 2, 5, 0) == [2, 3, 4]
    message = r"Round 3: 2 of 5 clients are available to train, and min_train_clients=3\. .*or lower min_train_clients"
    with pytest.raises(RoundError, match=message) as caught:
        method.sample("train", 3, 5, 0)
    assert (caught.value.round, caught.value.stage) == (3, "train")


@pytest.mark.parametrize("available", [[], [[1, 0], [1]], [1, 0], [[0.5, 1]], "night", 3])
def test_what_says_not_who_is_available_is_refused(available):
    for method in (PartialParticipation, lambda available: Participation(lambda *_: [], available=available)):
        with pytest.raises(ConfigurationError, match=r"available=.*: write a function of a round and a client, or a"):
            method(available=available)


def test_a_table_of_other_clients_and_a_function_that_forgets_to_return_are_refused():
    with pytest.raises(ConfigurationError, match=r"available= has 5 columns, and there are 4 clients"):
        PartialParticipation(available=TABLE).sample("train", 1, 4, 0)
    with pytest.raises(ConfigurationError, match=r"available\(1, 0\) gave None: it must be True or False"):
        PartialParticipation(available=lambda round, client: None).sample("train", 1, 4, 0)


# ------------------------------------------------------------------------------------------------- a sampler


def test_a_sampler_says_who_takes_part():
    def pairs(round, clients, generator):
        first = int(generator.integers(len(clients) - 1))
        return {clients[first + 1], clients[first]}

    method = Participation(pairs, lambda round, clients, generator: [], available=[[True] * 4 + [False]])
    cohorts = [method.sample("train", round, 5, 0) for round in range(1, 30)]
    assert {tuple(cohort) for cohort in cohorts} == {(0, 1), (1, 2), (2, 3)}
    assert method.sample("evaluate", 1, 5, 0) == []
    assert [method.sample("train", round, 5, 1) for round in range(1, 30)] != cohorts
    assert Participation(pairs).sample("evaluate", 1, 5, 0) == [0, 1, 2, 3, 4]


def test_a_sampler_that_draws_from_elsewhere_or_counts_its_calls_is_refused():
    counted = iter(range(100))
    for sampler in (
        lambda round, clients, generator: random.sample(clients, 5),
        lambda round, clients, generator: [next(counted) % 50],
    ):
        with pytest.raises(ConfigurationError, match=r"sampler=\.\.\.\) chose \[.*\] in round 2 and, asked again, \["):
            Participation(sampler).sample("train", 2, 50, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"gave None in round 4: it gives some of the clients that it gets"),
        ("02", r"gave '02' in round 4"),
        ([0, 7], r"gave \[7\] in round 4: .*; there are 3\."),
        ([0, 2.0], r"gave \[2\.0\]"),
        ([True, 2], r"gave \[True\]"),
        ([0, 2, 2], r"gave client 2 twice in round 4"),
        ([3], r"gave \[3\] in round 4"),  # not available
    ],
)
def test_what_is_no_cohort_is_refused_with_its_round(given, message):
    method = Participation(lambda *_: given, available=[[1, 1, 1, 0]])
    with pytest.raises(ConfigurationError, match=message):
        method.sample("train", 4, 4, 0)


def test_a_sampler_that_chooses_nobody_to_train_ends_the_run(tmp_path):
    with pytest.raises(RoundError, match="Round 2: no client was chosen to train"):
        fit(tmp_path, Participation(lambda round, clients, generator: clients[: 2 - round]))


def test_wrong_arguments_of_a_sampler_are_reported_together():
    with pytest.raises(ConfigurationError) as caught:
        Participation([0, 1], sampler_evaluate=3, min_available_clients=0)
    for part in ("sampler=list(...): write a function", "sampler_evaluate=3: write", "min_available_clients=0 must be"):
        assert part in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"min_available_clients=4\) asks for more clients than there are: 3"):
        Participation(lambda *_: [0], min_available_clients=4).size("train", 3)
