"""A store made from hidden states that speculators captured.

Its data set (``save_to_disk``) has ``input_ids`` and ``loss_mask``, row by row; for row ``i`` the
file ``hidden_states/hs_{i}.safetensors`` beside it has ``token_ids [n]`` and ``hidden_states
[n, A + 1, D]``: the captured layers ascending, and the last layer's output before the final norm.
Nothing in it says which layers they are, nor of which target: a sample is compared with what the
target says itself.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from peagle.capture.config import CaptureConfig
from peagle.capture.extract import extract_batch, open_writer, sample_bytes_per_token
from peagle.capture.work_split import WorkSplit
from peagle.progress import track
from peagle.store.disk import require_disk
from peagle.store.index import split_of
from peagle.store.manifest import Manifest
from peagle.store.sample import Sample

TOLERANCE = 0.1  # engines round otherwise; another layer differs by more than its own size


def import_speculators(
    model: PreTrainedModel,
    manifest: Manifest,
    config: CaptureConfig,
    folder: Path,
    split: WorkSplit,
) -> Int[Tensor, " n"]:
    """Write this process's samples; returns the tokens of one.

    Raises:
        ValueError: naming the file, where a sample is not what the store needs.
    """
    source = config.speculators_folder
    rows = load_rows(source)
    files = {i: source / "hidden_states" / f"hs_{i}.safetensors" for i in range(len(rows))}
    there = [i for i, path in files.items() if path.exists()]
    if not there:
        raise ValueError(f"{source / 'hidden_states'} has no file hs_0.safetensors, ...")
    if len(there) < len(rows):
        missing = len(rows) - len(there)
        print(f"{missing} of {len(rows)} rows have no hidden states and are left out")
    first = read_sample(files[there[0]], rows[there[0]], manifest)
    refuse_other_states(model, manifest, first, files[there[0]])
    # By row, not by place in the list: a file that appears between two shares belongs to one.
    mine = [i for i in there if i % split.count == split.index]
    tokens = sum(len(rows[i]["input_ids"]) for i in mine)
    require_disk(folder, tokens * sample_bytes_per_token(manifest))
    writer = open_writer(manifest, config, folder, split.first_shard)
    done, unsupervised = {entry.place for entry in writer.done}, 0
    missing = [i for i in mine if i not in done]
    for i in track("converting", missing):
        sample = read_sample(files[i], rows[i], manifest)
        if sample.loss_mask.any():
            name = hashlib.sha256(sample.input_ids.numpy().tobytes()).hexdigest()[:16]
            writer.append(name, split_of(name, config.val_share), sample, place=i)
        else:
            unsupervised += 1
    writer.flush()
    if unsupervised:
        print(f"{unsupervised} rows have nothing to train on and were left out", file=sys.stderr)
    return first.input_ids


def load_rows(source: Path) -> Any:
    """The data set. Raises ``ValueError`` where it is none that speculators prepared."""
    from datasets import load_from_disk  # takes seconds to import

    try:
        rows = load_from_disk(str(source)).with_format("torch")
        lacking = {"input_ids", "loss_mask"} - set(rows.column_names)
    except (OSError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{source} is not a data set that speculators prepared: its loss mask is needed, which "
            "the hidden states' files do not have"
        ) from error
    if lacking:
        raise ValueError(f"the data set {source} has no column {min(lacking)}")
    return rows


def read_sample(path: Path, row: dict[str, Any], manifest: Manifest) -> Sample:
    """One row's sample; raises ``ValueError`` with the file's name for what does not fit."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not {"token_ids", "hidden_states"} <= tensors.keys():
        raise ValueError(f"{path} lacks token_ids or hidden_states")
    ids, states = tensors["token_ids"].long(), tensors["hidden_states"]
    if not torch.equal(ids, row["input_ids"].long()):
        raise ValueError(f"{path} has other tokens than its row of the data set")
    wanted = (len(ids), len(manifest.layer_ids) + 1, manifest.hidden_size)
    if tuple(states.shape) != wanted or states.dtype.itemsize < 2:
        raise ValueError(
            f"{path} holds {list(states.shape)} {states.dtype}, not {list(wanted)} of 16 bits: "
            f"layers {manifest.layer_ids} (--capture.layer_ids says which) and the last one's "
            "output before the final norm"
        )
    states, mask = states.to(torch.bfloat16), row["loss_mask"].bool()
    return Sample(ids, mask, states[:, :-1].flatten(1), states[:, -1].contiguous())


def refuse_other_states(
    model: PreTrainedModel, manifest: Manifest, sample: Sample, path: Path
) -> None:
    """Raise ``ValueError`` unless the states are this target's, of these layers."""
    [own] = extract_batch(model, manifest, [sample.input_ids])
    layers = (*manifest.layer_ids, manifest.num_layers)
    stored = torch.cat([sample.aux, sample.final], -1).chunk(len(layers), -1)
    computed = torch.cat(own, -1).chunk(len(layers), -1)
    for layer, theirs, ours in zip(layers, stored, computed, strict=True):
        error = relative_error(theirs, ours)
        if error < TOLERANCE:
            continue
        why = "are these the target and the layer_ids that were captured?"
        normed = model.get_decoder().norm(ours.to(model.device, model.dtype)).cpu()
        if layer == manifest.num_layers and relative_error(theirs, normed) < TOLERANCE:
            why = "it was taken after the final norm, from which it cannot be rebuilt"
        raise ValueError(f"{path}: layer {layer} is off by {error:.2g} of its size: {why}")


def relative_error(a: Float[Tensor, "n D"], b: Float[Tensor, "n D"]) -> float:
    """Of the median position: the first one may be larger than all others together."""
    a, b = a.float(), b.float()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-9)).median())
