"""Real processes on the loopback interface: SuperLinks, sites and servers. All of them end with the tests."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from lightning_fed._compat.flower_address import Address
from lightning_fed._compat.flower_link import client_at
from tests.deployment.federation import CLIENTS

ROOT = Path(__file__).parents[2]
SITES = [f"site-{client}" for client in range(CLIENTS)]


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Scripts make their imports, for seconds each: what needs them runs once a landing."""
    for item in items:
        if item.path.parent == Path(__file__).parent and "scripts" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.landing)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(true: Callable[[], Any], seconds: float = 90, what: str = "") -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"{what or true} did not come true in {seconds} s"
        time.sleep(0.05)


class Script:
    """A process with a log."""

    def __init__(self, command: list[str], folder: Path, name: str):
        self.log_path = folder / f"{name}.log"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_HOME": str(folder), "FLWR_DISABLE_UPDATE_CHECK": "1"}
        env["PYTHONPATH"] = f"{ROOT}:{env.get('PYTHONPATH', '')}"
        env |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05"}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=env)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def says(self, text: str, times: int = 1, seconds: float = 90) -> None:
        wait_for(lambda: self.log.count(text) >= times or self.process.poll() is not None, seconds, repr(text))
        assert self.log.count(text) >= times, self.log

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self, number: int = signal.SIGTERM) -> float:
        """Ends it by a signal; gives the seconds that it took."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
        return time.monotonic() - began


class Scripts:
    """Starts processes in a folder, and ends all of them."""

    def __init__(self, folder: Path):
        self.folder, self.all = folder, []

    def start(self, command: list[str], name: str) -> Script:
        self.all.append(Script(command, self.folder, name))
        return self.all[-1]

    def run(self, role: str, name: str, **given: Any) -> Script:
        given = {"role": role, "root": str(self.folder / name), **given}
        return self.start([sys.executable, "-m", "tests.deployment.federation", json.dumps(given)], name)

    def link(self, port: int, *options: str, name: str = "link", isolation: str = "process") -> Script:
        fixed = ["--host", "127.0.0.1", "--port", str(port), "--isolation", isolation]
        link = self.start(["flower-superlink", *fixed, "--disable-runtime-dependency-installation", *options], name)
        wait_for(lambda: answers(port), what="the SuperLink")
        return link

    def end(self) -> None:
        for script in self.all:
            script.end()


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def register(address: Address, public_key: Path) -> None:
    """What `flwr supernode register` does."""
    key = load_ssh_public_key(public_key.read_bytes()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    client = client_at(address, ControlHttpClient, RuntimeVersionHttpInterceptor(component_name="flwr CLI"))
    client.RegisterNode(RegisterNodeRequest(public_key=key, name=public_key.stem))
    client.close()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Iterator[Scripts]:
    running = Scripts(tmp_path_factory.mktemp("deployment"))
    yield running
    running.end()


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys = runpy.run_path(str(ROOT / "examples" / "deployment" / "make_keys.py"))["make_keys"]
    make_keys(folder / "good", ["localhost", "127.0.0.1"], [*SITES, "stranger"])
    make_keys(folder / "other", ["localhost"], ["nobody"])
    return folder


class Federation:
    """A SuperLink with TLS, node authentication and a secret, and sites that stay."""

    def __init__(self, scripts: Scripts, keys: Path):
        self.scripts, self.keys, port = scripts, keys, free_port()
        self.address, self.roots = f"localhost:{port}", str(keys / "good" / "ca.pem")
        good, self._options = keys / "good", ["--enable-supernode-auth"]
        files = {"ssl-ca-certfile": "ca.pem", "ssl-certfile": "server.pem", "ssl-keyfile": "server.key"}
        for option, name in {**files, "superexec-auth-secret-file": "secret"}.items():
            self._options += [f"--{option}", str(good / name)]
        self._options += ["--database", str(scripts.folder / "link.db")]
        self._port, self.link = port, scripts.link(port, *self._options)
        for name in SITES:
            register(Address(self.address, False, (good / "ca.pem").read_bytes()), good / f"{name}.pub")
        self.sites = [self.join(client) for client in range(CLIENTS)]
        for site in self.sites:  # before a test can take the place of one
            site.says("has joined", seconds=200)

    def restart_link(self) -> None:
        self.link.kill()
        self.link = self.scripts.link(self._port, *self._options)

    def join(self, client: int, name: str = "", **given: Any) -> Script:
        key = str(self.keys / "good" / f"{SITES[client]}.key")
        given = {"root_certificates": self.roots, "private_key": key, **given}
        return self.scripts.run("site", name or SITES[client], address=self.address, client=client, **given)

    @property
    def engine(self) -> dict[str, Any]:
        return {
            "connect_timeout": 200,
            "root_certificates": self.roots,
            "secret_file": str(self.keys / "good" / "secret"),
        }


@pytest.fixture(scope="module")
def secure(scripts, keys) -> Federation:
    return Federation(scripts, keys)
