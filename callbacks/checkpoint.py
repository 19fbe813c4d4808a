"""Checkpoints that are never torn: written beside the old one, synced, then renamed.

Lightning stages a checkpoint in the system's temporary folder and moves it; when that is another
file system, a kill or a full disk in the middle destroys the previous checkpoint.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Checkpoint as BaseCheckpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves by rename within one folder, loads tensors and plain data only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Raises ``OSError`` with need and have when the disk is full; the old file stays."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            need, have = size_of(checkpoint), shutil.disk_usage(path.parent).free
            raise OSError(
                f"checkpoint {path} could not be written ({error}): it needs {need / 1e6:.1f} MB, "
                f"{have / 1e6:.1f} MB are free; the previous checkpoint is untouched"
            ) from error

    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises ``ValueError`` for http(s) addresses, whatever the caller asked for."""
        if str(path).startswith(("http://", "https://")):
            raise ValueError(f"{path}: checkpoints are loaded from files or hf:// only")
        return super().load_checkpoint(path, map_location=map_location, weights_only=True)


def size_of(checkpoint: Any) -> int:
    """Bytes of all tensors in a nested checkpoint."""
    if isinstance(checkpoint, torch.Tensor):
        return checkpoint.nbytes
    if isinstance(checkpoint, dict):
        return sum(map(size_of, checkpoint.values()))
    if isinstance(checkpoint, list | tuple):
        return sum(map(size_of, checkpoint))
    return 0


class Checkpoint(BaseCheckpoint):
    """``checkpoints/last.ckpt``, renewed every so many steps or minutes, and after an exception.

    Lightning's ``ModelCheckpoint`` ranks checkpoints by a metric; a drafter is trained to the end
    of its schedule, so the last one is the one that counts.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        minutes: also after this much time, when given.
        keep_all: keep a copy of each, ``step-N.ckpt``.
    """

    def __init__(
        self, every_n_steps: int = 1000, minutes: float | None = None, keep_all: bool = False
    ):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps, self.minutes, self.keep_all = every_n_steps, minutes, keep_all
        self.saved_step, self.saved_time = 0, time.monotonic()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit":
            for leftover in folder_of(trainer).glob("*.tmp"):
                leftover.unlink()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_step, self.saved_time = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self.saved_step:  # gradients are still being accumulated
            return
        late = self.minutes and time.monotonic() - self.saved_time > self.minutes * 60
        if trainer.strategy.broadcast(bool(late)) or step % self.every_n_steps == 0:
            self.save(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if trainer.training and trainer.global_step > self.saved_step:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self.saved_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write ``last.ckpt`` on rank 0; every rank must call this."""
        self.saved_step, self.saved_time = trainer.global_step, time.monotonic()
        last = folder_of(trainer) / "last.ckpt"
        trainer.save_checkpoint(last)
        if self.keep_all and trainer.is_global_zero:
            shutil.copyfile(last, last.with_name(f"step-{self.saved_step}.ckpt"))


def folder_of(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"
