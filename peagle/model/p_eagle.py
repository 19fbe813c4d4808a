"""The P-EAGLE drafter (paper section 2.2): every row of a round in one pass.

A row of depth ``d >= 1`` reads the mask token and the learned mask hidden state at position
``anchor + d``, so no row waits for another.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from peagle.cod.sampling import Rows
from peagle.kernels.attention import plan_attention, rollout_attention
from peagle.model.config import PEagleConfig
from peagle.model.drafter import Drafter, MaskRow, RowInputs, Stream
from peagle.model.layers import rotate
from peagle.model.mtp_hidden import RowStates


class PEagleDrafter(Drafter):
    """Guesses the next K tokens in one pass."""

    def __init__(self, config: PEagleConfig):
        if not config.parallel_drafting:
            raise ValueError("this is the configuration of an eagle3 drafter, not of a p-eagle one")
        super().__init__(config)
        aux_width = config.num_aux * config.target_hidden_size
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, aux_width))  # in the target's space
        if config.hidden_state != "shared":
            self.row_states = RowStates(config)
        self.post_init()

    def mask_inputs(self) -> tuple[Float[Tensor, "1 D"], Float[Tensor, "1 D"]]:
        """Hidden state and embedding that every row of depth >= 1 reads: one vector each."""
        token = torch.tensor([self.config.mask_token_id], device=self.mask_hidden.device)
        return self.combine(self.mask_hidden.view(1, -1)), self.embed_tokens(token)

    def embedded(self, tokens: Int[Tensor, " S"]) -> Float[Tensor, "S1 D"]:
        return self.embed_tokens(F.pad(tokens, (0, 1), value=self.config.mask_token_id))

    def entrance(
        self,
        embedding: Float[Tensor, "S D"],
        hidden: Float[Tensor, "S D"],
        mask: Float[Tensor, "1 D"],
    ) -> MaskRow | RowInputs:
        """Computed once per sequence; part of the stream, so that no piece repeats it."""
        state = self.combine(self.mask_hidden.view(1, -1))
        if self.config.hidden_state != "shared":
            return RowInputs(state, mask, hidden)
        x, residual = self.layers[0].enter(state, mask)
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
        plan = plan_attention(rows, document, value=stream.values[0])
        count, mask_row = len(rows.anchor), self.enter_rows(rows, stream.entrance)
        slots = rows.position.to(position.device, non_blocking=True)
        angles = self.rotary.angles(position[slots], stream.keys[0].dtype)
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
                alike=len(query) == 1,  # as it is in layer 0, before rotation
            )
            hidden = layer.leave(residual, context)
        return hidden

    def shared_parameters(self) -> list[nn.Parameter]:
        """Without layer 0's entrance, which makes one vector for all rows, in the stream."""
        first = self.layers[0]
        projections = first.self_attn
        inputs = (first.input_layernorm, first.hidden_norm)
        entrance = (*inputs, projections.q_proj, projections.k_proj, projections.v_proj)
        stream_only = {p for module in entrance for p in module.parameters()}
        if self.config.hidden_state == "shared":
            return [p for p in super().shared_parameters() if p not in stream_only]
        own = [p for p in self.row_states.parameters() if p.requires_grad]
        return [*super().shared_parameters(), *own]  # every piece enters layer 0 with its rows
