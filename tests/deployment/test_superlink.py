"""Server and sites as plain scripts over a SuperLink with TLS, node authentication, a secret and a database."""

import signal
import threading
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Callback

from lightning_fed._compat.flower_address import Address
from lightning_fed.callbacks import FaultTolerance, FederatedCallback
from lightning_fed.engines import SuperLink
from lightning_fed.errors import ConfigurationError
from tests.deployment.federation import Outcome, data, fitted, module, trainer
from tests.deployment.processes import SITES, register, wait_for


@pytest.fixture(scope="module")
def in_process():
    """What five rounds in one process give."""
    return fitted("in_process")


@contextmanager
def meanwhile(do):
    """In the block, something else is done; what it raises is raised after the block."""
    raised = []

    def run():
        try:
            do()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if raised:
        raise raised[0]


# ------------------------------------------------------------------------------------------------- as in process


def test_fit_over_tls_gives_the_bits_of_one_process(secure, in_process):
    fitted(SuperLink(secure.address, **secure.engine)).assert_same(in_process)
    for client, site in enumerate(secure.sites):
        site.says("Round 5, evaluate: 16 examples in ")
        assert f"Round 5, train: {24 + 8 * client} examples in " in site.log
        assert " bytes received, " in site.log


class Round(Callback):
    """Does something at the server after a round."""

    def __init__(self, round, do):
        self.round, self.do = round, do

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.round:
            self.do()


def boom():
    raise ValueError("boom")


