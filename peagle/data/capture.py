"""Make a hidden-state store: the target answers the prompts, then its hidden states are read.

Both halves resume after a kill: answers are appended to ``answers.jsonl`` batch by batch, and the
store keeps every finished shard.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from peagle.data.answers import Answer, given, regenerate
from peagle.data.capture_config import CaptureConfig
from peagle.data.chat import Rendered, conversation_id, documents, without_reasoning
from peagle.data.prompts import load_prompts
from peagle.data.store import (
    Manifest,
    Sample,
    StoreWriter,
    require_disk,
    split_of,
    write_atomically,
)
from peagle.model.config import default_layer_ids
from peagle.model.target import (
    TargetSource,
    check_head,
    end_tokens,
    hidden_states,
    pick_device,
    target_head_of,
    target_layers_of,
    tokenizer_hash,
)
from peagle.model.target_layers import default_start_layers

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
        **shape_of(text, config),
    )


def shape_of(text: PretrainedConfig, config: CaptureConfig) -> dict[str, Any]:
    """The part of a store's identity that follows from the target's configuration alone."""
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
        "block": block_of(text),
    }


def block_of(text: PretrainedConfig) -> dict[str, Any]:
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
        "rope_parameters": rope_of(text),
        "max_position_embeddings": text.max_position_embeddings,
    }


def rope_of(text: PretrainedConfig) -> dict[str, Any]:
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


def capture(target: TargetSource, config: CaptureConfig, folder: Path) -> Manifest:
    """Make the store in ``folder``, or finish one that was interrupted; a full one is left as is.

    Raises:
        ValueError: if the folder holds a store of another identity, if the disk is too small, or
            for anything wrong with target and prompts.
    """
    wanted = wanted_manifest(target, config)
    folder = Path(folder)
    partial = folder / "partial"
    made = config.made_with()
    for place in (folder, partial):
        if (place / "manifest.json").exists():
            refuse_other_settings(folder, made)
            Manifest.read(place).check(wanted)
    if (folder / "manifest.json").exists():
        return wanted
    prompts = [prompt for source in config.prompts for prompt in load_prompts(source)]
    conversation_bytes = config.max_tokens * sample_bytes_per_token(wanted)
    require_disk(folder, conversation_bytes)
    wanted.write(partial)
    record = json.dumps({**asdict(config), "made_with": made}, indent=2)
    write_atomically(folder / "capture.json", record.encode())

    text, device = target.config(), pick_device(config.device)
    model = target.model(dtype=getattr(torch, config.dtype), device=device)
    tokenizer = target.tokenizer()
    ends = end_tokens(model)
    if config.regenerate:
        answers = regenerate(model, tokenizer, prompts, config, folder / "answers.jsonl")
    else:
        answers = given(tokenizer, prompts, config, ends)
    samples = samples_of(answers, tokenizer, ends, config)
    head = target_head_of(model, text)
    check_head(model, head, next(iter(samples.values())).input_ids[:64])
    head.save(folder / "target.safetensors", wanted.identity())
    start = tuple(config.start_layers or default_start_layers(text.num_hidden_layers))
    layers = target_layers_of(model, text, start)
    layers.save(folder / "target_layers.safetensors", wanted.identity())
    read_hidden_states(model, wanted, samples, config, folder)
    os.replace(partial / "manifest.json", folder / "manifest.json")
    partial.rmdir()
    return wanted


def refuse_other_settings(folder: Path, made: dict[str, Any]) -> None:
    """Raise ``ValueError`` with the first thing that another store in ``folder`` was made with."""
    path = folder / "capture.json"
    found = json.loads(path.read_text()).get("made_with", {}) if path.exists() else {}
    wanted = json.loads(json.dumps(made))  # as it looks when it was written
    mend = "capture into another --store, or delete this one"
    for key in (key for key, value in wanted.items() if key in found and found[key] != value):
        if key != "prompts":
            what = f"made with {key} = {found[key]!r}, and this run asks for {wanted[key]!r}"
        elif found[key].keys() != wanted[key].keys():
            sets = [", ".join(sorted(names[key])) for names in (found, wanted)]
            what = f"made from the prompt sets {sets[0]}, and this run asks for {sets[1]}"
        else:
            names = [repr(n) for n, digest in wanted[key].items() if found[key][n] != digest]
            what = f"made from other prompts: what is in {', '.join(names)} has changed"
        raise ValueError(f"the store in {folder} was {what}: {mend}")


def samples_of(
    answers: list[Answer],
    tokenizer: PreTrainedTokenizerBase,
    ends: set[int],
    config: CaptureConfig,
) -> dict[str, Rendered]:
    """Documents by name. Those of one conversation share the hash that decides their split.

    Raises:
        ValueError: if nothing at all would be trained.
    """
    samples, silent = {}, 0
    for answer in answers:
        name = conversation_id(answer.messages)
        turns = answer.said(tokenizer, ends, config.template_options)
        for number, document in enumerate(documents(turns)):
            if config.reasoning == "mask":
                document = without_reasoning(document, tokenizer)
            if document.loss_mask.any():
                samples[f"{name}-{number}" if number else name] = document
            else:  # reasoning that hit the length limit, and is masked
                silent += 1
    if silent:
        print(f"{silent} answers have nothing to train on and were left out")
    if not samples:
        raise ValueError("no answer has supervised tokens: check chat template and max_new_tokens")
    return samples


def sample_bytes_per_token(manifest: Manifest) -> int:
    """Bytes of a stored token: the layers and ``final`` in bf16, id and mask."""
    return (len(manifest.layer_ids) + 1) * manifest.hidden_size * 2 + 9


def read_hidden_states(
    model: PreTrainedModel,
    manifest: Manifest,
    samples: dict[str, Rendered],
    config: CaptureConfig,
    folder: Path,
) -> None:
    """Run the target over every conversation once and store what the drafter will read."""
    writer = StoreWriter(
        folder, shard_bytes=config.shard_mb * 1_000_000, identity=manifest.identity()
    )
    todo = {name: samples[name] for name in samples if name not in writer.done}
    tokens = sum(len(sample.input_ids) for sample in todo.values())
    needed = tokens * sample_bytes_per_token(manifest)
    require_disk(folder, needed)
    print(
        f"capturing {len(todo)} documents, {tokens} tokens, {needed / 1e9:.2f} GB in {folder}",
        file=sys.stderr,
    )
    with tqdm(total=tokens, desc="hidden states", unit="tok", disable=None) as bar:
        for batch in batches_by_tokens(todo, config.batch_tokens):
            states = run_batch(model, manifest, [todo[name] for name in batch])
            for name, sample in zip(batch, states, strict=True):
                writer.append(name, split_of(name, config.val_share), sample)
                bar.update(len(sample.input_ids))
    writer.flush()


def batches_by_tokens(todo: dict[str, Rendered], limit: int) -> Iterator[list[str]]:
    """Documents of similar length together, ``limit`` padded tokens at most."""
    batch: list[str] = []
    for name in sorted(todo, key=lambda n: len(todo[n].input_ids)):
        width = len(todo[name].input_ids)  # ascending: the newest is the widest
        if batch and width * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(name)
    if batch:
        yield batch


@torch.no_grad()
def run_batch(
    model: PreTrainedModel, manifest: Manifest, conversations: list[Rendered]
) -> list[Sample]:
    """Hidden states of a right-padded batch; causal attention never sees the padding."""
    width = max(len(c.input_ids) for c in conversations)
    ids = torch.zeros(len(conversations), width, dtype=torch.long)
    for row, conversation in enumerate(conversations):
        ids[row, : len(conversation.input_ids)] = conversation.input_ids
    with hidden_states(model, manifest.layer_ids) as seen:
        model.get_decoder()(input_ids=ids.to(model.device), use_cache=False)
    aux = seen.aux(manifest.layer_ids).to(torch.bfloat16).cpu()
    final = seen.entering[manifest.num_layers].to(torch.bfloat16).cpu()
    return [
        Sample(
            conversation.input_ids,
            conversation.loss_mask,
            aux[row, : len(conversation.input_ids)].clone(),
            final[row, : len(conversation.input_ids)].clone(),
        )
        for row, conversation in enumerate(conversations)
    ]
