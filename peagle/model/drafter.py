"""The P-EAGLE drafter: weights in vLLM's names, and its two streams (paper section 2.2).

Slot ``p`` reads token ``x[p+1]`` and the target's hidden states ``h[p]`` at rotary position ``p``
and guesses ``x[p+2]``. A row of depth ``d >= 1`` reads the mask token and the learned mask hidden
state at position ``anchor + d``. Depth 0 never looks at deeper rows, so it is computed once and
its keys and values serve every rollout.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from peagle.cod.rollouts import Rows
from peagle.model.attention import (
    causal_attention,
    kernel_dtype,
    plan_attention,
    rollout_attention,
)
from peagle.model.config import PEagleConfig
from peagle.model.layers import DrafterLayer, RMSNorm, Rotary, rotate
from peagle.model.row_states import RowStates


class MaskRow(NamedTuple):
    """What layer 0 makes of the mask token: the same for every row of depth >= 1, but rotation.

    One row, or each its own (``RowInputs``).
    """

    query: Float[Tensor, "#M A E"]
    key: Float[Tensor, "#M G E"]
    value: Float[Tensor, "#M G E"]
    residual: Float[Tensor, "#M D"]


class RowInputs(NamedTuple):
    """What layer 0 reads in rows of depth >= 1 where they differ: all designs but ``shared``."""

    state: Float[Tensor, "1 D"]
    embedding: Float[Tensor, "1 D"]
    anchor: Float[Tensor, "S D"]  # hidden states that depth 0 reads


class Stream(NamedTuple):
    """What depth 0 leaves behind for the rollouts: its last hidden states, each layer's keys and
    values, and the mask row."""

    hidden: Float[Tensor, "S D"]
    keys: tuple[Float[Tensor, "S G E"], ...]
    values: tuple[Float[Tensor, "S G E"], ...]
    mask_row: MaskRow | RowInputs


class PEagleDrafter(PreTrainedModel):
    """Guesses the next K tokens in one pass."""

    config_class = PEagleConfig
    base_model_prefix = ""

    def __init__(self, config: PEagleConfig):
        super().__init__(config)
        width, aux_width = config.hidden_size, config.num_aux * config.target_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.fc = nn.Linear(aux_width, width, bias=False)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, aux_width))  # in the target's space
        if config.hidden_state != "shared":
            self.row_states = RowStates(config)
        if config.norm_before_fc:
            self.input_norm = RMSNorm(aux_width, eps=config.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                RMSNorm(config.target_hidden_size, eps=config.rms_norm_eps)
                for _ in range(config.num_aux)
            )
        self.layers = nn.ModuleList(
            DrafterLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.rotary = Rotary(config)
        if config.pruned:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.post_init()

    def target_ids(self, draft_ids: Int[Tensor, " *T"]) -> Int[Tensor, " *T"]:
        """Ids of the target's vocabulary for ids of the draft vocabulary."""
        return draft_ids + self.d2t[draft_ids] if self.config.pruned else draft_ids

    def combine(self, aux: Float[Tensor, "T AD"]) -> Float[Tensor, "T D"]:
        """The target's hidden states, normed and projected in vLLM's order."""
        aux = aux.to(self.fc.weight.dtype)  # a store is bf16, whatever the run computes in
        if self.config.norm_before_fc:
            aux = self.input_norm(aux)
        if self.config.fc_norm:
            parts = aux.split(self.config.target_hidden_size, -1)
            aux = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(aux)

    def mask_inputs(self) -> tuple[Float[Tensor, "1 D"], Float[Tensor, "1 D"]]:
        """Hidden state and embedding that every row of depth >= 1 reads: one vector each."""
        token = torch.tensor([self.config.mask_token_id], device=self.mask_hidden.device)
        return self.combine(self.mask_hidden.view(1, -1)), self.embed_tokens(token)

    def depth_zero(
        self,
        tokens: Int[Tensor, " S"],
        aux: Float[Tensor, "S AD"],
        position: Int[Tensor, " S"],
        *,
        document_lengths: list[int],
        recompute: bool = False,
    ) -> Stream:
        """Run the slots whose token and hidden states are known.

        ``recompute`` keeps only each layer's input for the backward pass and runs it again there.
        """
        hidden, embedding = self.combine(aux), self.embed_tokens(tokens)
        mask_row = self.mask_row(hidden)
        angles = self.rotary.angles(position, kernel_dtype(hidden, document_lengths))
        keys, values = [], []
        for layer in self.layers:
            inputs = (layer, hidden, embedding, angles, document_lengths)
            if recompute:
                hidden, key, value = checkpoint(known_slots, *inputs, use_reentrant=False)
            else:
                hidden, key, value = known_slots(*inputs)
            embedding = None
            keys.append(key)
            values.append(value.to(key.dtype))  # once, not in every segment
        return Stream(hidden, tuple(keys), tuple(values), mask_row)

    def mask_row(self, anchor: Float[Tensor, "S D"]) -> MaskRow | RowInputs:
        """Computed once per sequence; part of the stream, so that no segment repeats it."""
        if self.config.hidden_state != "shared":
            return RowInputs(*self.mask_inputs(), anchor)
        x, residual = self.layers[0].enter(*self.mask_inputs())
        return MaskRow(*self.layers[0].self_attn(x), residual)

    def enter_rows(self, rows: Rows, mask_row: MaskRow | RowInputs) -> MaskRow:
        """Layer 0's projections and residual; one row stands for all where they are the same."""
        if isinstance(mask_row, MaskRow):
            return mask_row
        anchor = mask_row.anchor[rows.anchor]
        hidden = mask_row.state + self.row_states(anchor, rows.depth)
        x, residual = self.layers[0].enter(hidden, mask_row.embedding.expand_as(hidden))
        return MaskRow(*self.layers[0].self_attn(x), residual)

    def rollouts(
        self,
        rows: Rows,
        stream: Stream,
        position: Int[Tensor, " S"],
        document: Int[Tensor, " S"],
    ) -> Float[Tensor, "M D"]:
        """Run rows of depth >= 1 against the keys and values of depth 0."""
        plan = plan_attention(rows, document, device=position.device)
        count, mask_row = len(rows.anchor), self.enter_rows(rows, stream.mask_row)
        angles = self.rotary.angles(position[rows.anchor] + rows.depth, stream.keys[0].dtype)
        query, key, value = mask_row.query, mask_row.key, mask_row.value.expand(count, -1, -1)
        hidden = residual = mask_row.residual.expand(count, -1)
        for index, layer in enumerate(self.layers):
            if index > 0:
                x, residual = layer.enter(hidden, None)
                query, key, value = layer.self_attn(x)
            context = rollout_attention(
                rotate(query, angles),
                rotate(key, angles),
                value,
                stream.keys[index],
                stream.values[index],
                plan=plan,
            )
            hidden = layer.leave(residual, context)
        return hidden

    def shared_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that every segment reads; the others serve only the stream."""
        first = self.layers[0]
        projections = first.self_attn
        inputs = (first.input_layernorm, first.hidden_norm)
        entrance = (*inputs, projections.q_proj, projections.k_proj, projections.v_proj)
        stream_only = {p for module in entrance for p in module.parameters()}
        modules: list[nn.Module] = [self.layers, self.norm, self.lm_head]
        if self.config.hidden_state != "shared":  # every segment enters layer 0 with its own rows
            stream_only = set()
            modules.append(self.row_states)
        found = (p for module in modules for p in module.parameters())
        return [p for p in found if p.requires_grad and p not in stream_only]

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T W"]:
        """Logits over the draft vocabulary."""
        return self.lm_head(self.norm(hidden))


def known_slots(
    layer: DrafterLayer,
    hidden: Float[Tensor, "S D"],
    embedding: Float[Tensor, "S D"] | None,
    angles: tuple[Float[Tensor, "S 1 F"], Float[Tensor, "S 1 F"]],
    document_lengths: list[int],
) -> tuple[Float[Tensor, "S D"], Float[Tensor, "S G E"], Float[Tensor, "S G E"]]:
    """One layer of depth 0: its output, and the keys and values that rollouts read."""
    x, residual = layer.enter(hidden, embedding)
    query, key, value = layer.self_attn(x)
    query, key = rotate(query, angles), rotate(key, angles)
    context = causal_attention(query, key, value, document_lengths=document_lengths)
    return layer.leave(residual, context), key, value
