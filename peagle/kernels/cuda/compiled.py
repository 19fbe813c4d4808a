"""Functions that are one kernel on CUDA: what lies between the matrix products.

There each of PyTorch's operators is a pass over memory of its own, and these functions have five to
fifteen of them. Compiled, they read what they need once and write what they find. On the CPU they
run as they are written.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled where its first tensor is on CUDA: once, for inputs of all lengths."""

    @cache
    def kernel() -> Callable[..., Any]:
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def run(*args: Any) -> Any:
        first = next(x for x in args if isinstance(x, Tensor))
        return (kernel() if first.is_cuda else function)(*args)

    return run
