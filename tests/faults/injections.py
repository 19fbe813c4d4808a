"""Callbacks that write down exactly what a run computed, and others that break it on purpose."""

import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import lightning as L
import torch
import xxhash


def path_of(trainer: L.Trainer, name: str) -> Path:
    return Path(trainer.default_root_dir) / f"{name}-{trainer.global_rank}.txt"


def note(trainer: L.Trainer, name: str, line: str) -> None:
    """Append a line that survives whatever happens to the process next."""
    with open(path_of(trainer, name), "a") as file:
        file.write(line + "\n")


def batches(trainer: L.Trainer) -> int:
    """Number of the batch in hand, counted from 1 over all epochs."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


class Losses(L.Callback):
    """Number of the batch and its exact loss."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        note(trainer, "losses", f"{batches(trainer)} {float(outputs['loss']).hex()}")


class Documents(L.Callback):
    """The first tokens of every document of every batch: which samples were trained, when."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        first = torch.nonzero(batch.position == 0).flatten().tolist()
        names = [".".join(map(str, batch.tokens[i : i + 6].tolist())) for i in first]
        note(trainer, "documents", f"{trainer.current_epoch} {batches(trainer)} {' '.join(names)}")


class States(L.Callback):
    """A hash of all weights and of the optimizer's state after every batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        hash_ = xxhash.xxh3_64()
        for parameter in pl_module.drafter.parameters():
            hash_.update(parameter.detach().numpy().tobytes())
        for state in trainer.optimizers[0].state.values():
            for value in state.values():
                hash_.update(value.numpy().tobytes())
        note(trainer, "states", f"{batches(trainer)} {hash_.hexdigest()}")


class Slow(L.Callback):
    """Takes at least so many seconds for every batch."""

    def __init__(self, seconds: float, validation_seconds: float = 0.0):
        self.seconds, self.validation_seconds = seconds, validation_seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        note(trainer, "sleeping", str(batches(trainer)))
        time.sleep(self.seconds)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        note(trainer, "validating", str(batch_idx))
        time.sleep(self.validation_seconds)


class Fail(L.Callback):
    """Ends the run in a given batch and phase: by kill -9, or by an exception."""

    def __init__(self, batch: int, phase: str, kill: bool, rank: int = 0):
        self.batch, self.phase, self.kill, self.rank = batch, phase, kill, rank

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.fail(trainer, "update"))

    def fail(self, trainer, phase):
        if (phase, batches(trainer), trainer.global_rank) != (self.phase, self.batch, self.rank):
            return
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f"injected in {phase} of batch {self.batch}")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.fail(trainer, "start")

    def on_after_backward(self, trainer, pl_module):
        self.fail(trainer, "backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.fail(trainer, "optimizer")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.fail(trainer, "end")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.fail(trainer, "validation")


class Poison(L.Callback):
    """Makes the hidden states of some batches of one rank not finite."""

    def __init__(self, batches: list[int], rank: int = 0):
        self.batches, self.rank = batches, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batches(trainer) in self.batches and trainer.global_rank == self.rank:
            batch.aux[0, 0] = torch.nan


class Ballast(L.Callback):
    """Makes checkpoints large."""

    def __init__(self, megabytes: int):
        self.megabytes = megabytes

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["ballast"] = torch.ones(self.megabytes * 250_000)


class PlainBallast(L.Callback):
    """Makes checkpoints large by plain data, whose size nobody can tell before it is written."""

    def __init__(self, megabytes: int):
        self.text = "x" * megabytes * 1_000_000

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["ballast"] = self.text


class KillInSave(Ballast):
    """kill -9 at a random moment from the start of a save to a little after its usual end."""

    def __init__(self, megabytes: int, seed: int, seconds: float):
        super().__init__(megabytes)
        self.delay = random.Random(seed).uniform(0, seconds)

    def on_train_start(self, trainer, pl_module):
        """What the start did not clean up would lie there now."""
        for path in Path(trainer.default_root_dir).rglob("*.tmp"):
            note(trainer, "stale", path.name)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


class LimitFiles(L.Callback):
    """From a given batch on, no file can grow beyond a limit."""

    def __init__(self, megabytes: int, batch: int):
        self.bytes, self.batch = megabytes * 1_000_000, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batches(trainer) == self.batch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, self.bytes))


class Segments(L.Callback):
    """How many segments each batch has."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        note(trainer, "segments", f"{batches(trainer)} {len(batch.segments)}")
