"""Everything that asks which device there is: its name, memory, synchronisation and autocast."""

import platform
import resource
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from peagle.kernels.cpu import products

Device = torch.device | str


def pick_device(name: str) -> str:
    """``auto`` is a GPU if there is one; any other name stays.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"there is no device {name!r} here ({told}): give cpu, or auto") from error
    return name


def cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def gpu_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def has_own_memory(device: Device) -> bool:
    """Whether the device's memory is apart from the program's."""
    return torch.device(device).type != "cpu"


def peak_memory(device: Device) -> int:
    """Most bytes of the device that this process has held at once."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def pinned(device: Device) -> bool:
    """Whether copies to the device are faster from pinned memory."""
    return torch.device(device).type == "cuda"


def synchronize(device: Device) -> None:
    """Wait until the device has done its work; a CPU has when a call returns."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def without_autocast(device: Device) -> torch.autocast:
    """A context in which Lightning's mixed precision does not round."""
    return torch.autocast(torch.device(device).type, enabled=False)


class _Float32ForBf16(TorchFunctionMode):
    """``x.bfloat16()`` gives a copy in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def without_slow_bf16(device: Device) -> AbstractContextManager:
    """A context in which code that asks for bf16 gets float32 on a CPU that has no products of it.

    Muon iterates in bf16: a step of the quickstart takes 0.55 s of one thread instead of 4.4.
    """
    slow = torch.device(device).type == "cpu" and not products.FAST_BF16
    return _Float32ForBf16() if slow else nullcontext()


def bf16_autocast(device: Device) -> torch.autocast:
    """A context in which matrix products are bf16."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)
