"""What both drafters share: weights in vLLM's names, and the NTP forward pass.

Slot ``p`` reads token ``x[p+1]`` and the target's hidden states ``h[p]`` at rotary position ``p``
and guesses ``x[p+2]``. NTP (depth 0) never looks at MTP rows, so it is computed once and its keys
and values serve every rollout. What a row of depth ``d >= 1`` reads is where the drafters differ:
``p_eagle.py`` (P-EAGLE, all depths at once) and ``eagle3.py`` (EAGLE-3, one after the other).
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from peagle.cod.sampling import Rows
from peagle.kernels.choose import Kernels, backend_for
from peagle.kernels.reference import Angles, Reference
from peagle.model.config import PEagleConfig
from peagle.model.layers import DrafterLayer, RMSNorm, Rotary


class MaskRow(NamedTuple):
    """What layer 0 makes of the mask token: the same for every MTP row before rotation.

    One row, or each its own (``MTPInputs``).
    """

    query: Float[Tensor, "#M A E"]
    key: Float[Tensor, "#M G E"]
    value: Float[Tensor, "#M G E"]
    residual: Float[Tensor, "#M D"]


class MTPInputs(NamedTuple):
    """What layer 0 reads in rows of depth >= 1 where they differ: all designs but ``shared``."""

    state: Float[Tensor, "1 D"]
    embedding: Float[Tensor, "1 D"]
    anchor: Float[Tensor, "S D"]  # hidden states that NTP reads


class NTPStates(NamedTuple):
    """What NTP leaves for MTP: its last hidden states, each layer's keys and values, and what MTP
    rows enter layer 0 with (the mask row, or the embeddings of all slots)."""

    hidden: Float[Tensor, "S D"]
    keys: tuple[Float[Tensor, "S G E"], ...]
    values: tuple[Float[Tensor, "S G E"], ...]
    mtp_inputs: MaskRow | MTPInputs | Float[Tensor, "S D"]


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

    kernels: Kernels = "auto"

    @property
    def ops(self) -> Reference:
        """What computes on the drafter's device."""
        return backend_for(self.device, self.kernels)

    def target_ids(self, draft_ids: Int[Tensor, " *T"]) -> Int[Tensor, " *T"]:
        """Ids of the target's vocabulary for ids of the draft vocabulary."""
        return draft_ids + self.d2t[draft_ids] if self.config.pruned else draft_ids

    def combine(self, aux: Float[Tensor, "T AD"], ops: Reference) -> Float[Tensor, "T D"]:
        """The target's hidden states, normed and projected in vLLM's order."""
        aux = aux.to(self.fc.weight.dtype)  # a store is bf16, whatever the run computes in
        if self.config.norm_before_fc:
            aux = self.input_norm(aux, ops)
        if self.config.fc_norm:
            layers = aux.split(self.config.target_hidden_size, -1)
            pairs = zip(self.fc_norm, layers, strict=True)
            aux = torch.cat([norm(x, ops) for norm, x in pairs], -1)
        return ops.linear(aux, self.fc.weight)

    def ntp_forward(
        self,
        tokens: Int[Tensor, " S"],
        aux: Float[Tensor, "S AD"],
        position: Int[Tensor, " S"],
        *,
        document_lengths: list[int],
        recompute: bool = False,
    ) -> NTPStates:
        """NTP: run the slots whose token and hidden states are known.

        ``recompute`` keeps only each layer's input for the backward pass and runs it again there.
        """
        ops = self.ops
        hidden, embedding = self.combine(aux, ops), self.embedded(tokens)
        embedding, mask = embedding.split([len(tokens), len(embedding) - len(tokens)])
        mtp_inputs = self.mtp_inputs(embedding, hidden, mask, ops)
        angles = self.rotary.angles(position, ops.attention_dtype(hidden, document_lengths))
        keys, values = [], []
        for layer in self.layers:
            inputs = (layer, hidden, embedding, angles, document_lengths, ops)
            if recompute:
                hidden, key, value = checkpoint(ntp_layer, *inputs, use_reentrant=False)
            else:
                hidden, key, value = ntp_layer(*inputs)
            embedding = None
            keys.append(key)
            values.append(value.to(key.dtype))  # once, not in every piece
        return NTPStates(hidden, tuple(keys), tuple(values), mtp_inputs)

    @abstractmethod
    def embedded(self, tokens: Int[Tensor, " S"]) -> Float[Tensor, "S1 D"]:
        """Embeddings of the slots' tokens and of the mask token, if there is one: looked up at
        once, since every look-up makes a gradient as large as the table."""

    @abstractmethod
    def mtp_inputs(
        self,
        embedding: Float[Tensor, "S D"],
        hidden: Float[Tensor, "S D"],
        mask: Float[Tensor, "_ D"],
        ops: Reference,
    ) -> MaskRow | MTPInputs | Float[Tensor, "S D"]:
        """What MTP rows enter layer 0 with, given what all slots of NTP enter it with."""

    @abstractmethod
    def mtp_forward(
        self,
        rows: Rows,
        ntp: NTPStates,
        position: Int[Tensor, " S"],
        document: Int[Tensor, " S"],
        ops: Reference,
    ) -> Float[Tensor, "M D"]:
        """Run rows of depth >= 1 (sorted) against the keys and values of NTP."""

    def shared_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that every piece reads; the others serve only NTP."""
        modules = (self.layers, self.norm, self.lm_head)
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T W"]:
        """Logits over the draft vocabulary."""
        return self.ops.linear(self.norm(hidden, self.ops), self.lm_head.weight)


def ntp_layer(
    layer: DrafterLayer,
    hidden: Float[Tensor, "S D"],
    embedding: Float[Tensor, "S D"] | None,
    angles: Angles,
    document_lengths: list[int],
    ops: Reference,
) -> tuple[Float[Tensor, "S D"], Float[Tensor, "S G E"], Float[Tensor, "S G E"]]:
    """One layer of NTP: its output, and the keys and values that MTP rows read."""
    x, residual = layer.enter(hidden, embedding, ops)
    query, key, value = layer.self_attn(x, ops)
    query, key = ops.rotate(query, angles), ops.rotate(key, angles)
    context = ops.ntp_attention(query, key, value, document_lengths=document_lengths)
    return layer.leave(residual, context, ops), key, value
