"""Who takes part: from (seed, round) alone, rounded to the nearest, never fewer than asked for."""

import random

import pytest

from lightning_fed.callbacks import PartialParticipation
from lightning_fed.callbacks.base import CohortOwner
from lightning_fed.errors import ConfigurationError


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
