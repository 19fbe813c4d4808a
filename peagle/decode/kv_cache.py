"""Key/value caches addressed by position, so that every row of a batch has its own length.

After a verification each row keeps a different number of drafts. Writing at the position itself
makes rejected entries harmless: they are overwritten before any query can see them, because a
query at position ``p`` sees the entries ``<= p`` only.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Slots:
    """Where the tokens of the coming forward pass go; shared by all layers of a cache."""

    def __init__(self) -> None:
        self.position = torch.zeros(0, 0, dtype=torch.long)  # [B, q]
        self.limit = 0  # entries below this are read

    def place(self, position: Int[Tensor, "B q"], limit: int) -> None:
        self.position, self.limit = position, limit

    def visible(self, sliding_window: int | None = None) -> Bool[Tensor, "B q limit"]:
        """Each query sees its own entry and those before it, as many as the window has in all."""
        distance = self.position[..., None] - torch.arange(self.limit, device=self.position.device)
        causal = distance >= 0
        return causal if sliding_window is None else causal & (distance < sliding_window)


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [B, heads, capacity, head_dim]."""

    is_sliding = False

    def __init__(self, slots: Slots, capacity: int):
        super().__init__()
        self.slots, self.capacity = slots, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.capacity, width)
        self.values = value_states.new_zeros(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "B G q E"],
        value_states: Float[Tensor, "B G q E"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Write at the slots' positions; return everything below their limit."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where = self.slots.position[:, None, :, None].expand_as(key_states)
        self.keys.scatter_(2, where, key_states)
        self.values.scatter_(2, where, value_states)
        return self.keys[:, :, : self.slots.limit], self.values[:, :, : self.slots.limit]

    def get_seq_length(self) -> int:
        return self.slots.limit

    def get_max_length(self) -> int:
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.limit, 0


class SlotCache(Cache):
    """A transformers cache of ``num_layers`` slot layers."""

    def __init__(self, num_layers: int, capacity: int):
        self.slots = Slots()
        self.capacity = capacity
        super().__init__(layers=[SlotLayer(self.slots, capacity) for _ in range(num_layers)])
