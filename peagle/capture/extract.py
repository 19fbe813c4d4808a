"""Reads the target's hidden states of whole documents and stores them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import BFloat16, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from peagle.capture.config import CaptureConfig
from peagle.capture.named_documents import NamedDocument
from peagle.progress import progress
from peagle.store.disk import require_disk
from peagle.store.manifest import Manifest
from peagle.store.sample import Sample
from peagle.store.writer import StoreWriter
from peagle.target.hidden_states import hidden_states


def sample_bytes_per_token(manifest: Manifest) -> int:
    """Bytes of a stored token: the layers and ``final`` in bf16, id and mask."""
    return (len(manifest.layer_ids) + 1) * manifest.hidden_size * 2 + 9


def open_writer(
    manifest: Manifest, config: CaptureConfig, folder: Path, first_shard: int
) -> StoreWriter:
    return StoreWriter(
        folder,
        shard_bytes=config.shard_mb * 1_000_000,
        identity=manifest.identity(),
        first_shard=first_shard,
    )


def extract(
    model: PreTrainedModel,
    manifest: Manifest,
    groups: list[list[NamedDocument]],
    config: CaptureConfig,
    folder: Path,
    *,
    first_shard: int,
) -> None:
    """Run the target over every document once and store what the drafter will read.

    Documents are batched within their group, so that the states, which depend on the batch by
    rounding, do not depend on what was done before or elsewhere.
    """
    writer = open_writer(manifest, config, folder, first_shard)
    done = {entry.place for entry in writer.done}
    missing = [document for group in groups for document in group if document.place not in done]
    tokens = sum(document.tokens for document in missing)
    needed = tokens * sample_bytes_per_token(manifest)
    require_disk(folder, needed)
    print(
        f"capturing {len(missing)} documents, {tokens} tokens, {needed / 1e9:.2f} GB in {folder}",
        file=sys.stderr,
    )
    with progress("hidden states", tokens, unit="tok") as bar:
        for batch in (b for group in groups for b in batches_by_tokens(group, config.batch_tokens)):
            if all(member.place in done for member in batch):
                continue
            states = extract_batch(model, manifest, [m.document.input_ids for m in batch])
            for (name, place, document, part), (aux, final) in zip(batch, states, strict=True):
                if place not in done:
                    sample = Sample(*document, aux, final)
                    writer.append(name, part, sample, place)
                    bar.update(len(aux))
    writer.flush()


def batches_by_tokens(group: list[NamedDocument], limit: int) -> Iterator[list[NamedDocument]]:
    """Documents of similar length together, ``limit`` padded tokens at most."""
    batch: list[NamedDocument] = []
    for document in sorted(group, key=lambda document: document.tokens):
        # Ascending: the newest is the widest.
        if batch and document.tokens * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


@torch.no_grad()
def extract_batch(
    model: PreTrainedModel, manifest: Manifest, documents: list[Int[Tensor, " _"]]
) -> list[tuple[BFloat16[Tensor, "_ AD"], BFloat16[Tensor, "_ T"]]]:
    """``aux`` and ``final`` of each document; causal attention never sees the padding."""
    ids = pad_sequence(documents, batch_first=True)  # to the right
    with hidden_states(model, manifest.layer_ids) as seen:
        model.get_decoder()(input_ids=ids.to(model.device), use_cache=False)
    aux = seen.aux(manifest.layer_ids).to(torch.bfloat16).cpu()
    final = seen.entering[manifest.num_layers].to(torch.bfloat16).cpu()
    lengths = map(len, documents)
    return [(aux[row, :n].clone(), final[row, :n].clone()) for row, n in enumerate(lengths)]
