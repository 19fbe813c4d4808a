"""Everything that asks which device there is: its name, memory, synchronisation and autocast."""

import platform
import resource
from pathlib import Path

import torch

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


def bf16_autocast(device: Device) -> torch.autocast:
    """A context in which matrix products are bf16."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)
