"""Publish a finished run, or what waits in its spool: the library behind ``peagle publish``.

Sending happens in a process of its own (``upload.py``), which is watched from here and ended when
its time is up. Nothing here needs Lightning.
"""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token

from peagle.publish.queue import MAIN, PROVENANCE, Entry, check_card, collect, pending, write_entry
from peagle.publish.upload import TIME_IS_UP, Destination

SPOOL, DRY_RUN, NOTE = "hub_spool", "hub_dry_run", "hub.json"
# Nice from the first import on: the trainer's processors are the trainer's.
START = "import os; os.nice(10); from peagle.publish.upload import main; main()"


@dataclass(frozen=True)
class PublishResult:
    """``sent`` holds title, commit, branch, tag and step of every commit; ``waiting`` the folders
    still in the spool; ``planned`` what a dry run would have done."""

    sent: tuple[dict[str, Any], ...] = ()
    waiting: tuple[str, ...] = ()
    problem: str | None = None
    planned: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return self.problem is None and not self.waiting


class Sender:
    """Starts, watches and ends the process that empties a spool."""

    def __init__(self, spool: Path, destination: Destination):
        self.spool, self.destination = spool, destination
        self.sent: list[dict[str, Any]] = []
        self.problem: str | None = None
        self.refused = False
        self._process: subprocess.Popen | None = None

    def start(self, seconds: float, *, check: bool = False) -> None:
        """Start the process unless it runs; with ``check`` it only looks for what would fail."""
        if self.running() or self.refused:
            return
        task = {
            "spool": None if check else str(self.spool.absolute()),
            "destination": asdict(self.destination),
            "seconds": seconds,
            "parent": os.getpid(),
        }
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if self.destination.endpoint is not None:
            environment["HF_ENDPOINT"] = self.destination.endpoint
        self.problem = None
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(task)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            env=environment,
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
        """End the process: what it has not sent stays in the spool."""
        if self.running():
            self._process.kill()
            self._process.wait()
            self._finish()

    def drain(self, seconds: float) -> None:
        """Send all that waits; return after ``seconds``, sent or not."""
        deadline = time.monotonic() + seconds
        self.wait(seconds)  # for a process that an earlier save has started
        left = deadline - time.monotonic()
        if pending(self.spool) and left > 0:
            self.start(left)
            self.wait(left + 1)  # it ends by itself a moment earlier, and can still say why

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


def publish_run(
    run_dir: Path,
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    endpoint: str | None,
    dry_run: bool,
    publish_timeout: float,
) -> PublishResult:
    """Push a finished run and whatever waits in its spool; what is there already stays as it is.

    Raises:
        ValueError: if the run holds nothing to publish, or an argument is malformed.
    """
    destination = Destination(repo_id, private, revision, endpoint)
    if dry_run:
        shutil.rmtree(run_dir / DRY_RUN, ignore_errors=True)
        return rehearse(spool_run(run_dir, run_dir / DRY_RUN), destination)
    sender = Sender(run_dir / SPOOL, destination)
    if (run_dir / "drafter").exists() or not pending(sender.spool):
        spool_run(run_dir, sender.spool)
    return deliver(sender, publish_timeout)


def spool_run(run_dir: Path, spool: Path, *, step: int | None = None) -> Entry:
    """Copy the finished run into the spool, so that a later change of the folder cannot mix two."""
    files = collect(run_dir)
    note = {"run_id": run_id(run_dir), "step": trained_steps(run_dir, step)}
    check_card(files, **note)
    _write_json(run_dir / NOTE, note)
    return write_entry(spool, files, **note, channel=MAIN, final=True, place=shutil.copyfile)


def run_id(run_dir: Path) -> str:
    """The run's own name from provenance.json, or one that is made once and kept."""
    sources = (run_dir / PROVENANCE, run_dir / NOTE)
    known = next(filter(None, (read_json(path).get("run_id") for path in sources)), None)
    if known is None:
        known = uuid.uuid4().hex[:12]
        _write_json(run_dir / NOTE, {"run_id": known})
    return str(known)


def trained_steps(run_dir: Path, default: int | None) -> int:
    """How many steps the drafter in the folder has seen: what the run recorded comes first."""
    provenance = read_json(run_dir / PROVENANCE)
    recorded = (
        provenance.get("step")
        or (provenance.get("training") or {}).get("steps")
        or default
        or read_json(run_dir / NOTE).get("step")
        or _last_logged_step(run_dir / "metrics/train.csv")
    )
    try:
        return int(float(recorded))
    except (TypeError, ValueError):
        text = f"{run_dir / PROVENANCE} does not say after how many steps training ended"
        raise ValueError(text) from None


def _last_logged_step(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row.get("step")]
    return steps[-1] if steps else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # A name of its own: a run that ends and `peagle publish` may write at the same time.
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
    ) as temporary:
        json.dump(content, temporary)
    Path(temporary.name).replace(path)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def deliver(sender: Sender, seconds: float) -> PublishResult:
    problem = obstacle()
    if problem is None:
        sender.drain(seconds)
        problem = sender.problem
    waiting = tuple(str(entry.folder) for entry in pending(sender.spool))
    return PublishResult(tuple(sender.sent), waiting, problem if waiting else None)


def obstacle() -> str | None:
    """Why there is no need to ask the Hub at all."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if get_token() is None:
        return "no login: set HF_TOKEN or run `hf auth login`"
    return None


def rehearse(entry: Entry, destination: Destination) -> PublishResult:
    branch = destination.branch(entry.channel)
    planned = [f"commit to {destination.repo_id}@{branch}: {entry.title()}"]
    planned += [f"  {name} ({path.stat().st_size} bytes)" for name, path in entry.files().items()]
    if entry.channel == MAIN:
        planned.append(f"tag step-{entry.step}")
    return PublishResult(planned=(*planned, f"nothing was sent; the files are in {entry.folder}"))
