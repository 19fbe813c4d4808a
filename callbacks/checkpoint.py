"""Checkpoints that are never torn: written beside the old one, synced, then renamed.

Lightning stages a checkpoint in the system's temporary folder and moves it; when that is another
file system, a kill or a full disk in the middle destroys the previous checkpoint.
"""

import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as BaseCheckpoint

from peagle.model.checkpoint import read_checkpoint
from peagle.model.restore import refuse_incomplete
from peagle.store.disk import rename_durably


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves by rename within one folder, loads tensors and plain data only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Raises ``OSError`` with need and have when the disk is full; the old file stays."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        have = shutil.disk_usage(path.parent).free  # later the torn file takes its room
        try:
            if tensor_bytes(checkpoint) > have:
                raise OSError("no space left on device")
            torch.save(checkpoint, temporary)
            rename_durably(temporary, path)
        except (OSError, RuntimeError) as error:
            # What is no tensor is not in tensor_bytes: it needs at least what fitted.
            written = temporary.stat().st_size if temporary.exists() else 0
            temporary.unlink(missing_ok=True)
            need = max(tensor_bytes(checkpoint), written)
            raise OSError(
                f"checkpoint {path} could not be written ({error}): it needs {need / 1e6:.1f} MB, "
                f"{have / 1e6:.1f} MB are free; the previous checkpoint is untouched"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As data, whatever the caller asked for; see ``read_checkpoint``.

        Raises:
            ValueError: also for what is no checkpoint of ``fit``, before Lightning looks into it.
        """
        checkpoint = read_checkpoint(str(path), map_location=map_location)
        refuse_incomplete(checkpoint)
        return checkpoint


def tensor_bytes(checkpoint: Any) -> int:
    """Bytes of all tensors in a nested checkpoint."""
    if isinstance(checkpoint, torch.Tensor):
        return checkpoint.nbytes
    if isinstance(checkpoint, dict):
        return sum(map(tensor_bytes, checkpoint.values()))
    if isinstance(checkpoint, list | tuple):
        return sum(map(tensor_bytes, checkpoint))
    return 0


class Checkpoint(BaseCheckpoint):
    """``checkpoints/last.ckpt``, renewed every so many steps or minutes, and when a run is ended.

    Lightning's ``ModelCheckpoint`` ranks checkpoints by a metric; a drafter is trained to the end
    of its schedule, so the last one is the one that counts.

    Every checkpoint is the state right after a finished optimizer step: a run that ends in the
    middle of the next one (an exception, a signal, gradients half accumulated) resumes at that
    step's first batch, and goes on as if nothing had happened.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        minutes: also after this much time, when given.
        keep_all: keep each of them too, as ``step-N.ckpt``.
    """

    def __init__(
        self, every_n_steps: int = 1000, minutes: float | None = None, keep_all: bool = False
    ):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps, self.minutes, self.keep_all = every_n_steps, minutes, keep_all
        self.saved_step, self.saved_time = 0, time.monotonic()
        self.stepping = False  # the optimizer may be writing: weights are neither old nor new
        self.finished_step = 0
        self.finished: dict[str, Any] = {}  # the counters as they were after that step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit" and not trainer.fast_dev_run:
            for leftover in checkpoint_folder(trainer).glob("*.ckpt.tmp"):
                if re.fullmatch(r"(last|step-\d+)\.ckpt\.tmp", leftover.name):
                    leftover.unlink()

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.saved_step = self.finished_step = trainer.global_step
        self.saved_time = time.monotonic()
        if trainer.is_global_zero and trainer.global_step == 0 and not trainer.fast_dev_run:
            say_kept(checkpoint_folder(trainer))

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.stepping = True

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.finished_step:  # gradients are still being accumulated
            return
        self.note_step(trainer, module)
        late = False
        if self.minutes is not None:
            passed = time.monotonic() - self.saved_time
            late = trainer.strategy.broadcast(passed > self.minutes * 60)
        if late or trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)
            trainer.strategy.barrier("checkpoint")

    def note_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.stepping, self.finished_step = False, trainer.global_step
        self.finished = {"fit_loop": trainer.fit_loop.state_dict(), "progress": module.progress()}

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Save what is finished. No collective: the other ranks may be gone, or be waiting."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        if self.stepping and batches.processed == batches.ready:
            self.note_step(trainer, module)  # another callback failed after the step
        if self.stepping:
            print("the optimizer was interrupted: its weights are not saved", file=sys.stderr)
        elif self.finished_step > self.saved_step:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.finished_step > self.saved_step:
            self.save(trainer)
            trainer.strategy.barrier("checkpoint")

    def save(self, trainer: L.Trainer) -> None:
        """Write ``last.ckpt``; only the first rank does anything, and none in ``fast_dev_run``."""
        self.saved_step, self.saved_time = self.finished_step, time.monotonic()
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint["loops"]["fit_loop"] = self.finished["fit_loop"]
        checkpoint |= {"progress": self.finished["progress"], "global_step": self.finished_step}
        last = checkpoint_folder(trainer) / "last.ckpt"
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, last)
        if self.keep_all:
            link_or_copy(last, last.with_name(f"step-{self.saved_step}.ckpt"))


def say_kept(folder: Path) -> None:
    """Name the checkpoints of an earlier run, among which a new one's would lie."""
    if kept := sorted(path.name for path in folder.glob("step-*.ckpt")):
        print(
            f"{folder} keeps {', '.join(kept)} of an earlier run: move or delete them, lest they "
            "pass for this one's",
            file=sys.stderr,
        )


def link_or_copy(source: Path, name: Path) -> None:
    """Give a finished file a second name; a copy where the file system has no links."""
    temporary = name.with_name(name.name + ".tmp")
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    rename_durably(temporary, name)


def checkpoint_folder(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"
