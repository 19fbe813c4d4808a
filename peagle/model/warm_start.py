"""Starting from a published drafter: what fits is taken, what differs is named or refused."""

import math
import re

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peagle.model.config import PEagleConfig
from peagle.model.drafter import Drafter
from peagle.model.published import LAYER_IDS, PublishedDrafter

SETTINGS = {  # of a run, by what they become in the drafter's configuration
    "method": "model.drafter",
    "mask_token_id": "model.mask_token_id",
    "num_hidden_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.intermediate_size",
    "num_key_value_heads": "model.num_key_value_heads",
    "norm_before_residual": "model.norm_before_residual",
    "norm_before_fc": "model.norm_before_fc",
    "fc_norm": "model.fc_norm",
    "hidden_state": "model.hidden_state",
    "num_aux": "capture.layer_ids",
}
OF_TARGET = (
    *("vocab_size", "target_hidden_size", "num_attention_heads", "head_dim"),
    *("attention_bias", "mlp_bias", "hidden_act"),
)
BRIDGED = (LAYER_IDS, "rope_parameters", "rms_norm_eps", "num_depths")
SAID = {
    "num_aux": "number of captured layers",
    "method": "kind of drafter",
    LAYER_IDS: "captured layers",
}
FLOATS = {"BF16", "F16", "F32", "F64"}  # as safetensors calls them
VOCABULARY = {"d2t", "t2d"}
# Of no use here: what vLLM leaves out too, and copies of the target's own weights.
LEFT_OUT = re.compile(r"(.*\.)?inv_freq|layers\.[1-9]\d*\.hidden_norm\.weight|verifier_.*")


def refuse_unfit(published: PublishedDrafter, drafter: Drafter) -> None:
    """Raise ``ValueError`` with every difference that training cannot bridge.

    Reads ``config.json``, the headers of the weights and ``d2t``. The drafter may lie on ``meta``.
    """
    refuse_other_shape(published, drafter.config)
    refuse_other_tensors(published, drafter)
    published.token_ids()


def refuse_other_shape(published: PublishedDrafter, ours: PEagleConfig) -> None:
    theirs = published.config
    different = [
        name
        for name in (*OF_TARGET, *SETTINGS)
        if getattr(theirs, name) not in (None, getattr(ours, name))
    ]
    if different:
        said = "; ".join(
            f"{SAID.get(name, name)} {getattr(theirs, name)} there, {getattr(ours, name)} here"
            for name in different
        )
        if set(different) <= SETTINGS.keys():
            remedy = f"give {' '.join(flag_of(published, name) for name in different)}, or"
        else:
            remedy = "a run has these from its target, hence give"
        raise ValueError(
            f"model.init_from: this run cannot start from {published.name}: {said}: {remedy} "
            "another drafter"
        )


def flag_of(published: PublishedDrafter, name: str) -> str:
    """The argument that makes a run's setting that of the published drafter."""
    value = getattr(published.config, name)
    if name == "num_aux":
        known = LAYER_IDS in published.given
        value = f"'{published.config.eagle_aux_hidden_state_layer_ids}'" if known else "LAYERS"
    return f"--{SETTINGS[name]} {str(value).lower() if isinstance(value, bool) else value}"


def refuse_other_tensors(published: PublishedDrafter, drafter: Drafter) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
    wanted["lm_head.weight"] = (published.config.draft_vocab_size, drafter.config.hidden_size)
    found = {name: place.span for name, place in published.places.items()}
    needed = wanted.keys() - shared_with_target(published.config)
    wrong = []
    for name in sorted((needed | found.keys()) - VOCABULARY):
        if name not in found:
            wrong.append(f"{name} is missing there")
        elif name not in wanted:
            if not LEFT_OUT.fullmatch(name):
                wrong.append(f"{name} is of another design")
        elif found[name].dtype not in FLOATS:
            wrong.append(f"{name} is quantised there ({found[name].dtype})")
        elif not same_shape(name, found[name].shape, wanted[name]):
            wrong.append(f"{name} {found[name].shape} there, {wanted[name]} here")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"model.init_from: this run cannot start from the tensors of {published.name}: "
            f"{'; '.join(wrong[:3])}{more}: give another drafter"
        )


def same_shape(name: str, there: tuple[int, ...], here: tuple[int, ...]) -> bool:
    """The mask hidden state is one vector, published in any shape."""
    return math.prod(there) == math.prod(here) if name == "mask_hidden" else there == here


def shared_with_target(config: PEagleConfig) -> set[str]:
    """Tensors that a published drafter may leave out: an engine then takes the target's."""
    if config.hidden_size != config.target_hidden_size:
        return set()
    return {"embed_tokens.weight"} | (set() if config.pruned else {"lm_head.weight"})


@torch.no_grad()
def start_from(drafter: Drafter, published: PublishedDrafter, kept: Int[Tensor, " W"]) -> list[str]:
    """Take the published weights; ``kept`` are the target ids of our draft vocabulary.

    What is not there stays as it is. Returns a line for each difference that was bridged.

    Raises:
        ValueError: for a difference that cannot be bridged, and a tensor that is not finite.
    """
    refuse_unfit(published, drafter)
    ours, notes = drafter.state_dict(), bridged(published, drafter.config)
    for name, tensor in published.tensors():
        if name == "lm_head.weight":
            notes += copy_rows(ours[name], kept, tensor, published.token_ids())
        elif name in ours and name not in VOCABULARY:
            ours[name].copy_(tensor.view_as(ours[name]))
    missing = sorted(shared_with_target(published.config) - published.places.keys())
    return notes + [f"{name} is not published and starts as the target's" for name in missing]


def bridged(published: PublishedDrafter, ours: PEagleConfig) -> list[str]:
    """A line for each setting that differs, where the published drafter names it."""
    rope = {"rope_theta", "rope_scaling"} & published.given
    given = published.given | ({"rope_parameters"} if rope else set())
    return [
        f"{SAID.get(name, name)}: {getattr(published.config, name)} there, "
        f"{getattr(ours, name)} in this run"
        for name in BRIDGED
        if name in given and getattr(published.config, name) != getattr(ours, name)
    ]


def copy_rows(
    head: Float[Tensor, "W D"],
    kept: Int[Tensor, " W"],
    theirs: Float[Tensor, "U D"],
    token_ids: Int[Tensor, " U"],
) -> list[str]:
    """Copy the rows of the tokens that both draft vocabularies have; says how many, if not all."""
    row_of = {token: row for row, token in enumerate(token_ids.tolist())}
    rows = torch.tensor([row_of.get(token, -1) for token in kept.tolist()])
    both = rows >= 0
    head[both] = theirs[rows[both]].to(head.dtype)
    if both.all():
        return []
    return [
        f"draft vocabulary: {int(both.sum())} of {len(kept)} tokens are in both, the head's rows "
        f"of the other {int((~both).sum())} start as usual"
    ]
