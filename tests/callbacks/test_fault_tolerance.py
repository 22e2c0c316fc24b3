"""How many of a cohort may fail: counted or as a part, said or not, never fewer good replies than asked for."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FaultTolerance
from lightning_fed.callbacks.base import FailureOwner
from lightning_fed.errors import ClientError, ConfigurationError, RoundError
from lightning_fed.testing import ToyModule, toy_data

ERROR = ClientError("Round 3, train: client 2 raised ValueError: no\nThe client's traceback:\n...", round=3, client=2)


@pytest.mark.parametrize(
    ("min_results", "cohort", "needed"),
    [
        (1, 10, 1),
        (4, 10, 4),
        (0.5, 5, 3),
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (0.7, 10, 7),
        (0.01, 10, 1),
        (1.0, 7, 7),
        (0.1, 3, 1),
    ],
)
def test_needed_replies_are_a_number_or_a_part_rounded_up(min_results, cohort, needed):
    assert FaultTolerance(min_results=min_results).min_results(cohort) == needed


def test_without_it_the_first_failure_is_raised_and_all_must_succeed():
    with pytest.raises(ClientError) as caught:
        FailureOwner().on_failure(ERROR, 1, 4)
    assert caught.value is ERROR
    assert FailureOwner().min_results(4) == 4


def test_failure_is_warned_of_in_one_line_with_the_count():
    with pytest.warns(UserWarning, match=r"^Round 3, train: client 2 raised ValueError: no \(1 of 4 failed so far"):
        FaultTolerance().on_failure(ERROR, 1, 4)


def test_ignored_failure_is_not_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FaultTolerance(on_error="ignore").on_failure(ERROR, 1, 4)


def test_function_gets_each_error_and_may_stop_the_run():
    seen = []
    FaultTolerance(on_error=seen.append).on_failure(ERROR, 1, 4)
    assert seen == [ERROR]

    def stop(error):
        raise error

    with pytest.raises(ClientError, match="client 2"):
        FaultTolerance(on_error=stop).on_failure(ERROR, 1, 4)


@pytest.mark.parametrize("min_results", [0, -1, 0.0, 1.5, 2.0, float("nan")])
def test_min_results_out_of_range_is_refused(min_results):
    with pytest.raises(ConfigurationError, match=r"FaultTolerance\(min_results=.*int, at least 1.*float, in \(0, 1\]"):
        FaultTolerance(min_results=min_results)


def test_unknown_on_error_is_refused():
    with pytest.raises(ConfigurationError, match=r"FaultTolerance\(on_error='raise'\): write 'warn', 'ignore' or a"):
        FaultTolerance(on_error="raise")


# ------------------------------------------------------------------------------------------------- in a run


class Fragile(ToyModule):
    """Fails on the clients of its choice."""

    fails: tuple[int, ...] = ()
    how = "raise"

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.client_id in self.fails:
            if self.how == "raise":
                raise ValueError("out of luck")
            return loss * float("nan")
        return loss


def fit(module, quiet, **kwargs):
    trainer = FederatedTrainer(max_rounds=1, num_clients=4, callbacks=[FaultTolerance(**kwargs)], **quiet)
    trainer.fit(module, DataLoader(toy_data(), batch_size=8))
    return trainer


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_run_goes_on_with_the_good_clients(quiet, how):
    module, errors = Fragile(), []
    module.fails, module.how = (1, 3), how
    trainer = fit(module, quiet, min_results=2, on_error=errors.append)
    assert [error.client for error in errors] == [1, 3]
    assert trainer.global_step == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_mean_is_that_of_a_run_without_the_failed_clients(quiet, how):
    class Quitter(Fragile):
        """As Fragile, but the clients that fail do so before anything else."""

    torch.manual_seed(0)
    first = Fragile()
    state = {k: v.clone() for k, v in first.state_dict().items()}
    first.fails, first.how = (1,), how
    fit(first, quiet, on_error="ignore")
    second = Quitter()
    second.load_state_dict(state)
    second.on_train_start = lambda: 1 / (second.trainer.client_id != 1)
    fit(second, quiet, on_error="ignore")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_round_with_too_few_good_clients_ends_the_run_with_the_weights_of_before(quiet):
    module = Fragile()
    module.fails = (0, 1, 3)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(RoundError, match="1 of 4 clients gave a good train reply, and 2 are needed"):
        fit(module, quiet, min_results=2, on_error="ignore")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_more_results_than_clients_can_never_be_met_and_is_said_before_training(quiet):
    with pytest.raises(ConfigurationError, match=r"FaultTolerance\(min_results=5\) can never be met: 4 clients train"):
        fit(Fragile(), quiet, min_results=5)
