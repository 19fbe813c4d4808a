"""The P-EAGLE drafter (paper section 2.2): every row of a round in one pass.

A row of depth ``d >= 1`` reads the mask token and the learned mask hidden state at position
``anchor + d``, so no row waits for another.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from peagle.cod.sampling import Rows
from peagle.kernels.reference import Reference
from peagle.model.config import PEagleConfig
from peagle.model.drafter import Drafter, MaskRow, MTPInputs, NTPStates
from peagle.model.mtp_hidden import MTPHidden


class PEagleDrafter(Drafter):
    """Guesses the next K tokens in one pass."""

    def __init__(self, config: PEagleConfig):
        if not config.parallel_drafting:
            raise ValueError("this is the configuration of an eagle3 drafter, not of a p-eagle one")
        super().__init__(config)
        aux_width = config.num_aux * config.target_hidden_size
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, aux_width))  # in the target's space
        if config.hidden_state != "shared":
            self.row_states = MTPHidden(config)
        self.post_init()

    def mask_inputs(self, ops: Reference) -> tuple[Float[Tensor, "1 D"], Float[Tensor, "1 D"]]:
        """Hidden state and embedding that every row of depth >= 1 reads: one vector each."""
        token = torch.tensor([self.config.mask_token_id], device=self.mask_hidden.device)
        return self.combine(self.mask_hidden.view(1, -1), ops), self.embed_tokens(token)

    def embedded(self, tokens: Int[Tensor, " S"]) -> Float[Tensor, "S1 D"]:
        return self.embed_tokens(F.pad(tokens, (0, 1), value=self.config.mask_token_id))

    def mtp_inputs(
        self,
        embedding: Float[Tensor, "S D"],
        hidden: Float[Tensor, "S D"],
        mask: Float[Tensor, "1 D"],
        ops: Reference,
    ) -> MaskRow | MTPInputs:
        """Computed once per sequence; part of NTP, so that no piece repeats it."""
        state = self.combine(self.mask_hidden.view(1, -1), ops)
        if self.config.hidden_state != "shared":
            return MTPInputs(state, mask, hidden)
        x, residual = self.layers[0].enter(state, mask, ops)
        return MaskRow(*self.layers[0].self_attn(x, ops), residual)

    def enter_rows(self, rows: Rows, inputs: MaskRow | MTPInputs, ops: Reference) -> MaskRow:
        """Layer 0's projections and residual; one row stands for all where they are the same."""
        if isinstance(inputs, MaskRow):
            return inputs
        hidden = inputs.state + self.row_states(inputs.anchor[rows.anchor], rows.depth)
        x, residual = self.layers[0].enter(hidden, inputs.embedding.expand_as(hidden), ops)
        return MaskRow(*self.layers[0].self_attn(x, ops), residual)

    def mtp_forward(
        self,
        rows: Rows,
        ntp: NTPStates,
        position: Int[Tensor, " S"],
        document: Int[Tensor, " S"],
        ops: Reference,
    ) -> Float[Tensor, "M D"]:
        """All depths >= 1 in one pass against the keys and values of NTP."""
        plan = ops.plan_mtp_attention(rows, document, value=ntp.values[0])
        count, mask_row = len(rows.anchor), self.enter_rows(rows, ntp.mtp_inputs, ops)
        slots = rows.position.to(position.device, non_blocking=True)
        angles = self.rotary.angles(position[slots], ntp.keys[0].dtype)
        query, key, value = mask_row.query, mask_row.key, mask_row.value.expand(count, -1, -1)
        hidden = residual = mask_row.residual.expand(count, -1)
        for index, layer in enumerate(self.layers):
            if index > 0:
                x, residual = layer.enter(hidden, None, ops)
                query, key, value = layer.self_attn(x, ops)
            context = ops.mtp_attention(
                ops.rotate(query, angles),
                ops.rotate(key, angles),
                value,
                ntp.keys[index],
                ntp.values[index],
                plan=plan,
            )
            hidden = layer.leave(residual, context, ops)
        return hidden

    def shared_parameters(self) -> list[nn.Parameter]:
        """Without layer 0's projections, which make one vector for all rows, in NTP."""
        first = self.layers[0]
        projections = first.self_attn
        inputs = (first.input_layernorm, first.hidden_norm)
        entrance = (*inputs, projections.q_proj, projections.k_proj, projections.v_proj)
        ntp_only = {p for module in entrance for p in module.parameters()}
        if self.config.hidden_state == "shared":
            return [p for p in super().shared_parameters() if p not in ntp_only]
        own = [p for p in self.row_states.parameters() if p.requires_grad]
        return [*super().shared_parameters(), *own]  # every piece enters layer 0 with its rows
