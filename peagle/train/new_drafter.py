"""A drafter at its start: built for a store's target, with its first weights."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from peagle.model.build import build_drafter
from peagle.model.config import PEagleConfig
from peagle.model.drafter import Drafter
from peagle.model.initial_weights import initialise
from peagle.model.published import find_published
from peagle.model.warm_start import start_from
from peagle.store.manifest import Manifest
from peagle.target.head import TargetHead
from peagle.target.layers import TargetLayers
from peagle.train.draft_vocab import choose_vocabulary


class NewDrafter(NamedTuple):
    drafter: Drafter
    head: TargetHead  # over the whole vocabulary
    kept: Int[Tensor, " W"]  # the target's ids of the draft vocabulary
    started_from: dict[str, str] | None  # name and hash of a published drafter
    notes: list[str]  # what to say of it


def new_drafter(
    config: PEagleConfig,
    folder: Path,
    manifest: Manifest,
    *,
    token_counts: Callable[[], Int[Tensor, " V"]],
    copy_layers: bool,
    init_from: str | None,
) -> NewDrafter:
    """Build a drafter and fill it.

    Args:
        folder: of the store, which keeps parts of the target.
        token_counts: how often each token is the assistant's; asked for a pruned vocabulary only.
        copy_layers: let layers start as copies of the target's where they fit.
        init_from: a published drafter, whose weights take the place of all these.

    Raises:
        ValueError: if a part of the target is missing or damaged, or ``init_from`` does not fit.
    """
    identity = manifest.identity()
    head = TargetHead.load(
        folder / "target.safetensors",
        eps=manifest.rms_norm_eps,
        softcap=manifest.softcap,
        identity=identity,
    )
    drafter, notes = build_drafter(config), []
    kept = torch.arange(manifest.vocab_size)
    if config.pruned:
        vocabulary = choose_vocabulary(token_counts(), config.draft_vocab_size)
        notes.append(f"draft vocabulary covers {vocabulary.coverage:.2%} of the answers' tokens")
        kept = vocabulary.token_ids
        drafter.d2t.copy_(vocabulary.offsets())
        drafter.t2d.copy_(vocabulary.membership(manifest.vocab_size))
    layers = TargetLayers({})
    if copy_layers:
        layers = TargetLayers.load(folder / "target_layers.safetensors", identity)
    copied = initialise(drafter, head, kept, layers)
    if init_from is not None:
        published = find_published(init_from)
        differences = start_from(drafter, published, kept)
        source = {"drafter": published.name, "weights_sha256": published.sha256()}
        notes += [f"the drafter starts from {published.name}", *(f"  {d}" for d in differences)]
        return NewDrafter(drafter, head, kept, source, notes)
    if copied:
        ours = "layer 1 starts" if len(copied) == 1 else f"layers 1-{len(copied)} start"
        notes.append(f"{ours} from the target's layers {copied}")
    return NewDrafter(drafter, head, kept, None, notes)
