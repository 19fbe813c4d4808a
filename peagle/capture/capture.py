"""Make a hidden-state store: the target answers the prompts, and its hidden states are kept.

vLLM does both in one pass (``one_pass.py``), transformers in two. Either resumes after a kill:
answers are appended to ``answers.jsonl`` as they come, and the store keeps every finished shard.
Several processes may share the work (``work_split.py``).
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from peagle.capture.answers import (
    answers_in_data,
    drop_too_long,
    generate_missing,
    require_documents,
    say_not_asked,
    say_past_the_turn,
)
from peagle.capture.config import CaptureConfig
from peagle.capture.extract import extract, sample_bytes_per_token
from peagle.capture.generate import generate_transformers
from peagle.capture.identity import (
    PARTIAL,
    forget_empty_start,
    is_complete,
    made_with,
    wanted_manifest,
)
from peagle.capture.import_speculators import import_speculators
from peagle.capture.named_documents import NamedDocument, Namer
from peagle.capture.one_pass import OnePass
from peagle.capture.prompts import Prompt, load_prompts
from peagle.capture.rehearsal import Rehearsed, rehearse, sequences
from peagle.capture.work_split import Share, WorkSplit, unique_prompts
from peagle.kernels.device import pick_device
from peagle.store.disk import free_bytes, require_disk, write_atomically
from peagle.store.index import split_of, unfinished_files
from peagle.store.locks import locked
from peagle.store.manifest import Manifest
from peagle.target.end_tokens import end_tokens
from peagle.target.from_files import layers_from_files
from peagle.target.head import TargetHead, check_head, target_head_of
from peagle.target.layers import default_start_layers
from peagle.target.target import TargetSource


def capture(
    target: TargetSource,
    config: CaptureConfig,
    folder: Path,
    *,
    mask_token_id: int | None = None,
    to_train: bool = False,
) -> Manifest:
    """Make the store in ``folder``, or finish one that was interrupted; a full one is left as is.

    With ``config.part`` only that share; whoever comes last completes the store. All prompts are
    rendered before anything is written or the target is loaded.

    Args:
        mask_token_id: of the drafter that the store is for: prompts must not hold it.
        to_train: refuse prompts that leave no conversation to train on, or none to validate with.

    Raises:
        ValueError: if the folder holds a store of another identity, if the disk is too small, or
            for anything wrong with target and prompts.
    """
    wanted, made = wanted_manifest(target, config), made_with(target, config)
    split, folder = WorkSplit.parse(config.part), Path(folder)
    forget_empty_start(folder)
    if not is_complete(folder, wanted, made):
        prompts, tokens = checked_prompts(target, config, mask_token_id)
        warn_of_disk(folder, most_tokens(prompts, tokens, config) * sample_bytes_per_token(wanted))
        if to_train and config.speculators is None:
            require_both_splits(prompts, config)
        with split.lock(folder / PARTIAL):
            if claim_folder(folder, wanted, made, config):
                config = within_positions(target, config)
                capture_share(Share(target, wanted, config, folder, split, prompts))
    return wanted


def checked_prompts(
    target: TargetSource, config: CaptureConfig, mask_token_id: int | None
) -> Rehearsed:
    """The prompts of every set, each conversation once; none where speculators' data are taken."""
    sources = [] if config.speculators is not None else config.prompts
    return rehearse(
        unique_prompts([p for source in sources for p in load_prompts(source)], config),
        target.tokenizer(),
        target.config(),
        config.template_options,
        mask_token_id=mask_token_id,
        max_tokens=config.max_tokens,
        answers_in_data=not config.regenerate,
    )


def most_tokens(prompts: list[Prompt], tokens: list[int], config: CaptureConfig) -> int:
    """Of the store, if every answer was as long as it may be."""
    longest = config.max_new_tokens if config.regenerate else 0  # else the answers are counted
    return sum(
        min(config.max_tokens, count + longest * len(prompt.turns))
        for prompt, count in zip(prompts, tokens, strict=True)
    )


def warn_of_disk(folder: Path, most: int) -> None:
    """Say that a store may outgrow its disk, on which some of its bytes may lie already."""
    written = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    free = free_bytes(folder)
    if most - written > free:
        print(
            f"the store may need {(most - written) / 1e9:.2f} GB at {folder}, and "
            f"{free / 1e9:.2f} GB are free: unless answers are short, give another folder, fewer "
            "prompts or a smaller capture.max_new_tokens (`peagle plan` measures answers)",
            file=sys.stderr,
        )


