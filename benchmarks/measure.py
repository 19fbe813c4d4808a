"""Time and memory of one step in this process. Needs torch only: the peer's environment uses it."""

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from shapes import Shape

# The precision of hidden states and of the target's head.
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Measured(NamedTuple):
    """``seconds`` of the fastest step; ``peak_gb`` is what the steps added to the memory in use."""

    seconds: float
    peak_gb: float


def measure(step: Callable[[], None], *, steps: int, device: torch.device) -> Measured:
    """Run ``step`` a few times; the memory in use before the first one is not counted."""
    gc.collect()
    before = reset_peak(device)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return Measured(min(times), (peak_bytes(device) - before) / 1e9)


def reset_peak(device: torch.device) -> int:
    """Start a new high-water mark; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """A line of the kernel's account of this process: ``VmRSS`` (now) or ``VmHWM`` (highest)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}: these benchmarks need Linux")


def matrix_rate(
    dtype: torch.dtype,
    device: torch.device,
    *,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul,
    size: int | None = None,
) -> float:
    """Floating-point operations per second of a large square product: the best of fifty, since a
    shared machine has half its rate for seconds at a time."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product(a, b)  # the first call sets the library up
    return 2 * size**3 / measure(lambda: product(a, b), steps=50, device=device).seconds


def autocast(shape: Shape, device: torch.device) -> contextlib.AbstractContextManager:
    """The precision that a step of this shape computes in."""
    half = shape.dtype == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()


def step_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("shape", help="JSON of the fields of Shape that differ from the default")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def print_result(shape: Shape, result: dict[str, Any]) -> None:
    print(json.dumps({"shape": asdict(shape), **result}))
