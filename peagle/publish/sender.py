"""Starts, watches and ends the process that sends a queue to the Hub (``upload.py``)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token

from peagle.publish.queue import waiting_entries
from peagle.publish.upload import TIME_IS_UP, Destination


@dataclass(frozen=True)
class PublishResult:
    """What came of a publication.

    ``sent`` holds title, commit, branch, tag and step of every commit, ``waiting`` the folders
    still in the queue, ``planned`` what a dry run would have done.
    """

    sent: tuple[dict[str, Any], ...] = ()
    waiting: tuple[str, ...] = ()
    problem: str | None = None
    planned: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return self.problem is None and not self.waiting

    def lines(self, repo_id: str) -> list[str]:
        """What was done, for the user."""
        sent = [f"step {commit['step']} is on {repo_id}@{commit['branch']}" for commit in self.sent]
        return [*self.planned, *sent]


class Sender:
    """One queue, and the process that sends it: at most one at a time."""

    def __init__(self, queue: Path, destination: Destination):
        self.queue, self.destination = queue, destination
        self.sent: list[dict[str, Any]] = []
        self.problem: str | None = None
        self.refused = False
        self._process: subprocess.Popen | None = None

    def start(self, seconds: float, *, check: bool = False) -> None:
        """Start the process unless it runs; with ``check`` it only looks for what would fail."""
        if self.running() or self.refused:
            return
        task = {
            "queue": None if check else str(self.queue.absolute()),
            "destination": asdict(self.destination),
            "seconds": seconds,
            "parent": os.getpid(),
        }
        # Nice from the first import on: the trainer's processors are the trainer's.
        command = ["nice", "-n", "10", "env", "HF_HUB_DISABLE_PROGRESS_BARS=1"]
        if self.destination.endpoint is not None:
            command.append(f"HF_ENDPOINT={self.destination.endpoint}")
        self.problem = None
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [*command, sys.executable, "-m", "peagle.publish.upload", json.dumps(task)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the trainer
        )

    def running(self) -> bool:
        if self._process is None:
            return False
        if self._process.poll() is None:
            return True
        self._finish()
        return False

    def wait(self, seconds: float) -> None:
        """Wait for the process, and end it when the time is up."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(seconds)
        self.stop()

    def stop(self) -> None:
        """End the process: what it has not sent stays in the queue."""
        if self.running():
            self._process.kill()
            self._process.wait()
            self._finish()

    def send_all(self, seconds: float) -> PublishResult:
        """Send all that waits; return after ``seconds``, sent or not."""
        problem = offline_reason()
        if problem is None:
            deadline = time.monotonic() + seconds
            self.wait(seconds)  # for a process that an earlier save has started
            left = deadline - time.monotonic()
            if waiting_entries(self.queue) and left > 0:
                self.start(left)
                self.wait(left + 1)  # it ends by itself a moment earlier, and can still say why
            problem = self.problem
        waiting = tuple(str(entry.folder) for entry in waiting_entries(self.queue))
        return PublishResult(tuple(self.sent), waiting, problem if waiting else None)

    def _finish(self) -> None:
        code, self._process = self._process.returncode, None
        with self._output as output, self._errors as errors:
            output.seek(0)
            errors.seek(0)
            *lines, _ = output.read().split(b"\n")  # a killed process may leave half a line
            last = errors.read().decode(errors="replace").strip().splitlines()
        for line in lines:
            if not line.startswith(b'{"'):  # a library's own words
                continue
            event = json.loads(line)
            if "commit" in event:
                self.sent.append(event)
            else:
                self.problem = event["problem"]
                self.refused = self.refused or event.get("refused", False)
        if code in (TIME_IS_UP, -signal.SIGKILL) and self.problem is None:
            self.problem = "the Hub did not answer in time"
        elif code != 0 and self.problem is None:
            self.problem = f"sending failed: {last[-1] if last else code}"


def offline_reason() -> str | None:
    """Why there is no need to ask the Hub at all; None where there is."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if get_token() is None:
        return "no login: set HF_TOKEN or run `hf auth login`"
    return None
