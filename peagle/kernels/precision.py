"""In which precision a product is computed, and in which one its sums are kept."""

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(x: Float[Tensor, "..."]) -> torch.dtype:
    """What autocast makes of a matrix product with ``x``."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype
