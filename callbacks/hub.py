"""Publish a run on the Hub while and after it is trained, without slowing or breaking training.

What is published is first put into the run's queue (``peagle/publish/queue.py``). A process of its
own sends it (``peagle/publish/upload.py``). The trainer waits for the Hub only at its very end, and
then for ``publish_timeout`` seconds at most. What was not sent stays in the queue: the next start
of the run sends it, or ``python -m peagle publish``.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from peagle.callbacks.average import AveragedWeights
from peagle.callbacks.checkpoint import link_or_copy
from peagle.callbacks.record import RunRecord
from peagle.card.card import CardOptions, write_card
from peagle.publish.allowed_files import files_to_publish
from peagle.publish.publish import copy_record, describe_dry_run, enqueue_run, run_id_of
from peagle.publish.queue import (
    CHECKPOINTS,
    DRY_RUN,
    MAIN,
    QUEUE,
    add_entry,
    remove_leftovers,
    staging_folder,
    waiting_entries,
)
from peagle.publish.sender import Sender, offline_reason
from peagle.publish.upload import Destination
from peagle.serve.export import export_drafter

Strategy = Literal["end", "every_save", "checkpoint", "all_checkpoints"]
FINISHED = ("drafter/config.json", "card/README.md")
CHECK_S = 20.0  # an answer later than that is no answer


class HubPublisher(L.Callback):
    """Publish the drafter with its card while and after it is trained.

    The finished run goes out at the end of the first stage, fit or a later test, by whose end this
    fit has renewed both ``drafter/`` and ``card/``: what an earlier fit left there is not sent. It
    happens in ``teardown``, so every ``on_fit_end`` and ``on_test_end`` is done by then, wherever
    this callback is listed; what writes those files in ``teardown`` must be listed before.
    There is no parameter for a token: it comes from HF_TOKEN or `hf auth login`.

    Args:
        repo_id: "owner/name"; null publishes nothing.
        hub_strategy: "end" publishes the finished run; "every_save" also drafter and card at every
            checkpoint; "checkpoint" also that checkpoint, as ``last.ckpt`` on the branch ``ckpts``;
            "all_checkpoints" keeps each of them there, as ``step-N.ckpt``.
        private: whether a repository that has to be made is private.
        revision: the branch to publish on; null means main.
        always_push: publish a save although an earlier one is not sent yet; needs the disk for all.
        endpoint: address of the Hub; null means the usual one, or HF_ENDPOINT.
        dry_run: write what would be published to ``hub_dry_run/``, say so, and send nothing.
        publish_timeout: seconds that the end of training may wait for the Hub.
    """

    def __init__(
        self,
        repo_id: str | None = None,
        hub_strategy: Strategy = "end",
        private: bool = True,
        revision: str | None = None,
        always_push: bool = False,
        endpoint: str | None = None,
        dry_run: bool = False,
        publish_timeout: float = 300.0,
    ):
        if hub_strategy not in get_args(Strategy):
            raise ValueError(
                f"hub_strategy must be one of {', '.join(get_args(Strategy))}, got {hub_strategy!r}"
            )
        if publish_timeout <= 0:
            raise ValueError(f"publish_timeout must be positive, got {publish_timeout}")
        self.hub_strategy, self.always_push, self.dry_run = hub_strategy, always_push, dry_run
        self.publish_timeout = publish_timeout
        self.destination = Destination(repo_id, private, revision, endpoint) if repo_id else None
        self.sender: Sender | None = None  # stays None where nothing is to be published
        self._checker: Sender | None = None
        self._saved_step: int | None = None
        self._published: dict[str, tuple[int, int]] = {}  # sent, or from before this fit
        self._awaited: tuple[int, float] | None = None  # step and time of a save under way

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The serving lines on the finished card name the repository that it will stand in."""
        for callback in trainer.callbacks if self.destination is not None else []:
            if isinstance(callback, RunRecord) and callback.options.repo_id is None:
                callback.options = replace(callback.options, repo_id=self.destination.repo_id)

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.destination is None or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        self.run_dir = Path(trainer.default_root_dir)
        self._published = _finished_files(self.run_dir)
        self.sender = Sender(self.run_dir / (DRY_RUN if self.dry_run else QUEUE), self.destination)
        with _never_failing("publishing could not be prepared"):
            self._prepare()

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.sender is None or self.hub_strategy == "end" or trainer.interrupted:
            return
        with _never_failing(f"step {step} was not published"):
            if step == self._saved_step or self._earlier_save_waits():
                return
            self._saved_step = step
            if self.hub_strategy != "every_save":
                self._awaited = step, time.time()
            last = 0 < trainer.estimated_stepping_batches <= step
            if not (last or trainer.should_stop):  # the last come with the finished run's card
                self._enqueue_drafter(trainer, module, step)
            if self._awaited is None:
                self._send()

    def on_train_batch_start(self, *_: Any) -> None:
        if self._awaited is not None:
            self._enqueue_checkpoint()
        if self._checker is not None and not self._checker.running():
            if self._checker.problem is not None:
                _say(f"{self._checker.problem}; training goes on. {self._later_command()}")
            self._checker = None

    def on_exception(self, *_: Any) -> None:
        for sender in (self._checker, self.sender):
            if sender is not None:
                sender.stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.sender is None or trainer.interrupted:
            return
        if self._checker is not None:
            self._checker.stop()
            self._checker = None
        if self._awaited is not None:
            self._enqueue_checkpoint()
        now = _finished_files(self.run_dir)
        if all(name in now and now[name] != self._published.get(name) for name in FINISHED):
            self._published = now
            self._publish_finished_run(trainer.global_step)
        elif stage == "fit":
            _say("the drafter goes out once it is exported and its card is written")

    def _publish_finished_run(self, step: int) -> None:
        """Publish the run's folder, wait ``publish_timeout`` at most, say what came of it."""
        with _never_failing("the finished run was not published"):
            entry = enqueue_run(self.run_dir, self.sender.queue, step=step)
            if self.dry_run:
                result = describe_dry_run(entry, self.destination)
            else:
                result = self.sender.send_all(self.publish_timeout)
            for line in result.lines(self.destination.repo_id):
                _say(line)
            if result.waiting:
                _say(f"{result.problem}; {len(result.waiting)} not sent. {self._later_command()}")

    def _prepare(self) -> None:
        """Ask the Hub, without waiting for its answer, and send what an earlier start has left."""
        if self.dry_run:
            shutil.rmtree(self.sender.queue, ignore_errors=True)
            return
        remove_leftovers(self.sender.queue)
        if self.hub_strategy in ("checkpoint", "all_checkpoints"):
            _say(f"checkpoints, with the optimizer's state, go to the branch {CHECKPOINTS}")
        problem = offline_reason()
        if problem is not None:
            _say(f"{problem}; training goes on. {self._later_command()}")
            return
        self._checker = Sender(self.sender.queue, self.destination)
        self._checker.start(CHECK_S, check=True)
        self._send()

    def _send(self) -> None:
        if not self.dry_run and waiting_entries(self.sender.queue) and offline_reason() is None:
            self.sender.start(self.publish_timeout)

    def _earlier_save_waits(self) -> bool:
        """Whether an earlier save is still on its way; if it got stuck, it is tried again."""
        if self.always_push or self.dry_run:
            return self.sender.refused
        if self.sender.running():
            return True
        stuck = bool(waiting_entries(self.sender.queue))
        self._send()
        return stuck

    def _enqueue_drafter(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Drafter and card of this moment. Figures measured on other weights stay out of both."""
        queue = self.sender.queue
        with staging_folder(queue) as stage:
            averages = [c.average for c in trainer.callbacks if isinstance(c, AveragedWeights)]
            drafter = averages[0]["drafter"] if averages else module.drafter
            export_drafter(drafter, stage / "drafter")
            run_id = run_id_of(self.run_dir)
            copy_record(self.run_dir, stage, run_id=run_id, step=step)
            # Licence and relation as on the finished card; the serving lines name the repository.
            records = [c.options for c in trainer.callbacks if isinstance(c, RunRecord)]
            options = records[0] if records else CardOptions()
            options = replace(options, repo_id=self.destination.repo_id)
            write_card(stage, stage / "drafter", stage / "card", options=options)
            files = files_to_publish(stage)
            add_entry(
                queue, files, run_id=run_id, step=step,
                channel=MAIN, final=False, transfer=os.replace,
            )  # fmt: skip

    def _enqueue_checkpoint(self) -> None:
        """Under a second name: a finished checkpoint is replaced, never written into."""
        (step, since), self._awaited = self._awaited, None
        with _never_failing(f"the checkpoint of step {step} was not published"):
            files = (self.run_dir / "checkpoints").glob("*.ckpt")
            times = {path: path.stat().st_mtime for path in files if not path.is_symlink()}
            newest = max(times, key=times.get, default=None)
            if newest is None or times[newest] < since - 1:
                raise FileNotFoundError("no new file in checkpoints/")
            name = "last.ckpt" if self.hub_strategy == "checkpoint" else f"step-{step}.ckpt"
            add_entry(
                self.sender.queue, {name: newest}, run_id=run_id_of(self.run_dir), step=step,
                channel=CHECKPOINTS, final=False, transfer=link_or_copy,
            )  # fmt: skip
            self._send()

    def _later_command(self) -> str:
        repo = self.destination.repo_id
        return f"To publish later: python -m peagle publish --run {self.run_dir} --repo_id {repo}"


def _finished_files(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Version of each file that marks a finished run. No clock is compared: a file server has its
    own."""
    stats = {name: (run_dir / name).stat() for name in FINISHED if (run_dir / name).is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@contextlib.contextmanager
def _never_failing(what: str) -> Iterator[None]:
    """Turn any fault of publishing into one line: a training is worth more than its publication."""
    try:
        yield
    except Exception as error:
        _say(f"{what}: {error}")


def _say(line: str) -> None:
    rank_zero_info(f"Hub: {line}")
