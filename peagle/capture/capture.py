"""Make a hidden-state store: the target answers the prompts, then its hidden states are read.

Both halves resume after a kill: answers are appended to ``answers.jsonl`` as they come, and the
store keeps every finished shard. Several processes may share the work (``work_split.py``).
"""

import json
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from peagle.capture.chat import conversation_id, documents, without_reasoning
from peagle.capture.config import CaptureConfig
from peagle.capture.conversation import Answer
from peagle.capture.extract import Document, read_hidden_states, sample_bytes_per_token
from peagle.capture.generate import (
    Unit,
    add_answers,
    different,
    given,
    regenerate,
    too_small,
    units_of,
)
from peagle.capture.generate_vllm import by_engine
from peagle.capture.import_speculators import convert
from peagle.capture.prompts import Prompt, load_prompts
from peagle.capture.work_split import Part, alone
from peagle.kernels.device import pick_device
from peagle.model.config import default_layer_ids
from peagle.store.disk import require_disk, write_atomically
from peagle.store.locks import locked
from peagle.store.manifest import Manifest
from peagle.target.end_tokens import end_tokens
from peagle.target.head import check_head, target_head_of
from peagle.target.layers import default_start_layers, target_layers_of
from peagle.target.target import TargetSource, tokenizer_hash

PARTIAL = "partial"  # folder of a store that is being made
DOCUMENTS = 2**20  # more than one conversation ever makes
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

    With ``config.part`` only that part; whoever comes last completes the store.

    Raises:
        ValueError: if the folder holds a store of another identity, if the disk is too small, or
            for anything wrong with target and prompts.
    """
    wanted, made = wanted_manifest(target, config), config.made_with()
    part, folder = Part.parse(config.part), Path(folder)
    if finished(folder, wanted, made):
        return wanted
    with alone(folder / PARTIAL, part):
        if not begin(folder, wanted, made, config):
            capture_part(target, wanted, config, folder, part)
    return wanted


def refuse_other_store(
    target: TargetSource, config: CaptureConfig, folder: Path, name: str
) -> None:
    """Raise ``ValueError`` unless the store in ``folder``, known as ``name``, is this run's."""
    wanted, made = wanted_manifest(target, config), config.made_with()
    try:
        finished(folder, wanted, made)
    except ValueError as error:
        raise ValueError(f"{name} is not for this run: {error}") from error


def finished(folder: Path, wanted: Manifest, made: dict[str, Any]) -> bool:
    """Whether the store is there; raises ``ValueError`` when it, or its beginning, is another."""
    for place in (folder, folder / PARTIAL):
        if (place / "manifest.json").exists():
            refuse_other_settings(folder, made)
            Manifest.read(place).check(wanted)
    return (folder / "manifest.json").exists()


def begin(folder: Path, wanted: Manifest, made: dict[str, Any], config: CaptureConfig) -> bool:
    """Say whose store this is going to be, unless another process just completed it: true."""
    with locked(folder / PARTIAL / "setup.lock"):
        if finished(folder, wanted, made):
            return True
        require_disk(folder, config.max_tokens * sample_bytes_per_token(wanted))
        wanted.write(folder / PARTIAL)
        mine = {"part": None, "vllm_python": None}  # this process's and machine's own affair
        record = json.dumps({**asdict(config), **mine, "made_with": made}, indent=2)
        write_atomically(folder / "capture.json", record.encode())
    return False


def capture_part(
    target: TargetSource, wanted: Manifest, config: CaptureConfig, folder: Path, part: Part
) -> None:
    """Write this part's samples and then, if no other part is missing, the rest of the store."""
    text, device = target.config(), pick_device(config.device)
    sources = [] if config.speculators is not None else config.prompts
    prompts = different([p for source in sources for p in load_prompts(source)], config)
    if config.engine == "vllm" and config.regenerate:
        # Now, while the target is not loaded here: two copies of its weights may not fit.
        units, path = part.of(units_of(prompts, config)), answers_path(folder, part)
        add_answers(partial(by_engine, target, config), units, path)
    model = target.model(dtype=getattr(torch, config.dtype), device=device)
    head = target_head_of(model, text)
    if config.speculators is not None:
        check_head(model, head, convert(model, wanted, config, folder, part).input_ids[:64])
    else:
        documents = answered(model, target.tokenizer(), prompts, config, folder, part)
        first = next((document for unit in documents for document in unit), None)
        if first is not None:  # else others have all the work
            check_head(model, head, first.content.input_ids[:64])
        read_hidden_states(model, wanted, documents, config, folder, first_shard=part.first_shard)
    start = tuple(config.start_layers or default_start_layers(text.num_hidden_layers))
    with locked(folder / PARTIAL / "setup.lock"):
        if not part.mark(folder / PARTIAL, config.batch_size):
            print(f"part {config.part} is done; the others complete the store, or `capture` does")
            return
        head.save(folder / "target.safetensors", wanted.identity())
        layers = target_layers_of(model, text, start)
        layers.save(folder / "target_layers.safetensors", wanted.identity())
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        os.replace(folder / PARTIAL / "manifest.json", folder / "manifest.json")
        shutil.rmtree(folder / PARTIAL)


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    config: CaptureConfig,
    folder: Path,
    part: Part,
) -> list[list[Document]]:
    """The documents of this part's units. Raises ``ValueError`` if there is nothing to train."""
    places = {prompt.id: number for number, prompt in enumerate(prompts)}
    units = part.of(units_of(prompts, config))
    if config.regenerate:
        answers = regenerate(model, tokenizer, units, config, answers_path(folder, part))
    else:
        mine = [prompt for unit in units for prompt in unit.prompts]
        answers = given(tokenizer, mine, config, end_tokens(model))
    if not answers and part.count == 1:
        raise too_small(config)
    found = [documents_of(unit, answers, places, tokenizer, config) for unit in units]
    if not any(found) and part.count == 1:
        raise ValueError("no answer has supervised tokens: check chat template and max_new_tokens")
    return found


def answers_path(folder: Path, part: Part) -> Path:
    return folder / part.own_name("answers.jsonl")


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


def documents_of(
    unit: Unit,
    answers: dict[str, Answer],
    places: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    config: CaptureConfig,
) -> list[Document]:
    """What a unit's prompts and answers make; one conversation's share the hash for their split."""
    found, silent = [], 0
    for answer in (answers[prompt.id] for prompt in unit.prompts if prompt.id in answers):
        name = conversation_id(answer.messages)
        for number, document in enumerate(documents(answer.turns)):
            if config.reasoning == "mask":
                document = without_reasoning(document, tokenizer)
            if document.loss_mask.any():
                place = places[answer.id] * DOCUMENTS + number
                found.append(Document(f"{name}-{number}" if number else name, place, document))
            else:  # reasoning that hit the length limit, and is masked
                silent += 1
    if silent:
        print(f"{silent} answers have nothing to train on and were left out")
    return found
