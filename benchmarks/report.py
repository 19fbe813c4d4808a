"""What every benchmark leaves behind: a table on the screen and a JSON file with the machine."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "transformers", "safetensors")


def machine() -> dict[str, Any]:
    """Where and when something was measured."""
    facts = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    named = {key.strip(): value.strip() for key, value in facts.items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": named.get("model name", platform.processor()),
        "processor_family": named.get("cpu family"),  # which libraries are used depends on it
        "matrix_tiles": "amx_tile" in named.get("flags", "").split(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],  # above 0 others were computing too
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def save(name: str, rows: list[dict[str, Any]], *, keys: tuple[str, ...], **facts: Any) -> Path:
    """Write ``benchmarks/results/NAME.json``; rows of earlier calls stay unless measured again, on
    a processor of the same family.

    Long measurements can so be split over calls. Every row carries the facts of its call.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"

    def identity(row: dict[str, Any]) -> list[Any]:
        return [*(row[key] for key in keys), row["machine"].get("processor_family") or ""]

    rows = [{**row, **facts} for row in rows]
    measured = [identity(row) for row in rows]
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in before if identity(row) not in measured]
    found = sorted(kept + rows, key=identity)
    path.write_text(json.dumps({"rows": found}, indent=2) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Columns in the order of the first row's keys."""
    lines = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def run_step(script: str, shape: dict[str, Any], *options: str, python: str = sys.executable):
    """One measurement in a process of its own, so that none sees another's memory."""
    command = [python, str(Path(__file__).with_name(script)), json.dumps(shape), *options]
    env = dict(os.environ)
    if python == sys.executable:
        places = (str(Path(__file__).parents[1]), env.get("PYTHONPATH"))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
