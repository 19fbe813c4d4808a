"""What a checkpoint must be before anything goes on from it: ours, complete, of the same drafter.

A file that is read as data can still hold the wrong data, or settings that a library acts on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from peagle.model.config import PEagleConfig

PARTS = (
    "drafter_config",
    "state_dict",
    "progress",
    "loops",
    "HiddenStatesDataModule",
    "pytorch-lightning_version",
)
# Written by transformers into every configuration; none of them shapes a drafter.
IGNORED = {"_name_or_path", "model_type", "output_attentions", "transformers_version"}


def refuse_incomplete(checkpoint: Any) -> None:
    """Raise ``ValueError`` unless it has the parts of a checkpoint of ``fit``."""
    keys = checkpoint.keys() if isinstance(checkpoint, dict) else ()
    missing = [part for part in PARTS if part not in keys]
    if missing:
        raise ValueError(
            f"the checkpoint was not written by peagle's fit: it has no {' and no '.join(missing)}"
        )


def refuse_unknown_fields(settings: Iterable[str], owner: str) -> None:
    """Raise ``ValueError`` for settings that are no field of ``PEagleConfig``.

    transformers accepts any, and acts on some: with ``attn_implementation`` it fetches a kernel
    from the Hub and runs it.
    """
    known = {field.name for field in fields(PEagleConfig)} | IGNORED
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{owner} has settings that no drafter has: {', '.join(unknown)}")


def saved_config(checkpoint: dict[str, Any]) -> PEagleConfig:
    """Raises ``ValueError`` for a configuration that is not a drafter's."""
    saved = dict(checkpoint["drafter_config"])
    refuse_unknown_fields(saved, "the checkpoint's drafter_config")
    return PEagleConfig(**{key: value for key, value in saved.items() if key not in IGNORED})


def refuse_differences(saved: Mapping[str, Any], ours: Mapping[str, Any], verdict: str) -> None:
    """Raise ``ValueError`` naming what differs; nothing is compared if nothing was saved."""
    keys = sorted((saved.keys() | ours.keys()) - IGNORED - {"dtype"}) if saved else []
    differences = [
        f"{key}: checkpoint {saved.get(key)!r}, this run {ours.get(key)!r}"
        for key in keys
        if saved.get(key) != ours.get(key)
    ]
    if differences:
        raise ValueError(f"the checkpoint {verdict}: " + "; ".join(differences))


def refuse_other_kind(saved: PEagleConfig, ours: PEagleConfig) -> None:
    """Raise ``ValueError`` where one drafter is P-EAGLE's and the other EAGLE-3's."""
    if saved.method != ours.method:
        raise ValueError(
            f"the checkpoint holds a drafter of kind {saved.method}, this run has {ours.method}: "
            f"give --model.drafter {saved.method}, or another checkpoint"
        )


def refuse_other_tensors(saved: Mapping[str, Any], ours: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` naming the tensors that are missing, too many or of another shape."""

    def shapes(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}

    found, wanted = shapes(saved), shapes(ours)
    different = sorted(
        name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
    )
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        named = ", ".join(
            f"{name}: checkpoint {found.get(name)}, ours {wanted.get(name)}"
            for name in different[:3]
        )
        raise ValueError(f"the checkpoint holds other tensors than a drafter: {named}{more}")


def refuse_other_target(drafter: PEagleConfig, target: PretrainedConfig) -> None:
    """Raise ``ValueError`` when a drafter cannot belong to a target."""
    highest = max(drafter.eagle_aux_hidden_state_layer_ids)
    for name, ours, theirs in (
        ("vocab_size", drafter.vocab_size, target.vocab_size),
        ("hidden_size", drafter.target_hidden_size, target.hidden_size),
        ("number of layers", max(highest, target.num_hidden_layers), target.num_hidden_layers),
    ):
        if ours != theirs:
            raise ValueError(
                f"the drafter was trained for another target: {name} {ours}, this one has {theirs}"
            )
