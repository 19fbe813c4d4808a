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
from transformers import PreTrainedModel

from peagle.cod.rollouts import Rows
from peagle.model.attention import causal_attention, plan_blocks, rollout_attention
from peagle.model.config import PEagleConfig
from peagle.model.layers import DrafterLayer, RMSNorm, Rotary, rotate


class Stream(NamedTuple):
    """What depth 0 leaves behind: its last hidden states and each layer's keys and values."""

    hidden: Float[Tensor, "S D"]
    keys: tuple[Float[Tensor, "S G E"], ...]
    values: tuple[Float[Tensor, "S G E"], ...]


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
        if not torch.is_autocast_enabled(aux.device.type):
            aux = aux.to(self.fc.weight.dtype)  # a store is bf16, whatever the run computes in
        aux = aux.to(self.fc.weight.dtype)
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
    ) -> Stream:
        """Run the slots whose token and hidden states are known."""
        hidden, embedding = self.combine(aux), self.embed_tokens(tokens)
        angles = self.rotary.angles(position, hidden.dtype)
        keys, values = [], []
        for layer in self.layers:
            x, residual = layer.enter(hidden, embedding)
            query, key, value = layer.self_attn(x)
            query, key = rotate(query, angles), rotate(key, angles)
            context = causal_attention(query, key, value, document_lengths=document_lengths)
            hidden, embedding = layer.leave(residual, context), None
            keys.append(key)
            values.append(value)
        return Stream(hidden, tuple(keys), tuple(values))

    def rollouts(
        self,
        rows: Rows,
        stream: Stream,
        position: Int[Tensor, " S"],
        document: Int[Tensor, " S"],
    ) -> Float[Tensor, "M D"]:
        """Run rows of depth >= 1 against the keys and values of depth 0.

        Layer 0 reads the same two vectors in every row: its projections are computed once and
        only rotated per row.
        """
        blocks = plan_blocks(rows, document)
        hidden, embedding = self.mask_inputs()
        angles = self.rotary.angles(position[rows.anchor] + rows.depth, hidden.dtype)
        count = len(rows.anchor)
        for layer, prefix_key, prefix_value in zip(
            self.layers, stream.keys, stream.values, strict=True
        ):
            x, residual = layer.enter(hidden, embedding)
            query, key, value = (t.expand(count, -1, -1) for t in layer.self_attn(x))
            context = rollout_attention(
                rotate(query, angles),
                rotate(key, angles),
                value,
                prefix_key,
                prefix_value,
                blocks=blocks,
            )
            hidden, embedding = layer.leave(residual.expand(count, -1), context), None
        return hidden

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T W"]:
        """Logits over the draft vocabulary."""
        return self.lm_head(self.norm(hidden))
