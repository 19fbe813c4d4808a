"""What a running fit shows and logs: a progress bar on terminals, and ``metrics/train.csv``."""

import csv
import io
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from peagle.store.disk import write_atomically

FLUSH_EVERY = 20  # logged lines between writes


class Progress(TQDMProgressBar):
    """Lightning's bar, silent when the output is no terminal."""

    def __init__(self, refresh_rate: int = 1):
        super().__init__(refresh_rate=refresh_rate if sys.stderr.isatty() else 0)

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*args)
        metrics.pop("v_num", None)
        return metrics


class TrainCsv(Logger):
    """One line per logged step; a column appears when its metric is first logged.

    A resumed run keeps the lines up to its checkpoint and goes on from there.

    Args:
        run_dir: the run's folder, given by ``--run_dir``; the file is its ``metrics/train.csv``.
    """

    def __init__(self, run_dir: str):
        super().__init__()
        self.path = Path(run_dir) / "metrics" / "train.csv"
        self.lines: dict[int, dict[str, float]] = {}
        self.unsaved = 0

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
        if self.unsaved >= FLUSH_EVERY:
            self.save()

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
