"""Speed and memory of training steps over lengths, depths, segments and precisions.

    python benchmarks/training_step.py --n 2048 4096 --segments 1 16 --dtype fp32 bf16

``limit_share`` is the share of what the machine could do at best: the operations that the step
cannot do without (``shapes.py``) at the rate of a large matrix product measured in the same run.
Where several ``--n`` are given, a second table says how the time per token grows from the shortest
on, beside how its operations do (they grow by those of attention).
"""

import argparse
import json
from dataclasses import asdict
from itertools import product
from math import ceil

import torch
from measure import STORED, matrix_rate
from report import machine, run_step, save, table
from shapes import DTYPES, SHAPES, Shape

from peagle.model.onednn import plain_product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--depths", type=int, nargs="+", default=[8])
    parser.add_argument("--segments", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=2, help="the fastest counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    facts = {"shape": args.shape, "steps": args.steps, "machine": machine()}
    dtypes = [DTYPES[name] for name in args.dtype]
    rates: dict[str, float] = {}
    steps = []
    for dtype, n, depths, segments in product(dtypes, args.n, args.depths, args.segments):
        # Again and again: a shared machine may have half its rate for a while.
        rates[dtype] = max(rates.get(dtype, 0.0), rate(dtype, torch.device(args.device)))
        whole = Shape(**{**SHAPES[args.shape], "n": n, "depths": depths, "dtype": dtype})
        steps.append((whole, measured(whole, segments, args)))
        print(json.dumps(steps[-1][1]), flush=True)
    rows = [row_of(whole, result, rates[whole.dtype]) for whole, result in steps]
    print(table(rows))
    if len(set(args.n)) > 1:
        print(table([growth(row, rows) for row in rows]))
    keys = ("dtype", "n", "depths", "segments")
    path = save(f"training_step_{args.device}", rows, keys=keys, **facts)
    print(f"written to {path}")


def rate(dtype: str, device: torch.device) -> float:
    """By the library that the step uses: the other one may be slower, and the share beyond 1."""
    return matrix_rate(STORED[dtype], device, product=plain_product)


def measured(whole: Shape, segments: int, args: argparse.Namespace) -> dict:
    expected = whole.n + whole.deeper_rows
    # One rollout more than the share: the cut is made between anchors.
    limit = ceil(expected / segments) + whole.depths
    options = ("--max_rows", str(limit), "--steps", str(args.steps), "--device", args.device)
    return run_step("peagle_step.py", asdict(whole), *options)


def row_of(whole: Shape, result: dict, rate: float) -> dict:
    least = sum(whole.operations().values()) / rate
    return {
        "n": whole.n,
        "depths": whole.depths,
        "segments": result["segments"],
        "dtype": whole.dtype,
        "milliseconds_per_token": 1e3 * result["seconds"] / whole.n,
        "least_milliseconds_per_token": 1e3 * least / whole.n,
        "tokens_per_second": whole.n / result["seconds"],
        "limit_share": least / result["seconds"],
        "matrix_gflops": rate / 1e9,
        "peak_memory_gb": result["peak_gb"],
        "gradient_norm": result["gradient_norm"],
    }


def growth(row: dict, rows: list[dict]) -> dict:
    """Time and operations per token against the shortest of otherwise equal steps."""
    same = ("dtype", "depths", "segments")
    alike = [other for other in rows if all(other[key] == row[key] for key in same)]
    shortest = min(alike, key=lambda other: other["n"])
    columns = ("milliseconds_per_token", "least_milliseconds_per_token")
    time, operations = (row[column] / shortest[column] for column in columns)
    facts = {key: row[key] for key in ("dtype", "depths", "segments", "n")}
    return {**facts, "time_per_token": time, "operations_per_token": operations}


if __name__ == "__main__":
    main()
