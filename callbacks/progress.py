"""What a run shows and logs: a bar or lines, speed, ``metrics/train.csv`` and its curve."""

import csv
import io
import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from peagle.card.run_files import accuracies, read_curve
from peagle.decode.acceptance import acceptance_length
from peagle.decode.evaluation import Run
from peagle.kernels.device import peak_memory
from peagle.progress import LINE_EVERY_S, Lines
from peagle.store.disk import write_atomically

FLUSH_EVERY = 20  # logged lines between writes


class Progress(TQDMProgressBar):
    """Lightning's bar on terminals, else a line every half minute; logs speed, memory, rate.

    ``train/tokens_per_second`` and ``train/memory_gb`` (the peak of the first rank, 10**9 bytes)
    and ``train/lr`` go to every logger.
    """

    logs = ("train/tokens_per_second", "train/memory_gb", "train/lr")

    def __init__(self, refresh_rate: int = 1):
        self.shows_bar = sys.stderr.isatty()
        super().__init__(refresh_rate=refresh_rate if self.shows_bar else 0)
        self.lines: dict[str, Lines] = {}  # by stage; none on terminals
        self.speed = Speed()

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*args)
        metrics.pop("v_num", None)
        return metrics

    def start(self, trainer: L.Trainer, stage: str, total: int | float, done: int = 0) -> None:
        if not self.shows_bar and trainer.is_global_zero:
            whole = int(total) if math.isfinite(total) else None
            self.lines[stage] = Lines(stage, whole, done=done)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if trainer.is_global_zero:
            print(f"training {parameters(module.drafter)}", file=sys.stderr)
        self.start(trainer, "fit", trainer.estimated_stepping_batches, trainer.global_step)
        self.speed.start(trainer.global_step, module.tokens_trained)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, module, *rest)
        if trainer.global_step == self.speed.step:  # gradients are still being accumulated
            return
        self.speed.step = trainer.global_step
        every = trainer.log_every_n_steps  # 0: never
        if every and trainer.global_step % every == 0:
            self.log_speed(trainer, module)
        if lines := self.lines.get("fit"):
            lines.done = trainer.global_step
            if lines.is_due() or lines.done == lines.total:
                per_second = self.speed.over_all(module.tokens_trained) * trainer.world_size
                lines.show(*figures(trainer, "train"), f"{per_second:,.0f} tokens/s")

    def log_speed(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        per_second = self.speed.since_last(module.tokens_trained) * trainer.world_size
        if not trainer.loggers:
            return
        memory = peak_memory(module.device) / 1e9
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        for name, value in zip(self.logs, (per_second, memory, rate), strict=True):
            self.log(name, float(value), batch_size=1)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_validation_start(trainer, module)
        self.speed.pause()
        if not trainer.sanity_checking:
            self.start(trainer, "validate", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        super().on_validation_batch_end(trainer, *rest)
        if not trainer.sanity_checking and (lines := self.lines.get("validate")):
            lines.update()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_validation_end(trainer, module)
        self.speed.resume()
        if self.lines and trainer.state.fn == "fit" and not trainer.sanity_checking:
            found = ", ".join(figures(trainer, "val"))
            print(f"step {trainer.global_step}, validation: {found}", file=sys.stderr)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_test_start(trainer, module)
        self.accepted: list[list[int]] = []
        self.start(trainer, "test", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: list[Run], *rest: Any
    ) -> None:
        super().on_test_batch_end(trainer, module, outputs, *rest)
        if lines := self.lines.get("test"):
            widest = max((run.k for run in outputs), default=0)
            self.accepted += [x for r in outputs if r.k == widest for x in r.decoded.accepted]
            lines.done += 1
            if lines.is_due():
                length = acceptance_length(self.accepted)
                lines.show(f"acceptance length {length:.2f} at K = {widest}")


class Speed:
    """Tokens per second of training; the time of validation does not count."""

    def start(self, step: int, tokens: int) -> None:
        self.step = step
        self.first = self.last = (time.monotonic(), tokens)
        self.paused = 0.0

    def __init__(self) -> None:
        self.start(0, 0)

    def pause(self) -> None:
        self.paused = time.monotonic()

    def resume(self) -> None:
        away = time.monotonic() - self.paused
        self.first, self.last = ((at + away, tokens) for at, tokens in (self.first, self.last))

    def over_all(self, tokens: int) -> float:
        at, before = self.first
        return (tokens - before) / max(time.monotonic() - at, 1e-9)

    def since_last(self, tokens: int) -> float:
        at, before = self.last
        self.last = (time.monotonic(), tokens)
        return (tokens - before) / max(self.last[0] - at, 1e-9)


def figures(trainer: L.Trainer, part: str) -> list[str]:
    """Loss, accuracy by depth and acceptance, as far as they were logged."""
    metrics = trainer.callback_metrics
    found = [f"loss {metrics[f'{part}/loss']:.3f}"] if f"{part}/loss" in metrics else []
    if depths := accuracies(metrics, part).values():
        found.append("accuracy by depth " + " ".join(f"{value:.2f}" for value in depths))
    if "val/acceptance_length" in metrics:
        found.append(f"acceptance {float(metrics['val/acceptance_length']):.2f} (teacher-forced)")
    return found


def parameters(drafter: nn.Module) -> str:
    """ "a drafter of 2.6 M parameters"."""
    count = sum(parameter.numel() for parameter in drafter.parameters())
    frozen = sum(p.numel() for p in drafter.parameters() if not p.requires_grad)
    rest = f", {frozen / 1e6:.1f} M of them frozen" if frozen else ""
    return f"a drafter of {count / 1e6:.1f} M parameters{rest}"


class TrainCsv(Logger):
    """One line per logged step; a column appears when its metric is first logged.

    A resumed run keeps the lines up to its checkpoint and goes on from there. ``metrics/curve.png``
    shows loss and accuracy: it is drawn again after each validation, at the end, and when the lines
    are written, but then not more often than every half minute.

    Args:
        run_dir: the run's folder, given by ``--run_dir``; the file is its ``metrics/train.csv``.
    """

    def __init__(self, run_dir: str):
        super().__init__()
        self.path = Path(run_dir) / "metrics" / "train.csv"
        self.lines: dict[int, dict[str, float]] = {}
        self.unsaved, self.drawn = 0, -math.inf

    @property
    def name(self) -> str:
        return "train"

    @property
    def version(self) -> str:
        return ""

    def continue_from(self, step: int) -> None:
        """Keep what an earlier run logged before ``step``."""
        if self.path.exists() and not self.lines:
            with open(self.path, newline="") as file:
                for line in csv.DictReader(file):
                    if int(line["step"]) < step:
                        values = {k: float(v) for k, v in line.items() if k != "step" and v}
                        self.lines[int(line["step"])] = values

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        if step is None or not values:
            return
        self.continue_from(step)
        self.lines.setdefault(step, {}).update(values)
        self.unsaved += 1
        validated = "val/loss" in values
        if validated or self.unsaved >= FLUSH_EVERY:
            self.save()
        if validated or (not self.unsaved and time.monotonic() - self.drawn >= LINE_EVERY_S):
            self.draw()

    @rank_zero_only
    def save(self) -> None:
        if not self.lines:  # nothing was trained: an earlier run's curve stays
            return
        columns = sorted({key for values in self.lines.values() for key in values})
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": step, **values} for step, values in self.lines.items())
        write_atomically(self.path, text.getvalue().encode())
        self.unsaved = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.unsaved:
            self.save()
            self.draw()

    def draw(self) -> None:
        from peagle.card.plots import draw_curve  # matplotlib is slow to load

        picture = draw_curve(read_curve(self.path))
        if picture is not None:
            write_atomically(self.path.with_name("curve.png"), picture)
        self.drawn = time.monotonic()
