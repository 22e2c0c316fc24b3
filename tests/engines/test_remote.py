"""What engines say that send their clients to other processes."""

from typing import Any

import pytest

from lightning_fed.engines import remote
from lightning_fed.engines.served import served
from lightning_fed.engines.worker import Start
from lightning_fed.errors import ConfigurationError
from lightning_fed.testing import counting_client


def refuse(start: Start, by_value: bool) -> Any:
    raise TypeError("no")


@pytest.mark.parametrize(
    ("instead", "end"),
    [((), "or write engine='in_process'."), (("Or wait.",), "or write engine='in_process'. Or wait.")],
)
def test_what_cannot_be_sent_is_an_error_that_speaks_of_the_engine(instead: tuple[str, ...], end: str) -> None:
    with pytest.raises(ConfigurationError, match=r"engine='own' sends .* cannot be pickled: TypeError: no") as error:
        remote.packed(Start(served(counting_client()), 1, 1), "own", refuse, *instead)
    assert str(error.value).endswith(end)
