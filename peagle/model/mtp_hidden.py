"""The hidden state of rows of depth >= 1, for which the target has none yet (paper section 4.1).

    shared           one learned vector for all rows: what vLLM serves, and the default
    depth            + a learned vector for each depth
    anchor           + a projection of the anchor's own hidden state (the paper's "NTP hidden")
    anchor_depth     + both
    anchor_scaled    + the projection through dropout, times a learned scale that starts at 0.1
                     (the paper's "regularized NTP hidden")

The paper found ``shared`` the best. The others exist to measure that again and cannot be served.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peagle.model.config import PEagleConfig

SCALE, DROPOUT = 0.1, 0.1  # the paper's, appendix B.2


class MTPHidden(nn.Module):
    """What a design adds to the shared vector. ``shared`` needs none of it."""

    def __init__(self, config: PEagleConfig):
        super().__init__()
        design, width = config.hidden_state, config.hidden_size
        if design in ("depth", "anchor_depth"):
            self.by_depth = nn.Embedding(config.num_depths, width)
        if design.startswith("anchor"):
            self.project = nn.Linear(width, width, bias=False)
        if design == "anchor_scaled":
            self.scale = nn.Parameter(torch.tensor(SCALE))
            self.dropout = nn.Dropout(DROPOUT)

    def forward(
        self, anchor: Float[Tensor, "M D"], depth: Int[Tensor, " M"]
    ) -> Float[Tensor, "M D"]:
        """For each row: its anchor's hidden state, as NTP reads it, and its own depth.

        Depths beyond the trained ones are taken for the last of them.
        """
        added = torch.zeros_like(anchor)
        if hasattr(self, "project"):
            added = self.project(anchor)
        if hasattr(self, "scale"):
            added = self.scale * self.dropout(added)
        if hasattr(self, "by_depth"):
            last = self.by_depth.num_embeddings - 1
            added = added + self.by_depth(depth.to(anchor.device).clamp(max=last))
        return added
