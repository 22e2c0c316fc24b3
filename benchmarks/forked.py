"""Scripts as forks of this process, which has made the imports: as real as any, and there in milliseconds."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.deployment.processes import Script

_PR_SET_CHILD_SUBREAPER = 36


def keep_orphans() -> None:
    """Make what this process' children leave behind children of its own, where ``children`` sees them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def children() -> list[str]:
    """Return the commands of this process' children that have not ended."""
    found = []
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        found += [f"{pid}: {command[:80]}"] if command else []  # one that has ended has none
    return found


class Child:
    """A forked process, as ``subprocess.Popen`` shows one."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forked(Script):
    """A function in a process of its own, with a log, a folder to work in and temporary files there."""

    def __init__(self, function: Callable[..., None], given: dict[str, Any], folder: Path, name: str) -> None:
        self.log_path = folder / f"{name}.log"
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            self.process = Child(pid)
            return
        code = 1
        try:
            log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(folder)
            function(**given)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
