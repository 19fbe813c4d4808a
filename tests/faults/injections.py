"""Callbacks that break a run on purpose, and one that writes down what it computed."""

import os
from pathlib import Path

import lightning as L


class Losses(L.Callback):
    """Appends step and exact loss of every batch to ``losses-RANK.txt``, at once."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        path = Path(trainer.default_root_dir) / f"losses-{trainer.global_rank}.txt"
        progress = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        with open(path, "a") as file:
            file.write(f"{progress} {float(outputs['loss']).hex()}\n")
