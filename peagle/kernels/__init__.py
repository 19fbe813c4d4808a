"""Everything that depends on hardware, behind one object: ``backend_for(device)``.

``reference`` is plain PyTorch and runs anywhere. ``cpu`` and ``cuda`` override what they do faster.
"""

from functools import cache
from typing import Literal

import torch

from peagle.kernels.reference import Reference

Kernels = Literal["auto", "reference"]


def backend_for(device: torch.device, kernels: Kernels = "auto") -> Reference:
    """The backend of a device. ``auto`` is the fastest; ``reference`` is plain PyTorch."""
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
