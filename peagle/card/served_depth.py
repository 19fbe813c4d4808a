"""How many tokens to draft per round: the K of the card's serving lines, and why that one."""

from collections.abc import Iterable
from statistics import mean
from typing import NamedTuple

from peagle.card.markdown import as_number
from peagle.card.run_files import Metrics, Row, RunFiles, rows_of_first_method

NEAR = 0.98  # of the longest acceptance length: a longer draft is not worth its time


class ServedDepth(NamedTuple):
    """K, and the sentence that says where it comes from."""

    k: int
    reason: str


def served_depth(run: RunFiles) -> ServedDepth | None:
    """The K that ``bench`` found fastest, else the smallest that accepts about as much as any, else
    the trained depth; None where nothing is known."""
    drafted = [row for row in run.bench.rows if row.get("drafter") is not None]
    if speeds := mean_by_k(rows_of_first_method(drafted), "speedup"):
        fastest = max(speeds, key=lambda k: speeds[k])
        reason = f"K = {fastest} was the fastest in `peagle bench`."
        if (speed := speeds[fastest]) < 1:
            reason = (
                f"No K was faster than no drafter in `peagle bench`: K = {fastest} lost least, "
                f"with {speed:.2f} of the tokens per second on average."
            )
        return ServedDepth(fastest, reason)
    tested = next(iter(by_conditions(run.acceptance).values()), [])
    if lengths := mean_by_k(tested, "acceptance_length"):
        k = min(k for k, length in lengths.items() if length >= NEAR * max(lengths.values()))
        return ServedDepth(
            k,
            f"K = {k} is the smallest K whose acceptance length is within 2 % of the longest; "
            "`peagle bench` finds the fastest for your load.",
        )
    if (k := run.num_depths) is None:
        return None
    reason = f"K = {k} is the trained depth; `peagle bench` finds the fastest for your load."
    return ServedDepth(k, reason)


def mean_by_k(rows: Iterable[Row], key: str) -> dict[int, float]:
    """K -> mean of a figure over the prompt sets and loads at which every K was measured."""
    cells: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if row.get("k") and (value := as_number(row.get(key))) is not None:
            cell = cells.setdefault((row.get("prompt_set"), row.get("concurrency")), {})
            cell[row["k"]] = value
    if not cells:
        return {}
    every_k = {k for cell in cells.values() for k in cell}
    whole = [cell for cell in cells.values() if cell.keys() == every_k]
    whole = whole or [next(iter(cells.values()))]
    return {k: mean(cell[k] for cell in whole) for k in whole[0]}


def by_conditions(metrics: Metrics) -> dict[tuple, list[Row]]:
    """The rows of each engine, dtype and temperature, in the order of the file."""
    groups: dict[tuple, list[Row]] = {}
    for row in metrics.rows:
        conditions = (row.get("engine"), row.get("dtype"), row.get("temperature"))
        groups.setdefault(conditions, []).append(row)
    return groups
