"""How clients train, in text: what is the same in other words, and what is not."""

import numpy as np
from lightning.pytorch.utilities.enums import GradClipAlgorithmType

from lightning_fed.callbacks import FedProx
from lightning_fed.client.local.work import LocalOptions
from lightning_fed.client.setup import differences, setup_of


def setup(rounds=3, methods=(), epochs=1, **trainer):
    return setup_of(LocalOptions(trainer, epochs), methods, {}, rounds)


def test_the_same_in_other_words_is_the_same():
    assert not differences(setup(), setup(gradient_clip_val=None, limit_train_batches=None, overfit_batches=0))
    assert not differences(setup(), setup(epochs=(1,)))
    by_value = setup(gradient_clip_val=np.float64(1), gradient_clip_algorithm=GradClipAlgorithmType.VALUE)
    assert not differences(by_value, setup(gradient_clip_val=1, gradient_clip_algorithm="value"))
    proxes = [setup(methods=[FedProx(mu)]) for mu in (1, 1.0, np.float32(1))]
    assert all(not differences(proxes[0], one) for one in proxes)


def test_all_batches_and_one_are_not_the_same():
    said = "limit_train_batches is 1.0 at the server and 1 at the site"
    assert differences(setup(), setup(limit_train_batches=1)) == [said]


def test_epochs_are_compared_as_far_as_the_run_goes():
    assert not differences(setup(epochs=(1, 2)), setup(epochs=(1, 2, 2)))
    assert not differences(setup(2, epochs=(1, 2)), setup(2, epochs=(1, 2, 3)))
    [said] = differences(setup(3, epochs=(1, 2)), setup(3, epochs=(1, 2, 3)))
    assert said == "local_epochs is [1, 2] at the server and [1, 2, 3] at the site"
    assert differences(setup(-1, epochs=(1, 2)), setup(-1, epochs=(1, 2, 3)))
    long = differences(setup(9999, epochs=tuple(range(1, 9000))), setup(9999, epochs=tuple(range(1, 9001))))
    assert len(long[0]) < 300


def test_what_one_side_has_not_heard_of_is_said():
    assert differences({"new": "1"}, {}) == ["new is 1 at the server and unknown at the site"]
