"""The card's measured tables: each maps the title of a column to the cell of a row."""

from collections.abc import Callable, Sequence
from pathlib import PurePath

from peagle.card.markdown import NOT_MEASURED, NOT_RECORDED, as_measurement, as_number, as_text
from peagle.card.run_files import Metrics, Row, RunFiles, Section
from peagle.card.served_depth import by_conditions, served_depth

NOTHING = "-"  # a cell with no meaning: a position beyond K, the K of no drafter

Columns = dict[str, Callable[[Row], str]]


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: as_text(row.get(key))


def _measured(key: str, digits: int) -> Callable[[Row], str]:
    return lambda row: as_measurement(row.get(key), digits)


def acceptance_table(run: RunFiles) -> str:
    """Acceptance length, one table for each engine, dtype and temperature."""
    columns = {
        "Prompt set": _text("prompt_set"),
        "K": _text("k"),
        "Acceptance length": _measured("acceptance_length", 2),
        "95% interval": _interval,
        "Prompts": _measured("prompts", 0),
        "Tokens": _measured("tokens", 0),
        "Identical to target": _lossless,
        "Tokens/s": _measured("tokens_per_second", 1),
        "Tokens/s without drafter": _measured("baseline_tokens_per_second", 1),
    }
    return _tables_by_conditions(run.acceptance, columns, left=("Prompt set",))


def acceptance_per_position_table(run: RunFiles) -> str:
    """The share of rounds in which each position of the draft was accepted."""
    last = max((len(row.get("per_position") or ()) for row in run.acceptance.rows), default=0)
    if not last:
        return f"*{NOT_MEASURED}*"

    def share(position: int) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            shares = row.get("per_position") or [None] * min(row.get("k") or last, last)
            return as_measurement(shares[position], 3) if position < len(shares) else NOTHING

        return cell

    columns = {"Prompt set": _text("prompt_set"), "K": _text("k")}
    columns |= {str(position + 1): share(position) for position in range(last)}
    return _tables_by_conditions(run.acceptance, columns, left=("Prompt set",))


def accuracy_table(run: RunFiles) -> str:
    """Teacher-forced accuracy per depth, with the number of rows behind each figure."""
    columns = {
        "Depth": _text("depth"),
        "Accuracy": _measured("accuracy", 3),
        "Accuracy if all before are right": _measured("conditional_accuracy", 3),
        "Rows": _measured("count", 0),
    }
    return _table(columns, run.validate.rows) if run.validate.rows else f"*{NOT_MEASURED}*"


def throughput_table(run: RunFiles) -> str:
    """Throughput and latency, one table for each engine, dtype and temperature."""

    def drafted(cell: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: NOTHING if row.get("drafter") is None else cell(row)

    columns = {
        "Prompt set": _text("prompt_set"),
        "Requests": _text("concurrency"),
        "Drafter": _drafter,
        "K": drafted(_text("k")),
        "Tokens/s": _measured("tokens_per_second", 1),
        "Speed-up": drafted(_measured("speedup", 2)),
        "Latency p50": _measured("latency_p50_s", 3),
        "p95": _measured("latency_p95_s", 3),
        "p99": _measured("latency_p99_s", 3),
        "First token p50": _measured("ttft_p50_s", 3),
        "Acceptance length": drafted(_measured("acceptance_length", 2)),
    }
    return _tables_by_conditions(run.bench, columns, left=("Prompt set", "Drafter"))


def headline(run: RunFiles) -> str:
    """The acceptance lengths under the first conditions, at the K that the serving lines name."""
    rows = next(iter(by_conditions(run.acceptance).values()), [])
    rows = [r for r in rows if as_number(r.get("acceptance_length")) and as_number(r.get("k"))]
    if not rows:
        return NOT_MEASURED
    depths = [row["k"] for row in rows]
    served = served_depth(run)
    k = served.k if served and served.k in depths else max(depths)
    lengths = ", ".join(
        f"**{as_measurement(row['acceptance_length'], 2)}** on {as_text(row.get('prompt_set'))}"
        for row in rows
        if row["k"] == k
    )
    conditions = f"{as_text(rows[0].get('engine'))}, temperature {_temperature(rows[0])}"
    return f"{lengths}: tokens per verification at K = {k}, {conditions}"


def by_reference_loop(run: RunFiles) -> bool:
    """Whether a row was measured by peagle's own loop, which was made to be right, not fast."""
    return any(str(row.get("engine")).startswith("peagle") for row in run.acceptance.rows)


def on_stdlib(run: RunFiles) -> bool:
    """Whether a row was measured on the prompts that ship with peagle."""
    return any(str(row.get("prompt_set")).startswith("stdlib") for row in run.acceptance.rows)


def hardware(environment: Section) -> str:
    """The machine in one phrase."""
    parts = []
    if environment["cpu"] or environment["cores"]:
        cores = "" if environment["cores"] is None else f", {environment['cores']} cores"
        parts.append(f"{as_text(environment['cpu'])}{cores}")
    if "gpu" in environment:  # null: the run had none
        parts.append(as_text(environment["gpu"] or "no GPU"))
    return " · ".join(parts) or NOT_RECORDED


def temperatures(run: RunFiles) -> str:
    """Where acceptance was measured on the axis that moves it most."""
    values = (as_number(row.get("temperature")) for row in run.acceptance.rows + run.bench.rows)
    known = sorted({value for value in values if value is not None})
    return ", ".join(f"{value:g}" for value in known) or NOT_MEASURED


def _tables_by_conditions(metrics: Metrics, columns: Columns, left: Sequence[str]) -> str:
    """A caption and a table for each engine, dtype and temperature."""
    blocks = []
    for (engine, dtype, _), rows in by_conditions(metrics).items():
        blocks.append(
            f"*Engine {as_text(engine)} · {as_text(dtype)} · temperature {_temperature(rows[0])} · "
            f"hardware: {hardware(metrics.environment)}*"
        )
        blocks.append(_table(columns, rows, left))
    return "\n\n".join(blocks) or f"*{NOT_MEASURED}*"


def _table(columns: Columns, rows: Sequence[Row], left: Sequence[str] = ()) -> str:
    """A pipe table; the columns named in ``left`` are aligned there, all others to the right."""
    rule = ["---" if title in left else "---:" for title in columns]
    lines = [columns, rule, *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _temperature(row: Row) -> str:
    value = as_number(row.get("temperature"))
    return "0 (greedy)" if value == 0 else as_text(value)


def _interval(row: Row) -> str:
    if not row.get("acceptance_length_ci95"):
        return NOT_MEASURED
    low, high = row["acceptance_length_ci95"]
    return f"{as_measurement(low, 2)}\u00a0to\u00a0{as_measurement(high, 2)}"


def _lossless(row: Row) -> str:
    """Greedy outputs can be compared with the target's own; sampled ones cannot."""
    if as_number(row.get("lossless_prompts")) is not None:
        return f"{row['lossless_prompts']:,}\u00a0of\u00a0{as_measurement(row.get('prompts'), 0)}"
    return "sampled" if as_number(row.get("temperature")) else NOT_MEASURED


def _drafter(row: Row) -> str:
    if row.get("drafter") is None:
        return "none"
    method = f" ({row['method']})" if row.get("method") else ""
    return as_text(PurePath(str(row["drafter"])).name + method)
