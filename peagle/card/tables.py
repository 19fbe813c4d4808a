"""The card's measured tables, and how a value becomes Markdown that cannot leave its place."""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from peagle.card.run_files import Environment, Facts, Measured, Row, number

NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"
NOTHING = "-"  # a cell with no meaning: a position beyond K, the K of no drafter


def plain(value: Any) -> str:
    """One line of printable characters: no value can start a line, a fence or a document."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def text(value: Any) -> str:
    """``value`` as prose, every character that Markdown reads escaped."""
    return re.sub(r"([\\`*_\[\]<>#~&!|])", r"\\\1", plain(value))


def code(value: Any) -> str:
    """``value`` as inline code, fenced by more backticks than it holds; absent, it says so."""
    if value is None or value == "":
        return NOT_RECORDED
    content = plain(value).replace("|", r"\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", content)), default=0))
    pad = " " if content.startswith("`") or content.endswith("`") else ""
    return f"{fence}{pad}{content}{pad}{fence}"


def recorded(value: Any, digits: int | None = None) -> str:
    """A fact for the page; what is absent says so."""
    if value is None or value == "" or value == []:
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}" if digits is None else f"{value:,.{digits}f}"
    if isinstance(value, list | tuple):
        return ", ".join(recorded(item) for item in value)
    return text(value)


def measured(value: Any, digits: int) -> str:
    """A measurement for the page; what is absent says so."""
    return NOT_MEASURED if number(value) is None else f"{value:,.{digits}f}"


def public(value: str | None) -> str | None:
    """``value`` with each absolute path cut to its last part: the folders are nobody's business."""
    if value is None:
        return None
    return re.sub(r"(?<![\w.:/])~?/[^\s'\"]*", lambda path: PurePath(path[0]).name, value)


def headline(facts: Facts) -> str:
    """The acceptance lengths under the first conditions, at the K that the serving lines name."""
    rows = next(iter(_by_conditions(facts.acceptance).values()), [])
    rows = [row for row in rows if number(row.get("acceptance_length")) and number(row.get("k"))]
    if not rows:
        return NOT_MEASURED
    depths = [row["k"] for row in rows]
    k = facts.num_depths if facts.num_depths in depths else max(depths)
    lengths = [
        f"**{measured(row['acceptance_length'], 2)}** on {recorded(row.get('prompt_set'))}"
        for row in rows
        if row["k"] == k
    ]
    conditions = f"{recorded(rows[0].get('engine'))}, temperature {_temperature(rows[0])}"
    return f"{', '.join(lengths)}: tokens per verification at K = {k}, {conditions}"


def by_reference(facts: Facts) -> bool:
    """Whether a row was measured by peagle's own loop, which was made to be right, not fast."""
    return any(str(row.get("engine")).startswith("peagle") for row in facts.acceptance.rows)


def on_stdlib(facts: Facts) -> bool:
    """Whether a row was measured on the prompts that ship with peagle."""
    return any(str(row.get("prompt_set")).startswith("stdlib") for row in facts.acceptance.rows)


def acceptance(facts: Facts) -> str:
    """Acceptance length, one table for each engine, dtype and temperature."""
    header = ("Prompt set", "K", "Acceptance length", "95% interval", "Prompts", "Tokens",
              "Identical to target", "Tokens/s", "Tokens/s without drafter")  # fmt: skip
    return _tables(facts.acceptance, header, _acceptance_cells, align="lrrrrrrrr")


def _acceptance_cells(row: Row) -> list[str]:
    return [
        recorded(row.get("prompt_set")),
        recorded(row.get("k")),
        measured(row.get("acceptance_length"), 2),
        _interval(row.get("acceptance_length_ci95")),
        measured(row.get("prompts"), 0),
        measured(row.get("tokens"), 0),
        _lossless(row),
        measured(row.get("tokens_per_second"), 1),
        measured(row.get("baseline_tokens_per_second"), 1),
    ]


def acceptance_per_position(facts: Facts) -> str:
    """The share of rounds in which each position of the draft was accepted."""
    last = max((len(row.get("per_position") or ()) for row in facts.acceptance.rows), default=0)
    header = ["Prompt set", "K", *(str(position + 1) for position in range(last))]

    def cells(row: Row) -> list[str]:
        shares = row.get("per_position") or [None] * min(row.get("k") or last, last)
        beyond = [NOTHING] * (last - len(shares))
        return [
            recorded(row.get("prompt_set")),
            recorded(row.get("k")),
            *(measured(share, 3) for share in shares),
            *beyond,
        ]

    if not last:
        return f"*{NOT_MEASURED}*"
    return _tables(facts.acceptance, header, cells, align="l" + "r" * (last + 1))


