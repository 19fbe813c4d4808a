"""The identity of a store that a run needs, and whether a folder holds it or another one."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from peagle.capture.config import CaptureConfig
from peagle.model.config import default_layer_ids
from peagle.store.errors import StoreError
from peagle.store.locks import locked
from peagle.store.manifest import Manifest
from peagle.target.from_files import quantization_of
from peagle.target.target import TargetSource, tokenizer_hash

PARTIAL = "partial"  # folder of a store that is being made
NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def wanted_manifest(target: TargetSource, config: CaptureConfig) -> Manifest:
    """The identity that a store for this run must have; loads no weights."""
    text = target.config()  # first: an unknown target is said in one sentence
    return Manifest(
        target=target.name,
        revision=target.revision,
        fingerprint=target.fingerprint(),
        tokenizer=tokenizer_hash(target.tokenizer()),
        answers=config.answers_hash(),
        engine=engine_of(target, config),
        **manifest_fields(text, config),
    )


def made_with(target: TargetSource, config: CaptureConfig) -> dict[str, Any]:
    """What conversations and states depend on; of a target in a folder also where answers end.

    A Hub id's commit, in the fingerprint, holds its end tokens. Stores of before do not name any.
    """
    made = config.made_with()
    if config.speculators is None and Path(target.path).is_dir():
        made["end_tokens"] = sorted(target.end_tokens())
    return made


def engine_of(target: TargetSource, config: CaptureConfig) -> dict[str, Any] | None:
    """What runs the target, and how it rounds weights and cache; unknown for states of others."""
    if config.speculators is not None or config.servers:
        return None
    quantized = quantization_of(target.load(AutoConfig))
    return {
        "name": config.engine,
        "version": transformers.__version__ if config.engine == "transformers" else None,
        "quantization": argument_of(config.vllm_args, "--quantization", "-q") or quantized,
        "kv_cache_dtype": argument_of(config.vllm_args, "--kv-cache-dtype") or "auto",
    }


def argument_of(arguments: Sequence[str], *names: str) -> str | None:
    """What a command line gives for an option: ``--name value`` or ``--name=value``."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in names:
            return value or next(iter(arguments[place + 1 :]), None)
    return None


def manifest_fields(text: PretrainedConfig, config: CaptureConfig) -> dict[str, Any]:
    """Those fields of a manifest that follow from the target's configuration alone.

    Raises:
        ValueError: if the target has no such ``layer_ids`` or ``start_layers``, or is of a family
            whose states no drafter can be built on.
    """
    refuse_other_families(text)
    layers = text.num_hidden_layers
    ids = tuple(config.layer_ids or default_layer_ids(layers))
    if list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] > layers:
        raise ValueError(f"layer_ids must be ascending, unique and in 0..{layers}, got {ids}")
    beyond = [i for i in config.start_layers or () if not 0 <= i < layers]
    if beyond:
        raise ValueError(f"start_layers must lie in 0..{layers - 1}, got {beyond[0]}")
    return {
        "layer_ids": ids,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "num_layers": layers,
        "dtype": "bfloat16",
        "rms_norm_eps": text.rms_norm_eps,
        "softcap": getattr(text, "final_logit_softcapping", None),
        "block": llama_block(text),
    }


def refuse_other_families(text: PretrainedConfig) -> None:
    """Raise ``ValueError`` where a configuration lacks what a drafter takes from its target."""
    missing = [name for name in NEEDED if getattr(text, name, None) is None]
    if missing:
        norm = " (its final norm must be an RMS norm)" if "rms_norm_eps" in missing else ""
        raise ValueError(
            f"peagle does not support targets of type {text.model_type}: their configuration has "
            f"no {' and no '.join(missing)}{norm}"
        )


def llama_block(text: PretrainedConfig) -> dict[str, Any]:
    """The target's layer shape in the names of a Llama block.

    Where layers differ (Gemma 4), the first one's: those with a window, of which there are most.
    """
    per_layer = getattr(text, "per_layer_config", None)
    layer = per_layer[0] if per_layer else text
    heads = text.num_attention_heads
    return {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(layer, "num_key_value_heads", None) or heads,
        "head_dim": getattr(layer, "head_dim", None) or text.hidden_size // heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": llama_rope(text),
        "max_position_embeddings": text.max_position_embeddings,
    }


def llama_rope(text: PretrainedConfig) -> dict[str, Any]:
    """The target's rotary embedding, as far as a Llama block and its engines know it.

    Some families have one per kind of layer: a drafter's layers all attend to everything. Variants
    that turn only part of a head, or by a rule of their own, become the plain one with their base.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    rope = dict(rope.get("full_attention", rope))
    share = rope.pop("partial_rotary_factor", 1.0)
    if share != 1.0 or rope.get("rope_type", "default") not in ROPE_TYPES:
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return rope


def forget_empty_start(folder: Path) -> None:
    """Remove what a start without answers says of the store, unless its process still runs."""
    started = folder / PARTIAL / "manifest.json"
    kept = ("answers*.jsonl", "shard-*", f"{PARTIAL}/done-*")
    files = [path for pattern in kept for path in folder.glob(pattern)]
    if started.exists() and not any(path.stat().st_size or path.parent != folder for path in files):
        with suppress(BlockingIOError), locked(folder / PARTIAL / "parts.lock", wait=False):
            started.unlink(missing_ok=True)
            (folder / "capture.json").unlink(missing_ok=True)


def is_complete(folder: Path, wanted: Manifest, made: dict[str, Any]) -> bool:
    """Whether the store is there; raises ``ValueError`` when it, or its beginning, is another."""
    for place in (folder, folder / PARTIAL):
        if (place / "manifest.json").exists():
            refuse_other_settings(folder, made)
            Manifest.read(place).check(wanted)
    return (folder / "manifest.json").exists()


def refuse_other_store(
    target: TargetSource, config: CaptureConfig, folder: Path, name: str
) -> None:
    """Raise ``ValueError`` unless the store in ``folder``, known as ``name``, is this run's."""
    wanted = wanted_manifest(target, config)
    try:
        is_complete(folder, wanted, made_with(target, config))
    except ValueError as error:
        raise ValueError(f"{name} is not for this run: {error}") from error


def refuse_other_settings(folder: Path, made: dict[str, Any]) -> None:
    """Raise ``ValueError`` with the first thing that another store in ``folder`` was made with."""
    path = folder / "capture.json"
    try:
        written = json.loads(path.read_text()).get("made_with", {}) if path.exists() else {}
    except (ValueError, AttributeError) as error:  # neither JSON nor, perhaps, text
        raise StoreError(folder, f"{path.name} is damaged ({error})") from error
    for key, ours in json.loads(json.dumps(made)).items():  # as it looks when it was written
        theirs = written.get(key, ours)
        if theirs == ours:
            continue
        if key != "prompts":
            what = f"made with {key} = {theirs!r}, and this run asks for {ours!r}"
        elif theirs.keys() != ours.keys():
            sets = [", ".join(sorted(names)) for names in (theirs, ours)]
            what = f"made from the prompt sets {sets[0]}, and this run asks for {sets[1]}"
        else:
            names = [repr(name) for name, hash_ in ours.items() if theirs[name] != hash_]
            what = f"made from other prompts: what is in {', '.join(names)} has changed"
        raise ValueError(
            f"the store in {folder} was {what}: capture into another --store, or delete this one"
        )