def require_both_splits(prompts: list[Prompt], config: CaptureConfig) -> None:
    """Raise ``ValueError`` if all prompts are for training, or all for validation."""
    splits = {split_of(prompt.asked_id(), config.val_share) for prompt in prompts}
    for name, advice in (("train", "lower"), ("val", "raise")):
        if name not in splits:
            raise ValueError(
                f"none of the {len(prompts)} conversations is in the {name} split: give more "
                f"prompts, or {advice} capture.val_share = {config.val_share}"
            )


def within_positions(target: TargetSource, config: CaptureConfig) -> CaptureConfig:
    """Conversations end where the target's positions do."""
    positions = getattr(target.config(), "max_position_embeddings", None) or config.max_tokens
    return replace(config, max_tokens=min(config.max_tokens, positions))


def claim_folder(
    folder: Path, wanted: Manifest, made: dict[str, Any], config: CaptureConfig
) -> bool:
    """Say whose store this is going to be; false when another process just completed it."""
    with locked(folder / PARTIAL / "setup.lock"):
        if is_complete(folder, wanted, made):
            return False
        require_disk(folder, config.max_tokens * sample_bytes_per_token(wanted))
        if not (folder / PARTIAL / "manifest.json").exists():  # else it says who began
            wanted.write(folder / PARTIAL)
        # This process's and machine's own affair.
        mine = {"part": None, "vllm_python": None, "servers": []}
        record = json.dumps({**asdict(config), **mine, "made_with": made}, indent=2)
        write_atomically(folder / "capture.json", record.encode())
    return True


def capture_share(share: Share) -> None:
    """Write this process's samples; if no other share is missing then, complete the store."""
    config, folder, wanted = share.config, share.folder, share.manifest
    head = OnePass(share).run() if config.engine == "vllm" else two_passes(share)
    with locked(folder / PARTIAL / "setup.lock"):
        if not share.split.mark_done(folder / PARTIAL, config.batch_size):
            print(f"part {config.part} is done; the others complete the store, or `capture` does")
            return
        head.save(folder / "target.safetensors", wanted.identity())
        start = config.start_layers or default_start_layers(wanted.num_layers)
        layers = layers_from_files(share.target, tuple(start))
        layers.save(folder / "target_layers.safetensors", wanted.identity())
        for leftover in unfinished_files(folder):
            leftover.unlink()
        os.replace(folder / PARTIAL / "manifest.json", folder / "manifest.json")
        shutil.rmtree(folder / PARTIAL)


def two_passes(share: Share) -> TargetHead:
    """Answers by transformers, or as the data have them, and then their states."""
    target, config, folder = share.target, share.config, share.folder
    model = target.model(dtype=getattr(torch, config.dtype), device=pick_device(config.device))
    head = target_head_of(model, target.config())
    if config.speculators is not None:
        tokens = import_speculators(model, share.manifest, config, folder, share.split)
        check_head(model, head, tokens[:64])
        return head
    tokenizer = target.tokenizer()
    known = sequences(tokenizer, share.prompts[0], config.template_options, not config.regenerate)
    check_head(model, head, torch.tensor(next(known)[:64]))  # before hours of answers
    groups = named_documents(model, tokenizer, share)
    first_shard = share.split.first_shard
    extract(model, share.manifest, groups, config, folder, first_shard=first_shard)
    return head


def named_documents(
    model: PreTrainedModel, tokenizer: Tokenizer, share: Share
) -> list[list[NamedDocument]]:
    """What this process's batches of prompts, once answered, make of documents.

    Raises:
        ValueError: if there is nothing to train on.
    """
    batches, config = share.batches, share.config
    if config.regenerate:
        generate = partial(generate_transformers, model, tokenizer, config)
        answers = generate_missing(generate, batches, share.answers_path)
        say_past_the_turn(answers.values(), tokenizer)
        say_not_asked(share.prompts, answers)
    else:
        mine = [prompt for batch in batches for prompt in batch.prompts]
        answers = answers_in_data(tokenizer, mine, config, end_tokens(model, tokenizer))
    answers = drop_too_long(answers, config)
    namer = Namer(share.prompts, tokenizer, config)
    groups = [namer.of_all(batch.prompts, answers) for batch in batches]
    if share.split.count == 1:  # else others may have all the work
        require_documents(answers, any(groups), config.max_tokens)
    return groups
