"""Publish a run on the Hub while and after it is trained, without slowing or breaking training.

What is published is first put into the run's queue (``peagle/publish/queue.py``). A process of its
own sends it (``peagle/publish/upload.py``). The trainer waits for the Hub only at its very end, and
then for ``publish_timeout`` seconds at most. What was not sent stays in the queue: the next start
of the run sends it, or ``python -m peagle publish``.
"""

import contextlib
import json
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
from peagle.callbacks.checkpoint import keep
from peagle.callbacks.record import RunRecord
from peagle.card.card import CardOptions, write_card
from peagle.publish.publish import (
    DRY_RUN,
    SPOOL,
    PublishResult,
    Sender,
    deliver,
    obstacle,
    publish_run,
    read_json,
    rehearse,
    run_id,
    spool_run,
)
from peagle.publish.queue import (
    CHECKPOINTS,
    MAIN,
    PROVENANCE,
    collect,
    pending,
    staging,
    sweep,
    write_entry,
)
from peagle.publish.upload import Destination
from peagle.serve.export import export_drafter

__all__ = ["HubPublisher", "PublishResult", "publish_run"]

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
        self._before: dict[str, tuple[int, int]] = {}  # what lay there when fit started
        self._awaited: tuple[int, float] | None = None  # step and time of a save under way

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The serving lines on the finished card name the repository that it will stand in."""
        for callback in trainer.callbacks if self.destination is not None else []:
            if isinstance(callback, RunRecord) and callback.options.repo_id is None:
                callback.options = replace(callback.options, repo_id=self.destination.repo_id)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.destination is None or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        self.run_dir = Path(trainer.default_root_dir)
        self._before = _state(self.run_dir)
        self.sender = Sender(self.run_dir / (DRY_RUN if self.dry_run else SPOOL), self.destination)
        with _never_failing("publishing could not be prepared"):
            self._prepare()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        step = trainer.global_step
        if self.sender is None or self.hub_strategy == "end" or trainer.interrupted:
            return
        with _never_failing(f"step {step} was not published"):
            if step == self._saved_step or self._occupied():
                return
            self._saved_step = step
            if self.hub_strategy != "every_save":
                self._awaited = step, time.time()
            if not _is_last(trainer):  # those weights come with the finished run and its whole card
                self._spool_drafter(trainer, pl_module, step)
            if self._awaited is None:
                self._send()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._awaited is not None:
            self._spool_checkpoint()
        if self._checker is not None:
            self._report_check()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
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
            self._spool_checkpoint()
        now = _state(self.run_dir)
        if now.keys() == set(FINISHED) and all(now[n] != self._before.get(n) for n in FINISHED):
            self._before = now
            self.publish_final(self.run_dir, step=trainer.global_step)
        elif stage == "fit":
            _say("the drafter goes out once it is exported and its card is written")

    def publish_final(self, run_dir: Path, *, step: int) -> PublishResult | None:
        """Publish the finished folder, wait ``publish_timeout`` at most, say what came of it."""
        assert self.sender is not None, "publish_final belongs to a fit on the first rank"
        with _never_failing("the finished run was not published"):
            entry = spool_run(run_dir, self.sender.spool, step=step)
            if self.dry_run:
                result = rehearse(entry, self.destination)
            else:
                result = deliver(self.sender, self.publish_timeout)
            for line in result.planned:
                _say(line)
            for commit in result.sent:
                _say(f"step {commit['step']} is on {self.destination.repo_id}@{commit['branch']}")
            if result.waiting:
                _say(f"{result.problem}; {len(result.waiting)} not sent. {self._later()}")
            return result

    def _prepare(self) -> None:
        """Ask the Hub, without waiting for its answer, and send what an earlier start has left."""
        if self.dry_run:
            shutil.rmtree(self.sender.spool, ignore_errors=True)
            return
        sweep(self.sender.spool)
        if self.hub_strategy in ("checkpoint", "all_checkpoints"):
            _say(f"checkpoints, with the optimizer's state, go to the branch {CHECKPOINTS}")
        problem = obstacle()
        if problem is not None:
            _say(f"{problem}; training goes on. {self._later()}")
            return
        self._checker = Sender(self.sender.spool, self.destination)
        self._checker.start(CHECK_S, check=True)
        self._send()

    def _send(self) -> None:
        if not self.dry_run and pending(self.sender.spool) and obstacle() is None:
            self.sender.start(self.publish_timeout)

    def _report_check(self) -> None:
        if self._checker.running():
            return
        if self._checker.problem is not None:
            _say(f"{self._checker.problem}; training goes on. {self._later()}")
        self._checker = None

    def _occupied(self) -> bool:
        """Whether an earlier save is still on its way; if it got stuck, it is tried again."""
        if self.always_push or self.dry_run:
            return self.sender.refused
        if self.sender.running():
            return True
        stuck = bool(pending(self.sender.spool))
        self._send()
        return stuck

    def _spool_drafter(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Drafter and card of this moment. Figures measured on other weights stay out of both."""
        spool = self.sender.spool
        with staging(spool) as stage:
            averages = (c.average for c in trainer.callbacks if isinstance(c, AveragedWeights))
            weights = next(averages, None)
            drafter = pl_module.drafter if weights is None else weights["drafter"]
            export_drafter(drafter, stage / "drafter")
            name = {"run_id": run_id(self.run_dir), "step": step}
            _write_provenance(self.run_dir, stage, name)
            options = _card_options(trainer, self.destination.repo_id)
            write_card(stage, stage / "drafter", stage / "card", options=options)
            write_entry(spool, collect(stage), **name, channel=MAIN, final=False, place=os.replace)

    def _spool_checkpoint(self) -> None:
        """Under a second name: a finished checkpoint is replaced, never written into."""
        (step, since), self._awaited = self._awaited, None
        with _never_failing(f"the checkpoint of step {step} was not published"):
            files = (self.run_dir / "checkpoints").glob("*.ckpt")
            times = {path: path.stat().st_mtime for path in files if not path.is_symlink()}
            newest = max(times, key=times.get, default=None)
            if newest is None or times[newest] < since - 1:
                raise FileNotFoundError("no new file in checkpoints/")
            name = "last.ckpt" if self.hub_strategy == "checkpoint" else f"step-{step}.ckpt"
            write_entry(
                self.sender.spool,
                {name: newest},
                run_id=run_id(self.run_dir),
                step=step,
                channel=CHECKPOINTS,
                final=False,
                place=keep,
            )
            self._send()

    def _later(self) -> str:
        repo = self.destination.repo_id
        return f"To publish later: python -m peagle publish --run {self.run_dir} --repo_id {repo}"


