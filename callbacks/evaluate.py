"""Prints the two tables of a run and keeps them as JSON."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from peagle.card.provenance import environment
from peagle.decode.acceptance import acceptance_rows
from peagle.decode.evaluation import Run
from peagle.serve.export import weights_sha256
from peagle.store.disk import write_atomically
from peagle.train.metrics import DepthReport, format_depths, format_table


class Evaluate(L.Callback):
    """Writes ``metrics/validate.json`` and ``metrics/acceptance.json`` of ``default_root_dir``.

    With ``fast_dev_run`` the tables are printed only.
    """

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.loaded_step = 0

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """`validate` and `test` leave the trainer's own step at 0."""
        self.loaded_step = checkpoint["global_step"]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn != "validate" or not trainer.is_global_zero:
            return  # during fit the logger and the progress bar show it
        report: DepthReport = module.depths.compute()
        loss = float(trainer.callback_metrics["val/loss"])
        print(f"\nPer-depth accuracy, teacher-forced, all positions; loss {loss:.3f}")
        print(format_depths(report))
        figures = zip(report.accuracy, report.conditional_accuracy, report.count, strict=True)
        rows = [
            {"depth": depth, "accuracy": accuracy, "conditional_accuracy": conditional, "count": n}
            for depth, (accuracy, conditional, n) in enumerate(figures)
        ]
        totals = {"teacher_forced_acceptance_length": report.acceptance_length, "loss": loss}
        self.write(trainer, module, "validate.json", totals | {"rows": rows})

    def on_test_start(self, *_: Any) -> None:
        self.runs = []

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: list[Run], *_: Any
    ) -> None:
        self.runs += outputs

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        runs = self.runs
        if trainer.world_size > 1:
            by_rank: list[list[Run]] = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(by_rank, runs)
            runs = [run for runs_of_rank in by_rank for run in runs_of_rank]
        if trainer.is_global_zero:
            config = trainer.datamodule.evaluation
            rows = acceptance_rows(runs, engine="peagle reference loop", dtype=config.dtype)
            print("\nAcceptance length, measured by speculative decoding")
            print(format_acceptance(rows))
            self.write(trainer, module, "acceptance.json", {"rows": rows})

    def write(
        self, trainer: L.Trainer, module: L.LightningModule, name: str, content: dict[str, Any]
    ) -> None:
        if trainer.fast_dev_run:
            return
        record = {
            "target": trainer.datamodule.target.name,
            "revision": trainer.datamodule.target.revision,
            "step": trainer.global_step or self.loaded_step,
            "weights_sha256": weights_sha256(module.drafter),  # the card shows no other's figures
            **environment(),
        }
        text = json.dumps({"provenance": record, **content}, indent=2)
        write_atomically(Path(trainer.default_root_dir) / "metrics" / name, text.encode())


def format_acceptance(rows: list[dict[str, Any]]) -> str:
    """The acceptance table that ``test`` prints."""
    header = ["prompts", "drafter", "K", "T", "acceptance length (95%)", "by position"]
    header += ["lossless", "tok/s", "without", "drafting"]
    lines = []
    for row in rows:
        low, high = row["acceptance_length_ci95"]
        lossless, milliseconds = row["lossless_prompts"], row["draft_ms_per_round"]
        turns = f", {row['turns']} turns" if row["turns"] > row["prompts"] else ""
        lines.append(
            [
                f"{row['prompt_set']} ({row['prompts']}{turns})",
                row["method"],
                str(row["k"]),
                f"{row['temperature']:g}",
                f"{row['acceptance_length']:.2f} ({low:.2f}-{high:.2f})",
                " ".join(f"{share:.2f}" for share in row["per_position"]),
                "sampled" if lossless is None else f"{lossless}/{row['prompts']}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['baseline_tokens_per_second']:.0f}",
                "" if milliseconds is None else f"{milliseconds:.2f} ms",
            ]
        )
    return format_table(header, lines)
