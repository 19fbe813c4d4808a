"""Runs for the tests of publishing: finished folders, and a real training of a tiny drafter.

As a script it is the process that those tests kill or time: ``hub_runs.py TASK`` with a JSON task.
"""

import hashlib
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from peagle.publish.publish import publish_run
from peagle.publish.queue import waiting_entries
from peagle.publish.upload import Destination

REPO = "alice/drafter"
PUBLISHED = {
    "README.md", "accuracy.png", "config.json", "metrics/validate.json", "model.safetensors",
    "provenance.json",
}  # fmt: skip


def finish_run(run_dir: Path, *, step: int, run_id: str = "run-1") -> str:
    """Write everything that a finished run holds; return the sha256 of its weights."""
    for folder in ("drafter", "card", "metrics", "checkpoints"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    weights = run_dir / "drafter/model.safetensors"
    values = np.random.default_rng(step).standard_normal((50, 40), dtype=np.float32)
    save_file({"fc.weight": values}, weights)
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()
    config = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}
    (run_dir / "drafter/config.json").write_text(json.dumps(config))
    (run_dir / "card/README.md").write_text(
        f"---\nlicense: mit\n---\n# Step {step}\n\n| Drafter weights, sha256 | `{sha}` |\n"
        f"| Run | `{run_id}` |\n| Steps | {step:,} |\n"
    )
    (run_dir / "card/accuracy.png").write_bytes(b"\x89PNG" + bytes([step % 256]) * 50)
    (run_dir / "metrics/validate.json").write_text(json.dumps({"rows": [], "step": step}))
    (run_dir / "metrics/train.csv").write_text(f"step,loss\n{step},1.0\n")
    (run_dir / "provenance.json").write_text(json.dumps({"run_id": run_id, "step": step}))
    (run_dir / "checkpoints/last.ckpt").write_bytes(b"optimizer")
    return sha


def queued(run_dir: Path) -> list[int]:
    return [entry.step for entry in waiting_entries(run_dir / "hub_spool")]


def publish(run_dir: Path, endpoint: str, *, publish_timeout: float = 90.0, **changed):
    options = {"private": True, "revision": None, "dry_run": False} | changed
    destination = Destination(REPO, options["private"], options["revision"], endpoint)
    return publish_run(
        run_dir, destination, dry_run=options["dry_run"], publish_timeout=publish_timeout
    )


def fit(
    run_dir: Path, steps: int, *callbacks, finished_by: str = "fit", **trainer_options
) -> list[float]:
    """Train a tiny drafter; return the loss of every step.

    The run is finished (drafter and card) by the fit itself, or as the command line does it: the
    drafter is exported after the fit, and the card is written at the end of a test.
    """
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from peagle.card.card import write_card
    from peagle.model.config import PEagleConfig
    from peagle.model.p_eagle import PEagleDrafter
    from peagle.serve.export import export_drafter

    class Tiny(L.LightningModule):
        def __init__(self):
            super().__init__()
            shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
            self.drafter = PEagleDrafter(PEagleConfig(vocab_size=32, **shape, **heads))
            self.losses: list[float] = []

        def training_step(self, batch, batch_idx):
            noise = torch.randn(batch.shape[0], 16)  # so that a draw by anybody else would show
            loss = (self.drafter.fc(batch) - noise).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def test_step(self, batch, batch_idx):
            """Nothing is measured."""

    class Finish(L.Callback):
        def on_fit_end(self, trainer, pl_module):
            if trainer.is_global_zero and finished_by == "fit":
                export_drafter(pl_module.drafter, run_dir / "drafter")
                write_card(run_dir, run_dir / "drafter", run_dir / "card")
            print("finished", time.time(), flush=True)

        def on_test_end(self, trainer, pl_module):
            write_card(run_dir, run_dir / "drafter", run_dir / "card")

    L.seed_everything(7, verbose=False)
    module, data = Tiny(), torch.randn(4 * steps, 48)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        default_root_dir=run_dir,
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Finish(), *callbacks],
        **(options | trainer_options),
    )
    trainer.fit(module, DataLoader(data, batch_size=4))
    if finished_by == "test":
        export_drafter(module.drafter, run_dir / "drafter")
        trainer.test(module, DataLoader(data[:4]), verbose=False)
    return module.losses


def main() -> None:
    task = json.loads(sys.argv[1])
    run_dir = Path(task["run_dir"])
    if task["do"] == "publish":
        publish(run_dir, task["endpoint"])
        return
    from peagle.callbacks.hub import HubPublisher

    publisher = HubPublisher(
        task["repo_id"], endpoint=task["endpoint"], publish_timeout=task["publish_timeout"]
    )
    losses = fit(run_dir, 6, publisher, **task["trainer"])
    print("losses", json.dumps(losses))
    lingering = [t.name for t in threading.enumerate() if not t.daemon and t.name != "MainThread"]
    print("lingering", json.dumps(lingering))
    print("returned", time.time(), flush=True)


if __name__ == "__main__":
    main()