def _state(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Which files mark a finished run; no clock is compared, for a file server has its own."""
    stats = {name: run_dir / name for name in FINISHED}
    found = {name: path.stat() for name, path in stats.items() if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def _card_options(trainer: L.Trainer, repo_id: str) -> CardOptions:
    """Licence and relation as on the finished card; the serving lines name the repository."""
    records = [callback for callback in trainer.callbacks if isinstance(callback, RunRecord)]
    options = records[0].options if records else CardOptions()
    return replace(options, repo_id=repo_id)


def _is_last(trainer: L.Trainer) -> bool:
    return trainer.should_stop or 0 < trainer.estimated_stepping_batches <= trainer.global_step


def _write_provenance(run_dir: Path, stage: Path, name: dict[str, Any]) -> None:
    """Make ``stage`` a run folder of this step: its name, its curve, no totals of another step."""
    provenance = read_json(run_dir / PROVENANCE) | name
    if "training" in provenance:
        totals = {"steps": name["step"], "tokens": None, "rows": None, "hours": None}
        provenance["training"] = provenance["training"] | totals
    (stage / PROVENANCE).write_text(json.dumps(provenance, indent=2))
    curve = run_dir / "metrics/train.csv"
    if curve.exists():
        (stage / "metrics").mkdir()
        shutil.copyfile(curve, stage / "metrics/train.csv")


@contextlib.contextmanager
def _never_failing(what: str) -> Iterator[None]:
    """Turn any fault of publishing into one line: a training is worth more than its publication."""
    try:
        yield
    except Exception as error:
        _say(f"{what}: {error}")


def _say(line: str) -> None:
    rank_zero_info(f"Hub: {line}")
