"""The same training step through this package and through speculators, in turn, in one call.

    python benchmarks/against_speculators.py --n 1024 4096 --dtype fp32 bf16 \\
        --python .venv-speculators/bin/python

speculators needs an environment of its own (``--python``): torch of the same version, then
``pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0`` and what it imports.
"""

import argparse
from itertools import product

import torch
from report import machine, run_step, save, table
from shapes import DTYPES, SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--python", required=True, help="python of speculators' environment")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--max_rows", type=int, default=4096, help="rows per segment, ours only")
    parser.add_argument("--steps", type=int, default=2, help="per turn; the fastest counts")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("shape", "max_rows", "steps", "turns")}
    facts = {**settings, "peer": "speculators 0.9.0", "machine": machine()}
    rows = []
    for dtype, n in product(args.dtype, args.n):
        shape = {**SHAPES[args.shape], "n": n, "dtype": DTYPES[dtype]}
        rows.append(compared(shape, dtype, args))
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    path = save("against_speculators", rows, keys=("device", "dtype", "n"), **facts)
    print(f"written to {path}")


def compared(shape: dict, dtype: str, args: argparse.Namespace) -> dict:
    """In turn, so that both meet the same state of the machine."""
    common = ("--steps", str(args.steps), "--device", args.device)
    ours, peers = [], []
    for _ in range(args.turns):
        ours.append(run_step("peagle_step.py", shape, "--max_rows", str(args.max_rows), *common))
        peers.append(run_step("speculators_step.py", shape, *common, python=args.python))
    seconds, peer_seconds = (min(r["seconds"] for r in runs) for runs in (ours, peers))
    peak, peer_peak = (max(r["peak_gb"] for r in runs) for runs in (ours, peers))
    return {
        "n": shape["n"],
        "dtype": dtype,
        "device": args.device,
        "tokens_per_second": shape["n"] / seconds,
        "peer_tokens_per_second": shape["n"] / peer_seconds,
        "ratio": peer_seconds / seconds,
        "peak_memory_gb": peak,
        "peer_peak_memory_gb": peer_peak,
        "memory_ratio": peak / peer_peak,
    }


if __name__ == "__main__":
    main()
