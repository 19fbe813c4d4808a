"""Speed and memory of training steps over lengths, depths, segments and precisions.

    python benchmarks/training_step.py --n 4096 --segments 1 16 --dtype fp32 bf16 --turns 6

``limit_share`` is the share of what the machine could do at best: the operations that the step
cannot do without (``shapes.py``) at the rate of a large matrix product measured in the same run.
Where several ``--n`` are given, a second table says how the time per token grows from the shortest
on, beside how its operations do (they grow by those of attention). Where several ``--segments``
are, one says what more of them cost, turn by turn: a shared machine changes between turns, and a
ratio within one is of the same minute.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from itertools import product
from math import ceil
from statistics import median
from typing import NamedTuple

import torch
from measure import STORED, matrix_rate
from report import machine, run_step, save, table
from shapes import DTYPES, SHAPES, Shape

from peagle.kernels.cpu.products import product as cpu_product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--depths", type=int, nargs="+", default=[8])
    parser.add_argument("--segments", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=2, help="per turn; the fastest counts")
    parser.add_argument("--turns", type=int, default=1, help="how often all of it is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    facts = {"shape": args.shape, "steps": args.steps, "turns": args.turns, "machine": machine()}
    rows = measure_all(args)
    keys = ("dtype", "n", "depths", "segments")
    path = save(f"training_step_{args.device}", rows, keys=keys, **facts)
    print(table([without_turns(row) for row in rows]))
    if len(set(args.n)) > 1:
        print(table([growth(row, rows) for row in rows]))
    if len(set(args.segments)) > 1:
        print(table([segment_cost(row, rows) for row in rows]))
    print(f"written to {path}")


class Step(NamedTuple):
    """What one measurement is of; ``segments`` are asked for, there may be one more or less."""

    dtype: str
    n: int
    depths: int
    segments: int

    def shape(self, name: str) -> Shape:
        return Shape(**{**SHAPES[name], "n": self.n, "depths": self.depths, "dtype": self.dtype})


def measure_all(args: argparse.Namespace) -> list[dict]:
    dtypes = [DTYPES[name] for name in args.dtype]
    steps = [Step(*each) for each in product(dtypes, args.n, args.depths, args.segments)]
    steps = list(dict.fromkeys(steps))
    rates: dict[str, float] = {}
    found: dict[Step, list[dict]] = defaultdict(list)
    for turn in range(args.turns):
        # There and back, so that what a machine does in time falls on each alike.
        for step in steps if turn % 2 == 0 else reversed(steps):
            # Again and again: a shared machine may have half its rate for a while.
            now = rate(step.dtype, torch.device(args.device))
            rates[step.dtype] = max(rates.get(step.dtype, 0.0), now)
            found[step].append(measured(step, args))
            print(json.dumps(found[step][-1]), flush=True)
    return [row_of(step.shape(args.shape), found[step], rates[step.dtype]) for step in steps]


def rate(dtype: str, device: torch.device) -> float:
    """By the faster library, which the step uses where it can: by the other one, its share of the
    rate could be beyond 1."""
    return matrix_rate(STORED[dtype], device, product=cpu_product)


def measured(step: Step, args: argparse.Namespace) -> dict:
    shape = step.shape(args.shape)
    # One rollout more than the share: the cut is made between anchors.
    limit = ceil((shape.n + shape.mtp_rows) / step.segments) + shape.depths
    options = ("--max_rows", str(limit), "--steps", str(args.steps), "--device", args.device)
    return run_step("peagle_step.py", asdict(shape), *options)


def row_of(whole: Shape, results: list[dict], rate: float) -> dict:
    result = min(results, key=lambda each: each["seconds"])
    peak = max(each["peak_gb"] for each in results)
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
        "peak_memory_gb": peak,
        "gradient_norm": result["gradient_norm"],
        "seconds_by_turn": [each["seconds"] for each in results],
    }


def without_turns(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "seconds_by_turn"}


def growth(row: dict, rows: list[dict]) -> dict:
    """Time and operations per token against the shortest of otherwise equal steps."""
    same = ("dtype", "depths", "segments")
    alike = [other for other in rows if all(other[key] == row[key] for key in same)]
    shortest = min(alike, key=lambda other: other["n"])
    columns = ("milliseconds_per_token", "least_milliseconds_per_token")
    time, operations = (row[column] / shortest[column] for column in columns)
    facts = {key: row[key] for key in ("dtype", "depths", "segments", "n")}
    return {**facts, "time_per_token": time, "operations_per_token": operations}


def segment_cost(row: dict, rows: list[dict]) -> dict:
    """Time against the fewest segments of an otherwise equal step: within each turn, and of the
    fastest."""
    same = ("dtype", "n", "depths")
    alike = [other for other in rows if all(other[key] == row[key] for key in same)]
    fewest = min(alike, key=lambda other: other["segments"])
    times, least = (each["seconds_by_turn"] for each in (row, fewest))
    ratios = sorted(a / b for a, b in zip(times, least, strict=True))
    return {
        **{key: row[key] for key in (*same, "segments")},
        "time_by_turn": median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "of_fastest": min(times) / min(least),
    }


if __name__ == "__main__":
    main()
