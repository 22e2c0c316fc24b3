"""A SuperLink of this machine's own, without TLS: one command for the server, one for each site."""

import multiprocessing
import os
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization

from lightning_fed import FederatedTrainer
from lightning_fed._compat.flower_address import Address
from lightning_fed._compat.flower_node import NodeConnection, new_key
from lightning_fed._compat.flower_server import served_run
from lightning_fed.engines import Engine, SuperLink
from lightning_fed.engines.local_link import local_link
from lightning_fed.errors import ConfigurationError
from tests.deployment.federation import CLIENTS, data, fitted, module, site, trainer
from tests.deployment.processes import answers, free_port, wait_for
from tests.helpers import QUIET

PORT = free_port()


@pytest.fixture(scope="module")
def two_sites(scripts):
    """Two of three sites; they wait for a SuperLink that is not there yet."""
    given = {"address": f"127.0.0.1:{PORT}", "insecure": True}
    return [scripts.run("site", f"site-{k}", client=k, **given) for k in range(2)]


def test_a_module_that_is_not_the_servers_is_refused_with_both_sides_named(two_sites, scripts):
    given = {"address": f"127.0.0.1:{PORT}", "insecure": True, "module_kwargs": {"hidden": 9}}
    third = scripts.run("site", "site-2", client=2, **given)
    with pytest.raises(ConfigurationError, match="client 2 has another module than the server: ") as error:
        trainer(SuperLink.local(PORT)).fit(module())
    assert "'net.0.weight' is float [8, 8] at the server and float [9, 8] at the site" in str(error.value)
    third.says("client 2 failed")
    third.end()
    assert not answers(PORT)


def test_the_server_says_for_whom_it_waits_and_for_how_long(two_sites):
    with pytest.raises(ConfigurationError, match="2 of 3 clients are here: waiting for client 2, for 8 s by now"):
        trainer(SuperLink.local(PORT, connect_timeout=8)).fit(module())


@pytest.fixture
def forked_sites(tmp_path):
    """The port at which three sites look for a SuperLink; they are forks of this process, which has all imports."""
    port, fork = free_port(), multiprocessing.get_context("fork")
    given = {"address": f"127.0.0.1:{port}", "insecure": True}
    sites = [
        fork.Process(target=site, kwargs={**given, "client": k, "root": str(tmp_path / f"site-{k}")})
        for k in range(CLIENTS)
    ]
    for one in sites:
        one.start()
    yield port
    for one in sites:
        one.terminate()
    for one in sites:
        one.join()


def test_fit_without_tls_gives_the_bits_of_one_process(forked_sites):
    fitted(SuperLink.local(forked_sites), max_rounds=2).assert_same(fitted("in_process", max_rounds=2))
    assert not answers(forked_sites)


@pytest.fixture(scope="module")
def link():
    """The port of a SuperLink without TLS."""
    with local_link(port := free_port()):
        yield port


def test_tls_to_a_superlink_without_is_refused(link, keys):
    with pytest.raises(ConfigurationError, match="no trusted connection"):
        trainer(SuperLink(f"localhost:{link}", root_certificates=keys / "good" / "ca.pem")).fit(module())


def test_a_superlink_that_takes_in_anybody_is_known_by_a_try_that_leaves_nobody_there(link):
    address = Address(f"127.0.0.1:{link}", insecure=True)
    node = NodeConnection(address, new_key())
    node.register()
    node.activate()
    with served_run(address, None, {}) as run:
        [before] = run.nodes()
        assert run.admits_strangers
        assert [one.node_id for one in run.nodes()] == [before.node_id] == [node.node_id]
    node.close(forget=True)


@pytest.mark.landing
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


def test_a_port_that_is_taken_is_named(link):
    with pytest.raises(ConfigurationError, match=f"port={link}.: something else"):
        trainer(SuperLink.local(link)).fit(module())


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


@pytest.mark.parametrize(
    "given",
    [
        {"connect_timeout": -1},
        {"connect_timeout": "5"},
        {"return_timeout": float("nan")},
        {"min_clients": 0},
        {"min_clients": 1.5},
        {"max_reply_bytes": True},
    ],
)
def test_arguments_that_make_no_sense_are_refused(given):
    with pytest.raises(ConfigurationError, match=next(iter(given))):
        SuperLink("127.0.0.1:1", insecure=True, **given)
    with pytest.raises(ConfigurationError, match=next(iter(given))):
        SuperLink.local(8000, **given)


def test_the_engine_is_made_from_a_config_file_of_lightning_cli():
    """Its parser knows the arguments that are written, and no others."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--engine", type=str | Engine)
    given = {"class_path": "lightning_fed.engines.SuperLink.local", "init_args": {"connect_timeout": 8.0}}
    made = parser.instantiate_classes(parser.parse_object({"engine": given})).engine
    assert isinstance(made, SuperLink)
    assert made._connect == 8.0


def test_a_key_with_a_passphrase_is_refused_with_the_way_out(tmp_path):
    how, locked = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    path = tmp_path / "key"
    path.write_bytes(new_key().private_bytes(serialization.Encoding.PEM, how, locked))
    said = r"join\(private_key='.*key'\): .*passw.*key without, `ssh-keygen -N ''`"
    with pytest.raises(ConfigurationError, match=f"(?i){said}"):
        trainer().join("127.0.0.1:1", module(), *data(0), client=0, insecure=True, private_key=path)
