"""A SuperLink on this machine that ends with the process that started it, however that ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_fed.errors import ConfigurationError

# Flower's own program, in a process that ends when nobody holds the other end of its standard input any more.
_PROGRAM = """
import os, shutil, sys, threading
def end():
    sys.stdin.buffer.read()
    shutil.rmtree(os.getcwd(), ignore_errors=True)
    os._exit(0)
threading.Thread(target=end, daemon=True).start()
from importlib.metadata import entry_points
next(iter(entry_points(group="console_scripts", name="flower-superlink"))).load()()
"""
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


@contextmanager
def local_link(port: int) -> Iterator[None]:
    """Run a SuperLink at ``127.0.0.1:port``, without TLS, for the time of the block.

    Raises:
        ConfigurationError: If it does not start.
    """
    if _answers(port):
        raise ConfigurationError(
            f"SuperLink.local(port={port}): something else listens there. Write another port, or"
            f" SuperLink('127.0.0.1:{port}', insecure=True) if it is a SuperLink."
        )
    with tempfile.TemporaryDirectory(prefix="superlink-", ignore_cleanup_errors=True) as folder:
        options = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            link = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *options, "--disable-runtime-dependency-installation"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=folder,
                env={**os.environ, **_QUIET, "FLWR_HOME": folder},
                start_new_session=True,  # Ctrl-C is the server's to hear
            )
        try:
            _wait(link, port, log)
            yield
        finally:
            assert link.stdin is not None
            link.stdin.close()
            link.wait()


def _wait(link: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + 60
    while not _answers(port):
        if link.poll() is not None or time.monotonic() > until:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
            raise ConfigurationError(f"SuperLink.local(port={port}) did not start:\n{said}")
        time.sleep(0.1)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False