def accuracy(facts: Facts) -> str:
    """Teacher-forced accuracy per depth, with the number of rows behind each figure."""
    rows = [
        [
            recorded(row.get("depth")),
            measured(row.get("accuracy"), 3),
            measured(row.get("conditional_accuracy"), 3),
            measured(row.get("count"), 0),
        ]
        for row in facts.validate.rows
    ]
    header = ("Depth", "Accuracy", "Accuracy if all before are right", "Rows")
    return _table(header, rows, align="rrrr") if rows else f"*{NOT_MEASURED}*"


def bench(facts: Facts) -> str:
    """Throughput and latency, one table for each engine, dtype and temperature."""
    header = ("Prompt set", "Requests", "Drafter", "K", "Tokens/s", "Speed-up", "Latency p50",
              "p95", "p99", "First token p50", "Acceptance length")  # fmt: skip
    return _tables(facts.bench, header, _bench_cells, align="lrlrrrrrrrr")


def _bench_cells(row: Row) -> list[str]:
    drafter = row.get("drafter")
    alone = drafter is None
    method = f" ({row['method']})" if row.get("method") else ""
    return [
        recorded(row.get("prompt_set")),
        recorded(row.get("concurrency")),
        "none" if alone else text(PurePath(str(drafter)).name + method),
        NOTHING if alone else recorded(row.get("k")),
        measured(row.get("tokens_per_second"), 1),
        NOTHING if alone else measured(row.get("speedup"), 2),
        measured(row.get("latency_p50_s"), 3),
        measured(row.get("latency_p95_s"), 3),
        measured(row.get("latency_p99_s"), 3),
        measured(row.get("ttft_p50_s"), 3),
        NOTHING if alone else measured(row.get("acceptance_length"), 2),
    ]


def hardware(environment: Environment) -> str:
    """The machine in one phrase."""
    parts = []
    if environment.cpu or environment.cores:
        cores = "" if environment.cores is None else f", {environment.cores} cores"
        parts.append(f"{recorded(environment.cpu)}{cores}")
    if environment.gpu:
        parts.append("no GPU" if environment.gpu == "none" else text(environment.gpu))
    return " · ".join(parts) or NOT_RECORDED


def temperatures(facts: Facts) -> str:
    """Where acceptance was measured on the axis that moves it most."""
    known = {row["temperature"] for row in facts.acceptance.rows + facts.bench.rows
             if number(row.get("temperature")) is not None}  # fmt: skip
    return ", ".join(f"{value:g}" for value in sorted(known)) or NOT_MEASURED


def _tables(source: Measured, header: Sequence[str], cells, *, align: str) -> str:
    blocks = []
    for (engine, dtype, _), rows in _by_conditions(source).items():
        blocks.append(
            f"*Engine {recorded(engine)} · {recorded(dtype)} · temperature "
            f"{_temperature(rows[0])} · hardware: {hardware(source.environment)}*"
        )
        blocks.append(_table(header, map(cells, rows), align=align))
    return "\n\n".join(blocks) or f"*{NOT_MEASURED}*"


def _by_conditions(source: Measured) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in source.rows:
        conditions = (row.get("engine"), row.get("dtype"), row.get("temperature"))
        groups.setdefault(conditions, []).append(row)
    return groups


def _temperature(row: Row) -> str:
    value = number(row.get("temperature"))
    return "0 (greedy)" if value == 0 else recorded(value)


def _interval(bounds: Sequence[float] | None) -> str:
    if not bounds:
        return NOT_MEASURED
    low, high = bounds
    return f"{measured(low, 2)}\u00a0to\u00a0{measured(high, 2)}"


def _lossless(row: Row) -> str:
    """Greedy outputs can be compared with the target's own; sampled ones cannot."""
    if number(row.get("lossless_prompts")) is not None:
        return f"{row['lossless_prompts']:,}\u00a0of\u00a0{measured(row.get('prompts'), 0)}"
    return "sampled" if number(row.get("temperature")) else NOT_MEASURED


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, align: str) -> str:
    """A pipe table; ``align`` holds one l or r per column."""
    rule = ["---:" if side == "r" else "---" for side in align]
    lines = [header, rule, *rows]
    assert all(len(line) == len(header) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
