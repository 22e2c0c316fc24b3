"""The list of Lightning's tests that differ is held to: what is not on it passes, what is on it differs as it says."""

from __future__ import annotations

import os
from pathlib import Path

# What the toys' runs import stays only if it was there before.
import flwr_datasets.partitioner  # noqa: F401
import pytest

import tests.compat.lightning_plugin  # noqa: F401
from tests.compat.differences import Differences
from tests.compat.lightning_tests import SCOPE, run

pytest_plugins = ["pytester"]

TOY_TESTS = """
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def trained(**arguments):
    trainer = Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0, accelerator="cpu", **QUIET, **arguments)
    trainer.fit(BoringModel())
    return trainer


class Failing(BoringModel):
    def training_step(self, batch, batch_idx):
        raise KeyError("of the test")


def test_same():
    assert trained().current_epoch == 1


def test_without_a_trainer():
    assert True


@pytest.mark.parametrize("steps", [2])
def test_steps(steps):
    assert trained().global_step == steps


def test_refused():
    trained(max_steps=2)


def test_refused_and_hidden():
    with pytest.raises(ValueError, match="not a good number"):
        Trainer(max_steps=2)
        raise ValueError("not a good number")


def test_client_error():
    trainer = Trainer(max_epochs=1, accelerator="cpu", **QUIET)
    with pytest.raises(KeyError):
        trainer.fit(Failing())


def test_that_the_plain_trainer_fails():
    assert not hasattr(Trainer(accelerator="cpu", **QUIET), "fit")
"""

TRUE_LIST = """
[refused]
explanation = "refused"
[refused.tests]
"test_toy.py::test_refused" = "max_steps"
"test_toy.py::test_refused_and_hidden" = "max_steps"
[round]
explanation = "a round is no batch"
[round.tests]
"test_toy.py::test_steps[*]" = "global_step counts rounds"
[client-error]
explanation = "a client's error is a ClientError"
[client-error.tests]
"test_toy.py::test_client_error" = "KeyError"
"""
OTHER = """
[other]
explanation = "other"
[other.tests]
"test_toy.py::{test}" = "other"
"""
# A line of the true list, what is there instead (or at the end, where that is a class), and what the run then says.
FALSE_LISTS = {
    "not listed": ('"test_toy.py::test_steps[*]" = "global_step counts rounds"', "", "*assert 1 == 2*"),
    "stale": ("", OTHER.format(test="test_same"), "*it passes, and is listed as other: other*"),
    "stale, no trainer": ("", OTHER.format(test="test_without_a_trainer"), "*it passes, and is listed as other*"),
    "refused, not listed": ('"test_toy.py::test_refused" = "max_steps"', "", '  "*::test_refused" = "max_steps"'),
    "refused, listed otherwise": (
        '"test_toy.py::test_refused" = "max_steps"',
        OTHER.format(test="test_refused"),
        "*but it uses what is refused: *",
    ),
    "refused for another reason": (
        '"test_toy.py::test_refused" = "max_steps"',
        '"test_toy.py::test_refused" = "other"',
        "*but other was not refused: *",
    ),
    "no client failed": (
        '"test_toy.py::test_client_error" = "KeyError"',
        '"test_toy.py::test_client_error" = "KeyError"\n"test_toy.py::test_steps[2]" = "x"',
        "*but no client failed*",
    ),
}


@pytest.fixture
def run_toys(pytester: pytest.Pytester):
    """Runs the toy tests in the plugin with a list, after they were run with Lightning's own Trainer."""
    pytester.makepyfile(**{"tests_pytorch/test_toy": TOY_TESTS})
    plugin = ("-p", "tests.compat.lightning_plugin", "-p", "no:randomly")
    plain = pytester.runpytest_inprocess(*plugin, "--trainer", "plain")
    plain.assert_outcomes(passed=6, failed=1)
    plain.stdout.fnmatch_lines(["The plain Trainer passes 6 tests."])

    def run_with(text: str) -> pytest.RunResult:
        return pytester.runpytest_inprocess(*plugin, "--differences", str(pytester.makefile(".toml", differences=text)))

    return run_with


def test_a_true_list_passes_and_the_figures_are_told(run_toys):
    result = run_toys(TRUE_LIST)
    result.assert_outcomes(passed=2, xfailed=4, deselected=1)
    result.stdout.fnmatch_lines(
        ["Of 6 tests that *", "*2 pass, 1 of them with a fit", "*0 fail", "*2 differ: refused", "*2 max_steps"]
    )
    assert result.ret == 0


def test_lightning_has_its_own_trainer_back(run_toys):
    import lightning.pytorch
    import lightning.pytorch.trainer.trainer

    run_toys(TRUE_LIST)
    assert lightning.pytorch.Trainer is lightning.pytorch.trainer.trainer.Trainer


@pytest.mark.parametrize("name", FALSE_LISTS)
def test_a_list_that_is_not_true_fails(run_toys, name):
    line, instead, says = FALSE_LISTS[name]
    assert line in TRUE_LIST
    is_class = instead.startswith("\n")
    result = run_toys(TRUE_LIST.replace(line, "", 1) + instead if is_class else TRUE_LIST.replace(line, instead, 1))
    assert result.ret == 1
    result.stdout.fnmatch_lines([says])


def test_a_class_may_say_that_its_tests_may_pass(run_toys):
    may_pass = OTHER.format(test="test_same").replace("[other.tests]", "may_pass = true\n[other.tests]")
    run_toys(TRUE_LIST + may_pass).assert_outcomes(passed=2, xfailed=4, deselected=1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[a]\nexplanation = " "', "'a' has no explanation"),
        ('[a]\nexplanation = "a"\n[a.tests]\nt = ""', "t has no reason"),
        ('[a]\nexplanation = "a"\ntests.t = "x"\n[b]\nexplanation = "b"\ntests.t = "x"', "stands there twice"),
    ],
)
def test_a_list_without_reasons_is_refused(tmp_path: Path, text: str, says: str):
    path = tmp_path / "list.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        Differences(path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_lightning_s_own_tests():
    if "LIGHTNING_TESTS" not in os.environ:
        pytest.skip("LIGHTNING_TESTS names no checkout of Lightning's repository.")
    checkout = Path(os.environ["LIGHTNING_TESTS"]).resolve()
    run(checkout, "plain")
    assert run(checkout, "one-client", SCOPE) == 0
