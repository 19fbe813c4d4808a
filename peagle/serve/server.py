"""A server process that leaves nothing behind.

It has a process group of its own, because vLLM's workers outlive a server that is killed alone, and
the head of that group holds a pipe to this process, because ``kill -9`` leaves nobody to end it.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from types import TracebackType

from peagle.serve.http import is_healthy

LINES_SHOWN = 15

# Head of the group: starts the server and ends with its status. When peagle is gone, however it
# went, the pipe is at its end, and the group is killed. SIGTERM is for the server to end by.
LEASH = """
import os, signal, subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
status = server.wait()
os._exit(status if status >= 0 else 128 - status)
"""


class EngineError(OSError):
    """The engine did not come up, or died; the message ends with its last log lines."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server process that answers ``/health``; as a context it is gone afterwards.

    It is gone as well when this process is killed.

    Args:
        command: starts the server on ``port``.
        timeout_s: how long it may take to come up.

    Raises:
        EngineError: from ``with``, if it does not come up or is dead when an error leaves the
            block.
    """

    def __init__(
        self, command: list[str], port: int, *, environment: dict[str, str], timeout_s: float
    ):
        self.command, self.port, self.environment = command, port, environment
        self.timeout_s = timeout_s

    def __enter__(self) -> "Server":
        self.folder = tempfile.TemporaryDirectory(prefix="peagle-engine-")
        self.log = Path(self.folder.name) / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LEASH, *self.command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder.name,  # else modules beside the user would shadow vLLM's
                start_new_session=True,
            )
        try:
            self.wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not self.healthy():
            if self.process.poll() is not None:
                raise self.failure(f"ended with status {self.process.returncode} at its start")
            if time.monotonic() > deadline:
                raise self.failure(f"did not come up in {self.timeout_s:.0f} s")
            time.sleep(0.2)

    def healthy(self) -> bool:
        return is_healthy(self.port)

    def failure(self, what: str) -> EngineError:
        lines = self.log.read_text(errors="replace").strip().splitlines()[-LINES_SHOWN:]
        return EngineError("\n".join([f"the engine {what}; its last lines:", *lines]))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        lost = isinstance(error, OSError | HTTPException) and not self.healthy()
        failure = self.failure("died while it was asked") if lost else None
        self.stop()
        if failure:
            raise failure from error

    def stop(self) -> None:
        """End the server and all that it started, also when interrupted while it waits."""
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass  # all gone, or ended by the signal that nobody can ignore
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdin.close()
            self.folder.cleanup()
