"""The drafter's configuration: a Llama block config with the fields that vLLM reads for EAGLE-3."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

HIDDEN_STATES = ("shared", "depth", "anchor", "anchor_depth", "anchor_scaled")
SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "the number of heads",
    "num_key_value_heads": "num_key_value_heads",
    "draft_vocab_size": "draft_vocab_size",
}
Method = Literal["p-eagle", "eagle3"]


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """vLLM's default choice (2, N//2, N-3), kept within 1..N, ascending, without repeats.

    Id ``k`` is the hidden state that enters layer ``k``: the output of layer ``k - 1``.
    """
    wanted = (2, num_layers // 2, num_layers - 3)
    return tuple(sorted({min(max(k, 1), num_layers) for k in wanted}))


@strict
class PEagleConfig(LlamaConfig):
    """Everything a drafter is, in the names of vLLM's plain EAGLE-3 format.

    ``model_type`` stays ``llama`` and the architecture ``LlamaForCausalLMEagle3``, because that is
    what the engine's registry knows; a name of our own would not load.

    Raises:
        ValueError: if the layer ids are not ascending and unique, sizes do not fit each other, the
            mask token is outside the vocabulary, the draft vocabulary is larger than the target's,
            or ``hidden_state`` is unknown.
    """

    # jaxtyping's import hook would check __init__ against the fields and refuse transformers' rest.
    __no_type_check__ = True

    target_hidden_size: int | None = None  # None: as wide as the drafter
    draft_vocab_size: int | None = None  # None: the target's whole vocabulary
    eagle_aux_hidden_state_layer_ids: list[int] | tuple[int, ...] = (2, 3, 5)
    parallel_drafting: bool = True  # P-EAGLE; False: EAGLE-3, one token after the other
    mask_token_id: int | None = 0  # None where drafting is not parallel
    num_depths: int = 8  # trained depth; drafting further is possible but untrained
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    hidden_state: str = "shared"  # of rows without one (mtp_hidden.py); no other can be served

    def __post_init__(self, **kwargs):
        ids = list(self.eagle_aux_hidden_state_layer_ids)
        if not ids or ids != sorted(set(ids)) or ids[0] < 0:
            raise ValueError(f"layer ids must be ascending, unique and not negative, got {ids}")
        self.eagle_aux_hidden_state_layer_ids = ids
        self.target_hidden_size = self.target_hidden_size or self.hidden_size
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} exceeds the target's {self.vocab_size}"
            )
        self.refuse_shapes()
        if not self.parallel_drafting:
            self.mask_token_id = None
        elif self.mask_token_id is None or not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id must lie in 0..{self.vocab_size - 1}, got {self.mask_token_id}"
            )
        if self.hidden_state not in HIDDEN_STATES:
            raise ValueError(
                f"hidden_state must be one of {', '.join(HIDDEN_STATES)}, got {self.hidden_state!r}"
            )
        kwargs.setdefault("architectures", ["LlamaForCausalLMEagle3"])
        super().__post_init__(**kwargs)

    def refuse_shapes(self) -> None:
        """Raise ``ValueError`` for sizes that no layer can be built of, in the run's own words."""
        for name, said in SIZES.items():
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{said} must be at least 1, got {size}")
        heads, groups = self.num_attention_heads, self.num_key_value_heads or 1
        if heads % groups:
            raise ValueError(
                f"num_key_value_heads must divide the {heads} heads that the drafter has from its "
                f"target, got {groups}"
            )
        if self.hidden_size % heads:
            raise ValueError(
                f"hidden_size must be a multiple of the {heads} heads that the drafter has from "
                f"its target, got {self.hidden_size}"
            )

    @property
    def method(self) -> Method:
        """The kind of drafter, as ``model.drafter`` names it."""
        return "p-eagle" if self.parallel_drafting else "eagle3"

    @property
    def num_aux(self) -> int:
        return len(self.eagle_aux_hidden_state_layer_ids)

    @property
    def pruned(self) -> bool:
        """Whether the draft head knows only part of the target's vocabulary."""
        return self.draft_vocab_size != self.vocab_size
