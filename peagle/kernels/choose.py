"""Which backend computes on which device.

To give a device its own kernels, write a subclass of ``Reference`` and add it to ``_backend``.
"""

from functools import cache
from typing import Literal

import torch

import peagle.kernels.environment  # noqa: F401 (sets limits that libraries read once)
from peagle.kernels.reference import Reference

Kernels = Literal["auto", "reference"]


def backend_for(device: torch.device, kernels: Kernels = "auto") -> Reference:
    """The backend of a device. ``auto`` is the fastest; ``reference`` is plain PyTorch.

    torch calls ROCm's devices ``cuda`` too. They have no kernels of their own here.
    """
    rocm = device.type == "cuda" and torch.version.hip is not None
    return _backend("reference" if rocm or kernels == "reference" else device.type)


@cache
def _backend(name: str) -> Reference:
    if name == "cpu":
        from peagle.kernels.cpu.backend import Cpu

        return Cpu()
    if name == "cuda":
        from peagle.kernels.cuda.backend import Cuda

        return Cuda()
    return Reference()
