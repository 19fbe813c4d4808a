"""What the two kinds of drafter share: weights in vLLM's names, and the stream of depth 0.

Slot ``p`` reads token ``x[p+1]`` and the target's hidden states ``h[p]`` at rotary position ``p``
and guesses ``x[p+2]``. Depth 0 never looks at deeper rows, so it is computed once and its keys
and values serve every rollout. What a row of depth ``d >= 1`` reads is where the kinds differ:
``drafter.py`` (P-EAGLE, all depths at once) and ``eagle3.py`` (EAGLE-3, one after the other).
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from peagle.cod.sampling import Rows
from peagle.kernels.attention import causal_attention, kernel_dtype
from peagle.kernels.products import speed_up
from peagle.model.config import PEagleConfig
from peagle.model.layers import DrafterLayer, RMSNorm, Rotary, rotate


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
    values, and what deeper rows enter with (the mask row, or the embeddings of all slots)."""

    hidden: Float[Tensor, "S D"]
    keys: tuple[Float[Tensor, "S G E"], ...]
    values: tuple[Float[Tensor, "S G E"], ...]
    entrance: MaskRow | RowInputs | Float[Tensor, "S D"]


class Drafter(PreTrainedModel, ABC):
    """Layers between the target's hidden states and a head over the draft vocabulary."""

    config_class = PEagleConfig
    base_model_prefix = ""

    def __init__(self, config: PEagleConfig):
        super().__init__(config)
        width, aux_width = config.hidden_size, config.num_aux * config.target_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.fc = nn.Linear(aux_width, width, bias=False)
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
        speed_up(self)

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
        hidden, embedding = self.combine(aux), self.embedded(tokens)
        embedding, mask = embedding.split([len(tokens), len(embedding) - len(tokens)])
        entrance = self.entrance(embedding, hidden, mask)
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
            values.append(value.to(key.dtype))  # once, not in every piece
        return Stream(hidden, tuple(keys), tuple(values), entrance)

    @abstractmethod
    def embedded(self, tokens: Int[Tensor, " S"]) -> Float[Tensor, "S1 D"]:
        """Embeddings of the slots' tokens and of the mask token, if there is one: looked up at
        once, since every look-up makes a gradient as large as the table."""

    @abstractmethod
    def entrance(
        self,
        embedding: Float[Tensor, "S D"],
        hidden: Float[Tensor, "S D"],
        mask: Float[Tensor, "_ D"],
    ) -> MaskRow | RowInputs | Float[Tensor, "S D"]:
        """What deeper rows enter layer 0 with, given what all slots of depth 0 enter it with."""

    @abstractmethod
    def rollouts(
        self,
        rows: Rows,
        stream: Stream,
        position: Int[Tensor, " S"],
        document: Int[Tensor, " S"],
    ) -> Float[Tensor, "M D"]:
        """Run rows of depth >= 1 (sorted) against the keys and values of depth 0."""

    def shared_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that every piece reads; the others serve only the stream."""
        modules = (self.layers, self.norm, self.lm_head)
        return [p for module in modules for p in module.parameters() if p.requires_grad]

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
