"""Memory for the states of packed sequences, used again when nothing refers to it any more."""

import weakref
from collections import deque

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


class Buffers:
    """Hands out memory. Memory that was never used costs page faults, more than reading into it.

    It comes back by itself when the last tensor on it is gone, so whoever keeps a batch, keeps its
    contents. ``pinned`` memory, for copies to a GPU, is torch's to use again: only torch knows when
    such a copy is done.
    """

    def __init__(self, *, pinned: bool = False):
        self.pinned = pinned
        self.free: deque[np.ndarray] = deque()

    def take(self, size: int) -> UInt8[Tensor, " size"]:
        """Memory with anything in it; threads may ask at the same time."""
        if self.pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        try:
            memory = self.free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        if len(memory) < size:
            memory = np.empty(size, np.uint8)
        lent = memory[:size]
        weakref.finalize(lent, self.free.append, memory)
        return torch.from_numpy(lent)
