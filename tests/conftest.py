"""Switches for the whole suite; what tests share by name is in helpers.py."""

import os
import signal

for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

# A job in the background inherits Ctrl-C ignored, and tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The common parent of worker processes imports it where it is imported already: once, not in each of them.
import flwr_datasets.partitioner  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tests.helpers import QUIET  # noqa: E402

settings.register_profile("fast", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fast")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def quiet(tmp_path):
    """A Trainer's arguments for a run that writes nothing and shows nothing."""
    return {**QUIET, "default_root_dir": tmp_path}


@pytest.fixture(scope="module")
def one_ray():
    """A Ray with two CPUs that all tests of a module use: each start of one takes seconds."""
    from lightning_fed.engines.ray import _ray

    ray = _ray(None)  # imported as the engine does: for the loopback interface
    handler = signal.getsignal(signal.SIGTERM)
    assert not ray.is_initialized()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, handler)  # Ray's own would stay for all later tests
    yield
    ray.shutdown()
