"""A callback for benchmarks: what every training step cost, from its begin to the next one's."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L

WHILE_TRAINING = ("on_train_batch_start", "on_train_batch_end", "on_save_checkpoint")


class StepTimes(L.Callback):
    """Writes ``step_times.json`` into the run's folder; to be listed before all other callbacks.

    Then a step's time holds everything between two steps as well: hooks, saves, the next batch.
    ``cpu`` is the time that the training thread itself computed, which others on the machine
    hardly change; on a CPU with one thread the whole step runs there. ``wall`` is the clock.
    ``publisher`` is what the publisher's own hooks took between the first step and the last, by
    Lightning's profiler.
    """

    def __init__(self) -> None:
        self.begins: list[tuple[float, float]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.begins.append((time.thread_time(), time.perf_counter()))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = list(zip(self.begins, self.begins[1:], strict=False))
        times: dict[str, Any] = {
            clock: [after[i] - before[i] for before, after in steps]
            for i, clock in enumerate(("cpu", "wall"))
        }
        times["publisher"] = sum(
            sum(durations)
            for name, durations in trainer.profiler.recorded_durations.items()
            if "HubPublisher" in name and name.endswith(WHILE_TRAINING)
        )
        (Path(trainer.default_root_dir) / "step_times.json").write_text(json.dumps(times))
