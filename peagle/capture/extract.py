"""Reads the target's hidden states of whole documents and stores them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from peagle.capture.chat import Rendered
from peagle.capture.config import CaptureConfig
from peagle.store.disk import require_disk
from peagle.store.index import split_of
from peagle.store.manifest import Manifest
from peagle.store.sample import Sample
from peagle.store.writer import StoreWriter
from peagle.target.hidden_states import hidden_states


class Document(NamedTuple):
    """What becomes one sample."""

    name: str
    place: int  # in the store's order
    content: Rendered


def sample_bytes_per_token(manifest: Manifest) -> int:
    """Bytes of a stored token: the layers and ``final`` in bf16, id and mask."""
    return (len(manifest.layer_ids) + 1) * manifest.hidden_size * 2 + 9


def read_hidden_states(
    model: PreTrainedModel,
    manifest: Manifest,
    units: list[list[Document]],
    config: CaptureConfig,
    folder: Path,
    *,
    first_shard: int,
) -> None:
    """Run the target over every document once and store what the drafter will read.

    Documents are batched within their unit, so that the states, which depend on the batch by
    rounding, do not depend on what was done before or elsewhere.
    """
    writer = StoreWriter(
        folder,
        shard_bytes=config.shard_mb * 1_000_000,
        identity=manifest.identity(),
        first_shard=first_shard,
    )
    done = {entry.place for entry in writer.done}
    missing = [document for unit in units for document in unit if document.place not in done]
    tokens = sum(len(document.content.input_ids) for document in missing)
    needed = tokens * sample_bytes_per_token(manifest)
    require_disk(folder, needed)
    print(
        f"capturing {len(missing)} documents, {tokens} tokens, {needed / 1e9:.2f} GB in {folder}",
        file=sys.stderr,
    )
    with tqdm(total=tokens, desc="hidden states", unit="tok", disable=None) as bar:
        for batch in (b for unit in units for b in batches_by_tokens(unit, config.batch_tokens)):
            if all(document.place in done for document in batch):
                continue
            states = run_batch(model, manifest, [document.content for document in batch])
            for document, sample in zip(batch, states, strict=True):
                if document.place not in done:
                    split = split_of(document.name, config.val_share)
                    writer.append(document.name, split, sample, document.place)
                    bar.update(len(sample.input_ids))
    writer.flush()


def batches_by_tokens(unit: list[Document], limit: int) -> Iterator[list[Document]]:
    """Documents of similar length together, ``limit`` padded tokens at most."""
    batch: list[Document] = []
    for document in sorted(unit, key=lambda document: len(document.content.input_ids)):
        width = len(document.content.input_ids)  # ascending: the newest is the widest
        if batch and width * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(document)
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