def test_exception_and_ctrl_c_at_the_server_are_its_own_and_sites_stay(secure):
    with pytest.raises(ValueError, match="boom"):
        trainer(SuperLink(secure.address, **secure.engine), callbacks=(Round(1, boom),)).fit(module())
    interrupt = Round(1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer(SuperLink(secure.address, **secure.engine), callbacks=(interrupt,)).fit(module())
    assert all(site.process.poll() is None for site in secure.sites)


@pytest.mark.landing
def test_a_server_that_is_killed_is_resumed_at_once_to_the_same_bits(secure, in_process, scripts):
    given = {"address": secure.address, "rounds": 5, **secure.engine}
    first = scripts.run("server", "server", resume=False, **given)
    wait_for(lambda: (scripts.folder / "server" / "epoch=1.ckpt").exists())
    first.kill()
    second = scripts.run("server", "server", resume=True, **given)
    assert second.process.wait(120) == 0, second.log
    assert "Ends run" in second.log
    Outcome(**torch.load(scripts.folder / "server" / "end.pt")).assert_same(in_process)


# --------------------------------------------------------------------------------------------sites that go and come


def slow_site(secure, client, tmp_path, seconds=60.0, rounds=(3,)):
    """Puts a site in a client's place that is slow in some rounds, once; gives the file that says when."""
    secure.sites[client].end()
    sign = tmp_path / "slow"
    slow = {"seconds": seconds, "rounds": list(rounds), "sign": str(sign)}
    secure.sites[client] = secure.join(client, slow=slow)
    return sign


@pytest.mark.landing
def test_a_site_that_is_killed_in_a_round_and_comes_back_does_its_work_again(secure, in_process, tmp_path):
    sign = slow_site(secure, 1, tmp_path)

    def kill_and_restart():
        wait_for(sign.exists)
        secure.sites[1].kill()
        secure.sites[1] = secure.join(1)

    with meanwhile(kill_and_restart):
        fitted(SuperLink(secure.address, **secure.engine, return_timeout=90)).assert_same(in_process)


@pytest.mark.landing
def test_a_site_that_leaves_is_its_clients_failure_and_comes_back_in_a_later_round(secure, tmp_path):
    sign, errors, present = slow_site(secure, 2, tmp_path, rounds=(2,)), [], []
    joined = secure.sites[2].log.count("has joined") + 1  # its log goes on

    class Reports(FederatedCallback):
        def on_client_end(self, trainer, round, stage, report):
            present.append((round, stage, report.client))

        def on_train_epoch_end(self, trainer, pl_module):
            if errors:
                wait_for(lambda: secure.sites[2].log.count("has joined") > joined)

    def leave_and_return():
        wait_for(sign.exists)
        assert secure.sites[2].end() < 10  # SIGTERM, in the middle of a local fit of 60 s
        assert "Client 2 leaves" in secure.sites[2].log
        wait_for(lambda: errors)
        secure.sites[2] = secure.join(2)

    tolerant = (FaultTolerance(on_error=errors.append), Reports())
    with meanwhile(leave_and_return):
        trainer(SuperLink(secure.address, **secure.engine, return_timeout=1), callbacks=tolerant).fit(module())
    assert {(error.round, error.stage, error.client) for error in errors} == {(2, "train", 2), (2, "evaluate", 2)}
    assert "Round 2, train: client 2 is not here" in str(errors[0])
    assert (3, "train", 2) in present


@pytest.mark.landing
def test_a_link_that_is_killed_and_comes_back_with_its_database_costs_nothing(secure, in_process, tmp_path):
    sign = slow_site(secure, 0, tmp_path, seconds=3.0)

    def kill_and_restart():
        wait_for(sign.exists)
        secure.restart_link()

    with meanwhile(kill_and_restart):
        fitted(SuperLink(secure.address, **secure.engine)).assert_same(in_process)
    assert all(site.process.poll() is None for site in secure.sites)


def test_a_registered_site_that_says_it_is_anothers_client_is_refused_by_name(secure, in_process):
    good = secure.keys / "good"
    register(Address(secure.address, False, (good / "ca.pem").read_bytes()), good / "insider.pub")
    insider = secure.join(0, "insider", private_key=str(good / "insider.key"))
    insider.says("has joined")
    # The first that answers in a run is the client.
    either = r"\((insider|site-0)\)"
    with pytest.warns(UserWarning, match=rf"{either} says that it is client 0, which node \d+ {either}, with another"):
        fitted(SuperLink(secure.address, **secure.engine)).assert_same(in_process)
    insider.end()


# ------------------------------------------------------------------------------------------------- refusals


def site_arguments(secure, client=0, **given):
    key = secure.keys / "good" / f"{SITES[client]}.key"
    return {"client": client, "root_certificates": secure.roots, "private_key": key, "lease": 2.0, **given}


REFUSED_SITES = {
    "a wrong authority": (lambda s: {"root_certificates": s.keys / "other" / "ca.pem"}, "no trusted connection.*CERT"),
    "no authority": (lambda s: {"root_certificates": None}, "no trusted connection.*root_certificates="),
    "a key that nobody registered": (
        lambda s: {"private_key": s.keys / "good" / "stranger.key"},
        "nobody has registered",
    ),
    "no key": (lambda s: {"private_key": None}, "registered sites only.*private_key="),
    "no TLS": (lambda s: {"insecure": True, "root_certificates": None}, "speaks TLS, and insecure=True does not"),
    "an identity that is here": (lambda s: {}, "another site is there with the same key"),
    "a key that is none": (lambda s: {"private_key": s.keys / "good" / "ca.pem"}, r"join\(private_key='.*ca.pem'\)"),
    "a file that is not there": (lambda s: {"private_key": s.keys / "none.key"}, "it cannot be read"),
}


@pytest.mark.parametrize(("given", "said"), REFUSED_SITES.values(), ids=REFUSED_SITES)
def test_a_site_is_refused_with(secure, tmp_path, given, said):
    train, val = data(0)
    here = trainer("in_process", default_root_dir=tmp_path)
    with pytest.raises(ConfigurationError, match=said):
        here.join(secure.address, module(), train, val, **{**site_arguments(secure), **given(secure)})


REFUSED_SERVERS = {
    "a wrong authority": (lambda s: {"root_certificates": s.keys / "other" / "ca.pem"}, "no trusted connection.*CERT"),
    "no secret": (lambda s: {"secret_file": None}, "it wants a secret_file="),
    "a wrong secret": (
        lambda s: {"secret_file": s.keys / "other" / "secret"},
        "secret_file is not the one that it has",
    ),
    "no TLS": (lambda s: {"insecure": True, "root_certificates": None}, "speaks TLS, and insecure=True does not"),
}


@pytest.mark.parametrize(("given", "said"), REFUSED_SERVERS.values(), ids=REFUSED_SERVERS)
def test_a_server_is_refused_with(secure, given, said):
    with pytest.raises(ConfigurationError, match=said):
        trainer(SuperLink(secure.address, **{**secure.engine, **given(secure)})).fit(module())
