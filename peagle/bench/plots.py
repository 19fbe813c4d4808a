"""The two plots of a bench: output speed over concurrency or K, acceptance length over K."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from peagle.bench.report import Row


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Write both plots; returns their paths."""
    first = rows[0]
    note = (
        f"{first['engine']} on {first['hardware']}\n"
        f"{first['dtype']}, temperature {first['temperature']:g}"
    )
    paths = []
    for name, plot in (("bench_throughput", throughput), ("bench_acceptance", acceptance)):
        # Without pyplot: it would keep every figure, and pick a window system.
        figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        plot(axes, rows)
        axes.grid(alpha=0.3)
        axes.set_title(note, fontsize=9)
        axes.legend(fontsize=8)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    return paths


def throughput(axes: Axes, rows: list[Row]) -> None:
    """Over concurrency; where that is always the same, over K, with no drafter at 0."""
    if len({row["concurrency"] for row in rows}) == 1:
        throughput_over_k(axes, rows)
        return
    keys = ("prompt_set", "prompts", "drafter", "method", "k")
    for (prompt_set, prompts, _, method, k), line in grouped(rows, *keys).items():
        drafting = "no drafter" if k is None else f"{method}, K = {k}"
        label = f"{prompt_set} ({prompts} prompts), {drafting}"
        style = "x--" if k is None else "o-"
        line = sorted(line, key=lambda row: row["concurrency"])
        x, y = zip(*((row["concurrency"], row["tokens_per_second"]) for row in line), strict=True)
        axes.plot(x, y, style, label=label)
    ticks = sorted({row["concurrency"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="concurrent requests", ylabel="output tokens per second", ylim=(0, None))


def throughput_over_k(axes: Axes, rows: list[Row]) -> None:
    alone = {row["prompt_set"]: row for row in rows if row["drafter"] is None}
    drafted = [row for row in rows if row["drafter"] is not None]
    keys = ("prompt_set", "prompts", "drafter", "method")
    for (prompt_set, prompts, _, method), line in grouped(drafted, *keys).items():
        line = [alone[prompt_set], *sorted(line, key=lambda row: row["k"])]
        x, y = zip(*((row["k"] or 0, row["tokens_per_second"]) for row in line), strict=True)
        axes.plot(x, y, "o-", label=f"{prompt_set} ({prompts} prompts), {method}")
    ticks = sorted({row["k"] for row in drafted})
    axes.set_xticks([0, *ticks], ["no drafter", *map(str, ticks)])
    at_once = rows[0]["concurrency"]
    axes.set(
        xlabel=f"K, drafts per round, with {at_once} at once",
        ylabel="output tokens per second",
        ylim=(0, None),
    )


def acceptance(axes: Axes, rows: list[Row]) -> None:
    drafted = [row for row in rows if row["drafter"] is not None]
    keys = ("prompt_set", "prompts", "drafter", "method", "concurrency")
    lines = grouped(drafted, *keys)
    for place, ((prompt_set, prompts, _, method, concurrency), line) in enumerate(lines.items()):
        line = sorted(line, key=lambda row: row["k"])
        x, y = zip(*((row["k"], row["acceptance_length"]) for row in line), strict=True)
        label = f"{prompt_set} ({prompts} prompts), {method}, {concurrency} at once"
        size = 9 - 4 * place / len(lines)  # at greedy all concurrencies lie on one another
        axes.plot(x, y, "o-", markersize=size, linewidth=size / 3, label=label)
    axes.set_xticks(sorted({row["k"] for row in drafted}))
    longest = max(row["acceptance_length"] for row in drafted)
    limits = (1, 1 + 1.25 * max(longest - 1, 0.1))  # room for the legend
    axes.set(xlabel="K, drafts per round", ylabel="tokens per verification", ylim=limits)


def grouped(rows: list[Row], *keys: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
