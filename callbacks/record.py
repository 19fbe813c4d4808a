"""What a run was: ``provenance.json`` as it trains, the model card once its figures exist."""

import json
import re
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from peagle.capture.prompts import PromptSource
from peagle.card.card import CardOptions, write_card
from peagle.card.provenance import environment
from peagle.card.run_files import RunFiles, read_json, sha256
from peagle.card.target_license import license_of
from peagle.card.target_name import HubName, hub_name_of
from peagle.store.disk import write_atomically
from peagle.store.hub import HubStore
from peagle.store.reader import Store
from peagle.target.target import TargetSource


class RunRecord(L.Callback):
    """Writes ``provenance.json`` and ``card/``; list it after ``Evaluate``. Nothing in
    ``fast_dev_run``.

    Args:
        license: of the drafter; default the target's, as its README's front matter names it.
        base_model_relation: how the Hub files the drafter under its target.
        repo_id: the name that the card's serving lines use; default where ``HubPublisher`` sends
            the drafter, or else its folder.
        base_model: Hub id of a target that is given as a folder; default what the folder's own
            files say.
    """

    def __init__(
        self,
        license: str | None = None,
        base_model_relation: Literal["adapter", "finetune", "merge", "quantized"] = "adapter",
        repo_id: str | None = None,
        base_model: str | None = None,
    ):
        self.options = CardOptions(
            base_model_relation=base_model_relation,
            license=license,
            repo_id=repo_id,
            base_model=base_model,
        )
        self.started, self.hours_before = time.monotonic(), 0.0
        self.target_license: str | None = None
        self.hub_name: HubName | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.monotonic()
        self.hours_before = earlier_record(trainer).get("training", {}).get("hours", 0.0)
        if trainer.is_global_zero:
            target = trainer.datamodule.target
            self.target_license = license_of(target.name, target.path, target.revision)
            self.hub_name = hub_name_of(Path(target.path))
            if self.hub_name and not self.options.base_model:
                print(f"the card will call the target {self.hub_name.hub_id}, after "
                      f"{self.hub_name.source}; `base_model` of RunRecord names another",
                      file=sys.stderr)  # fmt: skip
        self.write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, *_: Any) -> None:
        run_dir = Path(trainer.default_root_dir)
        was_trained = (run_dir / "provenance.json").exists() and (run_dir / "drafter").exists()
        if trainer.is_global_zero and was_trained and not trainer.fast_dev_run:
            write_card(run_dir, run_dir / "drafter", run_dir / "card", options=self.options)
            print(f"\nwrote {run_dir / 'card' / 'README.md'}")
            if not RunFiles.read(run_dir, run_dir / "drafter").acceptance.rows:
                print("the card leaves these figures out: they are of other weights than "
                      f"{run_dir / 'drafter'}", file=sys.stderr)  # fmt: skip

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        data = trainer.datamodule
        hours = self.hours_before + (time.monotonic() - self.started) / 3600
        record = {
            "run_id": earlier_record(trainer).get("run_id", uuid.uuid4().hex[:12]),
            "target": target_section(data.target, data.store, self.target_license, self.hub_name),
            "training": training_section(trainer, pl_module, hours),
            "data": data_section(data.store),
            "environment": environment(),
        }
        path = Path(trainer.default_root_dir) / "provenance.json"
        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def earlier_record(trainer: L.Trainer) -> dict[str, Any]:
    """The record that this run goes on with; a run at step 0 is new, whatever its folder holds."""
    path = Path(trainer.default_root_dir) / "provenance.json"
    return read_json(path) if trainer.global_step else {}


def target_section(
    target: TargetSource, store: Store, license: str | None, hub_name: HubName | None
) -> dict[str, Any]:
    folder = Path(target.name)
    config = target.config()
    return {
        "name_or_path": str(folder.resolve()) if folder.is_dir() else target.name,
        "hub_id": hub_name and hub_name.hub_id,
        "hub_id_from": hub_name and hub_name.source,
        "revision": target.revision or (hub_name and hub_name.revision),
        "architecture": (config.architectures or [None])[0],
        "license": license,
        "fingerprint": store.manifest.fingerprint,
    }


def training_section(
    trainer: L.Trainer, pl_module: L.LightningModule, hours: float
) -> dict[str, Any]:
    optimizer = trainer.optimizers[0]
    return {
        **asdict(pl_module.cod),
        "loss": loss_of(pl_module.mix, pl_module.depth_decay),
        "optimizer": type(optimizer).__name__,
        "lr": optimizer.param_groups[0].get("initial_lr"),
        "steps": trainer.global_step,
        "tokens": pl_module.tokens_trained * trainer.world_size,
        "rows": pl_module.rows_trained * trainer.world_size,
        "hours": round(hours, 4),
        "init_from": source_of(trainer, pl_module),
        "seed": trainer.datamodule.seed,
        "precision": str(trainer.precision),
        "max_tokens": trainer.datamodule.max_tokens,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
    }


def source_of(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str] | None:
    """The drafter that training started from; a resumed run has it in its record alone."""
    return pl_module.started_from or earlier_record(trainer).get("training", {}).get("init_from")


def loss_of(mix: dict[str, float], depth_decay: float) -> str:
    """ "kl", or "0.5 kl + 0.5 tv, weighted 0.8^depth"."""
    weighted = "" if depth_decay == 1 else f", weighted {depth_decay:g}^depth"
    if list(mix.values()) == [1.0]:
        return next(iter(mix)) + weighted
    return " + ".join(f"{weight:g} {name}" for name, weight in mix.items()) + weighted


def data_section(store: Store) -> dict[str, Any]:
    made = json.loads((store.folder / "capture.json").read_text())
    converted = made.get("speculators")
    sources = [] if converted else [PromptSource(**source) for source in made["prompts"]]
    own = not converted and made.get("regenerate", True)  # the target wrote the answers itself
    # The name of a file, but never the path to it: the card is published.
    names = [x.source if x.on_hub else Path(x.source).name for x in sources]
    return {
        "prompts": ", ".join(names) or None,
        "store": str(store.address) if isinstance(store, HubStore) else None,
        "samples": len(store),
        "regenerated": None if converted else made.get("regenerate", True),  # None: not known
        "tokens": sum(entry.tokens for entry in store.entries),
        "supervised_tokens": sum(entry.supervised for entry in store.entries),
        **{k: made[k] for k in ("greedy_share", "temperature", "max_new_tokens") if own},
        "manifest_sha256": sha256(store.folder / "manifest.json"),
        "datasets": [source.address().repository for source in sources if source.on_hub],
    }


class RunConfig(SaveConfigCallback):
    """Keeps the configuration of ``fit`` in the run's folder; no other command touches it.

    A new run replaces what an earlier one has left there; a run that is continued with other
    settings keeps both.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Too early: whether a checkpoint is loaded is known when training starts."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        content = self.parser.dump(self.config, skip_none=False).encode()
        path, number = folder / "config.yaml", 1
        if trainer.global_step == 0:
            for resumed in folder.glob("config.resume-*.yaml"):
                if re.fullmatch(r"config\.resume-\d+\.yaml", resumed.name):
                    resumed.unlink()
        else:
            while path.exists() and path.read_bytes() != content:
                number += 1
                path = folder / f"config.resume-{number}.yaml"
        write_atomically(path, content)
