"""What a run was: ``provenance.json`` as it trains, the model card once its figures exist."""

import hashlib
import json
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
from huggingface_hub import ModelCard, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from peagle.capture.prompts import PromptSource
from peagle.card.card import CardOptions, write_card
from peagle.card.provenance import environment
from peagle.store.disk import write_atomically
from peagle.store.hub import HubStore
from peagle.store.reader import Store
from peagle.target.target import TargetSource


class RunRecord(L.Callback):
    """Writes ``provenance.json`` and ``card/``; list it after ``Evaluate``.

    Args:
        license: of the drafter; default the target's, as its README's front matter names it.
        base_model_relation: how the Hub files the drafter under its target.
        repo_id: the name that the card's serving lines use; default where ``HubPublisher`` sends
            the drafter, or else its folder.
    """

    def __init__(
        self,
        license: str | None = None,
        base_model_relation: Literal["adapter", "finetune", "merge", "quantized"] = "adapter",
        repo_id: str | None = None,
    ):
        self.options = CardOptions(
            base_model_relation=base_model_relation, license=license, repo_id=repo_id
        )
        self.started, self.hours_before = time.monotonic(), 0.0
        self.target_license: str | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.monotonic()
        self.hours_before = read(trainer).get("training", {}).get("hours", 0.0)
        if trainer.global_step == 0:  # a new run, whatever lay in its folder
            self.hours_before = 0.0
        if trainer.is_global_zero:
            self.target_license = license_of(trainer.datamodule.target)
        self.write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run_dir = Path(trainer.default_root_dir)
        if trainer.is_global_zero and (run_dir / "drafter").exists() and read(trainer):
            write_card(run_dir, run_dir / "drafter", run_dir / "card", options=self.options)
            print(f"\nwrote {run_dir / 'card' / 'README.md'}")

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        known = read(trainer) if trainer.global_step else {}
        hours = self.hours_before + (time.monotonic() - self.started) / 3600
        record = {
            "run_id": known.get("run_id", uuid.uuid4().hex[:12]),
            "target": target_facts(data.target, data.store, self.target_license),
            "training": training_facts(trainer, pl_module, hours),
            "data": data_facts(data.store),
            "environment": environment(),
        }
        path = Path(trainer.default_root_dir) / "provenance.json"
        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def read(trainer: L.Trainer) -> dict[str, Any]:
    path = Path(trainer.default_root_dir) / "provenance.json"
    return json.loads(path.read_text()) if path.exists() else {}


def license_of(target: TargetSource) -> str | None:
    """What the front matter of the target's README names; None where it names nothing.

    What cannot be read is said in one line, and ends no training.
    """
    try:
        readme = readme_of(target)
        # The client complains about a page without front matter, which is no fault here.
        named = ModelCard(readme, ignore_metadata_errors=True).data if readme[:3] == "---" else {}
    except Exception as error:  # the client raises whatever its transport or a page brings
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"licence of {target.name}: not known ({first}); give RunRecord a `license`",
              file=sys.stderr)  # fmt: skip
        return None
    license = named.get("license")
    if license == "other":
        license = named.get("license_name") or license
    return license if isinstance(license, str) else None


def readme_of(target: TargetSource) -> str:
    """The target's README at its own revision; "" where there is none.

    One request of ten seconds at most: a download by the client repeats one that hangs for more
    than a minute.
    """
    path = Path(target.path)
    if path.is_dir():
        return (path / "README.md").read_text("utf-8") if (path / "README.md").exists() else ""
    cached = try_to_load_from_cache(target.name, "README.md", revision=target.revision)
    if isinstance(cached, str):
        return Path(cached).read_text("utf-8")
    address = hf_hub_url(target.name, "README.md", revision=target.revision)
    answer = get_session().get(
        address, headers=build_hf_headers(), timeout=10, follow_redirects=True
    )
    if answer.status_code == 404:
        return ""
    hf_raise_for_status(answer)
    return answer.text


def target_facts(target: TargetSource, store: Store, license: str | None) -> dict[str, Any]:
    folder = Path(target.name)
    config = target.config()
    return {
        "name_or_path": str(folder.resolve()) if folder.is_dir() else target.name,
        "revision": target.revision,
        "architecture": (config.architectures or [None])[0],
        "license": license,
        "fingerprint": store.manifest.fingerprint,
    }


def training_facts(
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
        "seed": trainer.datamodule.seed,
        "precision": str(trainer.precision),
        "max_tokens": trainer.datamodule.max_tokens,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
    }


def loss_of(mix: dict[str, float], depth_decay: float) -> str:
    """ "kl", or "0.5 kl + 0.5 tv, weighted 0.8^depth"."""
    weighted = "" if depth_decay == 1 else f", weighted {depth_decay:g}^depth"
    if list(mix.values()) == [1.0]:
        return next(iter(mix)) + weighted
    return " + ".join(f"{weight:g} {name}" for name, weight in mix.items()) + weighted


def data_facts(store: Store) -> dict[str, Any]:
    made = json.loads((store.folder / "capture.json").read_text())
    converted = made.get("speculators")
    sources = [] if converted else [PromptSource(**source) for source in made["prompts"]]
    own = not converted and made.get("regenerate", True)  # the target wrote the answers itself
    manifest = (store.folder / "manifest.json").read_bytes()
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
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "datasets": [source.address().repository for source in sources if source.on_hub],
    }
