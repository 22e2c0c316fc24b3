"""The scripts of these tests as forks of a process that has made the imports, which take a script five seconds."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.deployment import federation
from tests.deployment.processes import Script, Scripts

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.deployment.federation"])


class Child:
    """A process of ``multiprocessing``, as ``subprocess.Popen`` shows one."""

    def __init__(self, process: multiprocessing.Process):
        self._process = process
        process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.pid is not None and self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


class Fork(Script):
    """A function in a process with a log, a folder to work in and temporary files there."""

    def __init__(self, function: Callable[[], Any], folder: Path, name: str):
        self.log_path = folder / f"{name}.log"
        self.log_path.touch()
        self.process = Child(_CONTEXT.Process(target=_run, args=(function, folder, self.log_path), name=name))


class Forks(Scripts):
    """Starts Python's scripts so; programs of Flower's are started as they are."""

    def start(self, command: list[str], name: str) -> Script:
        if command[0] != "python":
            return super().start(command, name)
        self.all.append(Fork(partial(_script, command[1:]), self.folder, name))
        return self.all[-1]

    def run(self, role: str, name: str, **given: Any) -> Script:
        function = partial(getattr(federation, role), root=str(self.folder / name), **given)
        self.all.append(Fork(function, self.folder, name))
        return self.all[-1]


def _run(function: Callable[[], Any], folder: Path, log_path: Path) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    os.environ["FLWR_HOME"] = tempfile.tempdir = str(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function()


def _script(words: list[str]) -> None:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
