"""``results/quality.json``: one line per run, and what they come to."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from intervals import compared, summary

from peagle.metrics import format_table

RESULTS = Path(__file__).parent / "results" / "quality.json"
KEYS = ("recipe", "fingerprint", "seed", "steps", "minutes", "k", "store", "evaluation")
Row = dict[str, Any]


class Measurement(NamedTuple):
    """What runs must share to be compared."""

    steps: int | None  # one of the two: equal steps, or equal time
    minutes: float | None
    store: str  # identity of the store
    evaluation: str  # hash of prompts and settings of ``test``

    def fits(self, row: Mapping[str, Any]) -> bool:
        return all(row[name] == value for name, value in self._asdict().items())


def read_rows(path: Path) -> list[Row]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def key_of(row: Mapping[str, Any]) -> tuple:
    return tuple(row[key] for key in KEYS)


def save_rows(path: Path, new: Iterable[Row], measurement: Measurement) -> dict[str, Any]:
    """Add rows to those of earlier calls, in place of equal runs; returns the new summary."""
    known = {key_of(row): row for row in read_rows(path)}
    for row in new:
        known.pop(key_of(row), None)
        known[key_of(row)] = row
    rows = list(known.values())
    k, runs = headline(rows, measurement)
    head = {**measurement._asdict(), "k": k, "temperature": 0.0, **summary(runs)}
    lines = ",\n".join(json.dumps(row) for row in rows)  # a run each, or it would be endless
    text = f'{{"summary": {json.dumps(head, indent=2)},\n"rows": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
    return head


def headline(rows: list[Row], measurement: Measurement) -> tuple[int | None, dict[str, list[Row]]]:
    """The runs at K = 5, or else at the smallest K measured."""
    ks = sorted({row["k"] for row in rows if measurement.fits(row)})
    if not ks:
        return None, {}
    k = 5 if 5 in ks else ks[0]
    return k, runs_of(rows, measurement, k)


def runs_of(rows: Iterable[Row], measurement: Measurement, k: int) -> dict[str, list[Row]]:
    """Runs by recipe, all seeds. Of a recipe that was changed, those of its latest form."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if measurement.fits(row) and row["k"] == k:
            same = [
                r for r in found.get(row["recipe"], []) if r["fingerprint"] == row["fingerprint"]
            ]
            found[row["recipe"]] = [*same, row]
    return found


def format_runs(runs: Mapping[str, list[Row]], reference: str = "default") -> str:
    """Acceptance length of each recipe with its interval, and beside the reference."""
    lines = []
    for line in compared(runs, reference):
        ratio, best = line["ratio"], runs[line["recipe"]]
        lines.append(
            [
                line["recipe"],
                str(line["seeds"]),
                with_interval(line["acceptance_length"], line["ci95"]),
                "" if ratio is None else with_interval(ratio, line["ratio_ci95"]),
                mean_of([row["loss"] for row in best], 3),
                mean_of([60 * row["training_hours"] for row in best], 1),
            ]
        )
    header = ["recipe", "seeds", "acceptance length (95%)", f"to {reference} (95%)"]
    return format_table([*header, "val loss", "minutes"], lines)


def mean_of(values: list[float | None], digits: int) -> str:
    """Empty where it was not measured: a peer's loss is another one."""
    if None in values:
        return ""
    return f"{sum(values) / len(values):.{digits}f}"


def with_interval(value: float, bounds: list[float]) -> str:
    return f"{value:.3f} ({bounds[0]:.3f}-{bounds[1]:.3f})"
