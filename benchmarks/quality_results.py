"""``results/quality.json``: one line per run, and what they come to."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from intervals import PEERS, compared, summary

from peagle.train.metrics import format_table

RESULTS = Path(__file__).parent / "results" / "quality.json"
KEYS = ("recipe", "fingerprint", "seed", "steps", "minutes", "k", "store", "evaluation")
PEERED = ("default", *PEERS)  # what the summary is about
Row = dict[str, Any]


class Measurement(NamedTuple):
    """What runs must share to be compared."""

    steps: int | None  # one of the two: equal steps, or equal time
    minutes: float | None
    store: str  # identity of the store; of recipes with other answers, that of the base
    evaluation: str  # hash of prompts and settings of ``test``

    def fits(self, row: Mapping[str, Any]) -> bool:
        return all(row[name] == value for name, value in self._asdict().items())


def read_rows(path: Path) -> list[Row]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def key_of(row: Mapping[str, Any]) -> tuple:
    return *(row[key] for key in KEYS), temperature_of(row)


def temperature_of(row: Mapping[str, Any]) -> float:
    """Rows without one are of the time when all were greedy."""
    return row.get("temperature", 0.0)


def save_rows(path: Path, new: Iterable[Row], measurement: Measurement) -> dict[str, Any]:
    """Add rows to those of earlier calls, in place of equal runs; returns the new summary."""
    known = {key_of(row): row for row in read_rows(path)}
    for row in new:
        known.pop(key_of(row), None)
        known[key_of(row)] = row
    rows = list(known.values())
    about = most_compared(rows, measurement)
    k, runs = headline(rows, about)
    head = {**about._asdict(), "k": k, "temperature": 0.0, **summary(runs)}
    lines = ",\n".join(json.dumps(row) for row in rows)  # a run each, or it would be endless
    text = f'{{"summary": {json.dumps(head, indent=2)},\n"rows": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
    return head


def most_compared(rows: list[Row], latest: Measurement) -> Measurement:
    """Of equal steps, the measurement in which most of default and peers have been; the latest
    where others have no more. So a quick trial, or one of equal time, leaves the summary."""
    found = dict.fromkeys(Measurement(*(row[f] for f in Measurement._fields)) for row in rows)
    equal = [m for m in found if m.minutes is None and m != latest]

    def peers(measurement: Measurement) -> int:
        runs = headline(rows, measurement)[1]
        return -1 if measurement.minutes else sum(name in runs for name in PEERED)

    return max([latest, *equal], key=peers)


def headline(rows: list[Row], measurement: Measurement) -> tuple[int | None, dict[str, list[Row]]]:
    """The greedy runs at K = 5, or else at the smallest K measured."""
    greedy = [row for row in rows if measurement.fits(row) and temperature_of(row) == 0]
    ks = sorted({row["k"] for row in greedy})
    if not ks:
        return None, {}
    k = 5 if 5 in ks else ks[0]
    return k, runs_of(greedy, measurement, k)


def runs_of(
    rows: Iterable[Row], measurement: Measurement, k: int, temperature: float = 0.0
) -> dict[str, list[Row]]:
    """Runs by recipe, all seeds. Of a recipe that was changed, those of its latest form."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if measurement.fits(row) and (row["k"], temperature_of(row)) == (k, temperature):
            same = [
                r for r in found.get(row["recipe"], []) if r["fingerprint"] == row["fingerprint"]
            ]
            found[row["recipe"]] = [*same, row]
    return found


def format_runs(
    runs: Mapping[str, list[Row]],
    reference: str = "default",
    beside: Mapping[float, Mapping[str, list[Row]]] | None = None,
) -> str:
    """Acceptance length of each recipe with its interval, and beside the reference.

    ``beside`` holds the same recipes at other temperatures, a column each. Validation losses of
    recipes with other answers are left out: they are those of other data.
    """
    more = {t: lengths(chosen, reference) for t, chosen in (beside or {}).items()}
    lines = []
    for line in compared(runs, reference):
        name, ratio, found = line["recipe"], line["ratio"], runs[line["recipe"]]
        lines.append(
            [
                name,
                str(line["seeds"]),
                with_interval(line["acceptance_length"], line["ci95"]),
                "" if ratio is None else with_interval(ratio, line["ratio_ci95"]),
                *(column[name] for column in more.values()),
                mean_of([None if row.get("data") else row["loss"] for row in found], 3),
                mean_of([60 * row["training_hours"] for row in found], 1),
            ]
        )
    header = ["recipe", "seeds", "acceptance length (95%)", f"to {reference} (95%)"]
    header += [f"at temperature {t:g} (95%)" for t in more]
    return format_table([*header, "val loss", "minutes"], lines)


def lengths(runs: Mapping[str, list[Row]], reference: str) -> dict[str, str]:
    return {
        line["recipe"]: with_interval(line["acceptance_length"], line["ci95"])
        for line in compared(runs, reference)
    }


def mean_of(values: list[float | None], digits: int) -> str:
    """Empty where it was not measured: a peer's loss is another one."""
    if None in values:
        return ""
    return f"{sum(values) / len(values):.{digits}f}"


def with_interval(value: float, bounds: list[float]) -> str:
    return f"{value:.3f} ({bounds[0]:.3f}-{bounds[1]:.3f})"
