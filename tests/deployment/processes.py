"""Real processes on the loopback interface, of tests and of benchmarks/reliability.py: SuperLinks, sites, servers."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from lightning_fed._compat.flower_address import Address
from lightning_fed._compat.flower_link import client_at
from tests.deployment.federation import CLIENTS

ROOT = Path(__file__).parents[2]
SITES = [f"site-{client}" for client in range(CLIENTS)]


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
        wait_for(lambda: answers(port), 200, "the SuperLink")
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


def make_keys(folder: Path, hosts: Sequence[str], sites: Sequence[str]) -> None:
    """What examples/deployment/make_keys.py does."""
    runpy.run_path(str(ROOT / "examples" / "deployment" / "make_keys.py"))["make_keys"](folder, hosts, sites)


class SecureLink:
    """A SuperLink with TLS, node authentication, a secret and a database, in which sites are registered."""

    def __init__(self, scripts: Scripts, keys: Path, sites: Sequence[str]):
        self.scripts, self._keys, self.port, self._names = scripts, keys, free_port(), sites
        self.address, self.roots = f"localhost:{self.port}", str(keys / "ca.pem")
        self._options = ["--enable-supernode-auth", "--database", str(scripts.folder / "link.db")]
        files = {"ssl-ca-certfile": "ca.pem", "ssl-certfile": "server.pem", "ssl-keyfile": "server.key"}
        for option, name in {**files, "superexec-auth-secret-file": "secret"}.items():
            self._options += [f"--{option}", str(keys / name)]
        self.link = scripts.link(self.port, *self._options)
        for name in sites:
            register(Address(self.address, False, (keys / "ca.pem").read_bytes()), keys / f"{name}.pub")

    def restart_link(self) -> None:
        self.link.kill()
        self.link = self.scripts.link(self.port, *self._options)

    def site(self, client: int) -> dict[str, Any]:
        """What a site's script is told."""
        key = str(self._keys / f"{self._names[client]}.key")
        return {"address": self.address, "client": client, "root_certificates": self.roots, "private_key": key}

    @property
    def engine(self) -> dict[str, Any]:
        """What the server's engine is told."""
        secret = str(self._keys / "secret")
        return {"connect_timeout": 200, "root_certificates": self.roots, "secret_file": secret}


class Federation(SecureLink):
    """The same, and sites that stay."""

    def __init__(self, scripts: Scripts, keys: Path):
        super().__init__(scripts, keys / "good", SITES)
        self.keys = keys
        self.sites = [self.join(client) for client in range(CLIENTS)]
        for site in self.sites:  # before a test can take the place of one
            site.says("has joined", seconds=200)

    def join(self, client: int, name: str = "", **given: Any) -> Script:
        return self.scripts.run("site", name or SITES[client], **{**self.site(client), **given})
