"""What is known of a signature is what Lightning reads."""

from functools import partial, wraps

import pytest
from lightning.pytorch.core import module
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_fed._compat import signatures
from lightning_fed._compat.signatures import is_parameter_of, signatures_known


def decorated(function):
    @wraps(function)
    def around(*args, **kwargs):
        return function(*args, **kwargs)

    return around


class Steps:
    def one(self, batch): ...
    def two(self, batch, batch_idx): ...
    def three(self, batch, batch_idx, dataloader_idx=0): ...
    def rest(self, batch, *args): ...
    def named(self, batch, **kwargs): ...
    def keyword(self, batch, *, batch_idx): ...
    def iterator(self, dataloader_iter): ...
    def only(self, batch, batch_idx, /): ...
    @decorated
    def wrapped(self, batch, batch_idx): ...
    @staticmethod
    def static(batch, batch_idx): ...
    @classmethod
    def of_class(cls, batch, batch_idx): ...


STEPS = [getattr(Steps(), name) for name in vars(Steps) if not name.startswith("_")]
HOOKS = [*STEPS, Steps.two, partial(Steps().two, 1), lambda self, batch: None, decorated(lambda self, batch_idx: None)]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("param", ["batch_idx", "dataloader_iter", "dataloader_idx"])
@pytest.mark.parametrize("more", [{}, {"explicit": True}, {"min_args": 2}])
def test_known_signature_is_the_one_read(hook, param, more):
    read = is_param_in_hook_signature(hook, param, **more)
    assert [is_parameter_of(hook, param, **more) for _ in range(2)] == [read, read]


def test_two_functions_of_one_name_are_two():
    def step(self, batch): ...

    first = is_parameter_of(step, "batch_idx")

    def step(self, batch, batch_idx): ...

    assert (first, is_parameter_of(step, "batch_idx")) == (False, True)


def test_all_of_lightning_that_reads_signatures_in_a_fit_is_known():
    assert list(signatures._MODULES) == signatures._ASKING


def test_lightning_reads_itself_outside_of_a_fit():
    def fit():
        with signatures_known():
            seen.append(module.is_param_in_hook_signature)
            raise KeyError

    seen = []
    with pytest.raises(KeyError):
        fit()
    assert seen == [is_parameter_of]
    assert module.is_param_in_hook_signature is is_param_in_hook_signature
