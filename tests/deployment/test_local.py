"""A SuperLink of this machine's own, without TLS: one command for the server, one for each site."""

import os
import subprocess
import sys

import pytest

from lightning_fed import FederatedTrainer
from lightning_fed.engines import SuperLink
from lightning_fed.engines.local_link import local_link
from lightning_fed.errors import ConfigurationError
from tests.deployment.conftest import answers, free_port, wait_for
from tests.deployment.federation import fitted, module, trainer
from tests.helpers import QUIET

PORT = free_port()


@pytest.fixture(scope="module")
def sites(scripts):
    """Three sites, of which one has another module; they wait for a SuperLink that is not there yet."""
    given = {"address": f"127.0.0.1:{PORT}", "insecure": True}
    return [
        scripts.run("site", f"site-{k}", client=k, module_kwargs={"hidden": 9} if k == 2 else {}, **given)
        for k in range(3)
    ]


def test_a_module_that_is_not_the_servers_is_refused_with_both_sides_named(sites, scripts):
    with pytest.raises(ConfigurationError, match="client 2 has another module than the server: ") as error:
        trainer(SuperLink.local(PORT)).fit(module())
    assert "'net.0.weight' is float [8, 8] at the server and float [9, 8] at the site" in str(error.value)
    sites[2].says("client 2 failed")
    assert not answers(PORT)


def test_the_server_says_for_whom_it_waits_and_for_how_long(sites, caplog):
    sites[2].end()
    with pytest.raises(ConfigurationError, match="2 of 3 clients are here: waiting for client 2, for 8 s by now"):
        trainer(SuperLink.local(PORT, connect_timeout=8)).fit(module())


def test_fit_without_tls_gives_the_bits_of_one_process(sites, scripts, tmp_path):
    sites[2] = scripts.run("site", "site-2", client=2, address=f"127.0.0.1:{PORT}", insecure=True)
    fitted(SuperLink.local(PORT)).assert_same(fitted("in_process"))
    assert not answers(PORT)


def test_tls_to_a_superlink_without_is_refused(tmp_path, keys):
    with local_link(port := free_port()), pytest.raises(ConfigurationError, match="no trusted connection"):
        trainer(SuperLink(f"localhost:{port}", root_certificates=keys / "good" / "ca.pem")).fit(module())


def test_a_superlink_of_our_own_ends_with_a_process_that_is_killed(tmp_path):
    port = free_port()
    program = f"""
import os, time
from lightning_fed.engines.local_link import local_link
with local_link({port}):
    print("up", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert answers(port)
    assert any(tmp_path.glob("superlink-*"))
    process.kill()
    process.wait()
    wait_for(lambda: not answers(port) and not any(tmp_path.glob("superlink-*")), 10)


def test_a_port_that_is_taken_is_named():
    with local_link(port := free_port()), pytest.raises(ConfigurationError, match=f"port={port}.: something else"):
        trainer(SuperLink.local(port)).fit(module())


def test_a_site_without_data_is_told_what_to_write(tmp_path):
    here = FederatedTrainer(max_rounds=1, num_clients=3, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ConfigurationError, match=r"join\(client=1\) got no data"):
        here.join("127.0.0.1:1", module(), client=1, insecure=True)


def test_nobody_at_the_address_is_said_with_the_way_out(caplog):
    port = free_port()
    with pytest.raises(
        ConfigurationError, match=f"No SuperLink serves this script at 127.0.0.1:{port}.*flower-superlink"
    ):
        trainer(SuperLink(f"127.0.0.1:{port}", insecure=True, connect_timeout=1)).fit(module())


@pytest.mark.parametrize("given", [{"connect_timeout": -1}, {"return_timeout": float("nan")}, {"min_clients": 0}])
def test_arguments_that_make_no_sense_are_refused(given):
    with pytest.raises(ConfigurationError, match=next(iter(given))):
        SuperLink("127.0.0.1:1", insecure=True, **given)
