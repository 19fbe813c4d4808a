"""What a command says at its end: what lies where, and the command to type next."""

import shlex
from pathlib import Path
from typing import Any

MADE = {  # by fit
    "drafter": "drafter/config.json",
    "card": "card/README.md",
    "curve": "metrics/curve.png",
    "checkpoint": "checkpoints/last.ckpt",
}


def command(*words: Any) -> str:
    return "  " + shlex.join(["python", "-m", "peagle", *map(str, words)])


def bench_command(drafter: Path, target: str, revision: str | None) -> str:
    pinned = () if revision is None else ("--revision", revision)
    return command("bench", "--drafter", drafter, "--target", target, *pinned)


def publish_command(run_dir: Path) -> str:
    return command("publish", "--run", run_dir, "--repo_id", "OWNER/NAME")


def after_fit(run_dir: Path, target: str, revision: str | None) -> str:
    """Only what is there is named: callbacks may have been left out."""
    there = {what: run_dir / path for what, path in MADE.items() if (run_dir / path).exists()}
    if {"card", "drafter"} <= there.keys() and older(there["card"], there["drafter"]):
        del there["card"]  # of an earlier fit: this one ended without `test`
    lines = [f"{what.ljust(10)}  {path}" for what, path in there.items()]
    if "drafter" in there:
        lines += ["next:", bench_command(run_dir / "drafter", target, revision)]
        lines += [publish_command(run_dir)] if "card" in there else []
    return "\n".join(["", *lines])


def older(path: Path, other: Path) -> bool:
    return path.stat().st_mtime < other.stat().st_mtime
