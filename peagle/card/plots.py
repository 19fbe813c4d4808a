"""The card's plots as PNG bytes: one per question, none for what was not measured.

A Hub page is shown on white or near-black, as its reader chose, and one PNG must do for both. Mid
tones on a transparent ground reach neither page's text contrast, so every plot brings its own
light panel with rounded corners. Figures are built without pyplot: a training process keeps its
global state, and the same facts give the same bytes.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from peagle.card.run_files import Facts, Row, number

ACCURACY_OVER_STEPS = "accuracy_over_steps.png"
ACCEPTANCE_OVER_K = "acceptance_over_k.png"
ACCEPTANCE_PER_POSITION = "acceptance_per_position.png"
THROUGHPUT = "throughput_over_concurrency.png"

INK, SOFT, GRID, PANEL = "#1f2328", "#59636e", "#d8dee4", "#fbfbfa"
# Okabe and Ito's colours: told apart by readers of every kind of colour vision.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "os^DvP"
CONDITIONS = ("engine", "dtype", "temperature")


def draw_plots(facts: Facts) -> dict[str, bytes]:
    """File name -> PNG of every plot that the metrics allow."""
    return {name: png(PLOTS[name][1](rows)) for name, rows in _plot_data(facts).items()}


def plotted(facts: Facts) -> list[str]:
    """The names of those plots, without drawing them."""
    return list(_plot_data(facts))


def _plot_data(facts: Facts) -> dict[str, Any]:
    data = {name: select(facts) for name, (select, _) in PLOTS.items()}
    return {name: rows for name, rows in data.items() if rows}


def _rows_with(rows: Sequence[Row], *keys: str) -> list[Row]:
    return [row for row in rows if all(number(row.get(key)) is not None for key in keys)]


def _accuracy_over_steps(curve: dict[int, list[tuple[int, float]]]) -> Figure:
    figure, (axes,) = panel("Teacher-forced accuracy of each depth on validation data")
    shades = matplotlib.colormaps["viridis"]
    last = max(max(curve), 1)
    for depth, points in curve.items():
        steps, accuracy = zip(*points, strict=True)
        # The far end of viridis is too pale for a light panel.
        colour = shades(0.82 * depth / last)
        axes.plot(steps, accuracy, "o-", color=colour, ms=3.5, lw=1.8, label=f"depth {depth}")
    axes.set(xlabel="optimizer step", ylabel="top-1 accuracy", xlim=(0, None), ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes)
    return figure


def _acceptance_over_k(rows: list[Row]) -> Figure:
    bars = any(row.get("acceptance_length_ci95") for row in rows)
    note = ", with 95% intervals" if bars else ""
    figure, (axes,) = panel(f"Measured acceptance length over K{note}")
    for i, (label, series) in enumerate(_series(rows).items()):
        series = sorted(series, key=lambda row: row["k"])
        lengths = [row["acceptance_length"] for row in series]
        # Without an interval the error bar has no length.
        bounds = [
            row.get("acceptance_length_ci95") or [row["acceptance_length"]] * 2 for row in series
        ]
        spread = [
            [abs(x - bound[side]) for x, bound in zip(lengths, bounds, strict=True)]
            for side in (0, 1)
        ]
        style = {
            "color": SERIES[i % len(SERIES)],
            "marker": MARKERS[i % len(MARKERS)],
            "label": label,
        }
        axes.errorbar(
            [row["k"] for row in series],
            lengths,
            spread,
            capsize=3,
            ms=5,
            lw=1.8,
            elinewidth=1.1,
            **style,
        )
    axes.set(xlabel="K, draft tokens per round", ylabel="tokens per verification")
    axes.set_ylim(1, None)  # 1 is the bonus token alone
    axes.set_xticks(sorted({row["k"] for row in rows}))
    axes.margins(x=0.1)
    legend(figure, axes)
    return figure


def _acceptance_per_position(rows: list[Row]) -> Figure:
    widest = {label: max(s, key=lambda row: row["k"]) for label, s in _series(rows).items()}
    figure, (axes,) = panel("Share of rounds in which each position was accepted")
    width = 0.82 / len(widest)
    depths = {row["k"] for row in widest.values()}
    for i, (label, row) in enumerate(widest.items()):
        shares = [number(share) or 0.0 for share in row["per_position"]]
        offset = (i - (len(widest) - 1) / 2) * width
        at = [position + 1 + offset for position in range(len(shares))]
        colour = SERIES[i % len(SERIES)]
        label = label if len(depths) == 1 else f"{label}, K = {row['k']}"
        axes.bar(at, shares, 0.92 * width, color=colour, label=label)
    where = f" (K = {depths.pop()})" if len(depths) == 1 else ""
    axes.set(xlabel=f"position in the draft{where}", ylabel="share of rounds", ylim=(0, 1))
    axes.set_xticks(range(1, 1 + max(len(row["per_position"]) for row in widest.values())))
    legend(figure, axes)
    return figure


def _throughput(rows: list[Row]) -> Figure:
    several = len({row.get("method") for row in rows if row.get("drafter") is not None}) > 1
    series = _series([{**row, "panel": str(row.get("prompt_set")),
                       "prompt_set": _drafted(row, several)} for row in rows])  # fmt: skip
    sets = list(dict.fromkeys(str(row.get("prompt_set")) for row in rows))
    figure, panels = panel("Output tokens per second over concurrent requests", len(sets))
    ticks = sorted({row["concurrency"] for row in rows})
    for prompt_set, axes in zip(sets, panels, strict=True):
        for (label, own), style in zip(series.items(), _throughput_styles(series), strict=True):
            points = sorted(
                (row["concurrency"], row["tokens_per_second"])
                for row in own
                if row["panel"] == prompt_set
            )
            if points:
                axes.plot(*zip(*points, strict=True), ms=5, lw=1.8, label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(0, None)
        axes.set_xlabel("concurrent requests")
        axes.set_title(prompt_set, loc="left", fontsize=10, color=SOFT, parse_math=False)
    panels[0].set_ylabel("tokens per second")
    legend(figure, *panels)
    return figure


def _throughput_styles(series: dict[str, list[Row]]) -> list[dict[str, str]]:
    """One look per line, the same in every panel; what runs without a drafter stays grey."""
    styles = []
    for i, rows in enumerate(series.values()):
        alone = {"color": SOFT, "ls": "--", "marker": "x"}
        drafted = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]}
        styles.append(alone if rows[0].get("drafter") is None else drafted)
    return styles


def _drafted(row: Row, several: bool) -> str:
    """``several``: drafters of several kinds are compared."""
    if row.get("drafter") is None:
        return "no drafter"
    return f"{row.get('method')}, K = {row.get('k')}" if several else f"K = {row.get('k')}"


def _series(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by prompt set and conditions; the label names only the conditions that differ."""
    rows = list(rows)
    varying = [key for key in CONDITIONS if len({str(row.get(key)) for row in rows}) > 1]
    series: dict[str, list[Row]] = {}
    for row in rows:
        parts = [str(row.get("prompt_set"))]
        for key in varying:
            value = number(row.get(key))
            parts.append(str(row.get(key)) if value is None else f"T = {value:g}")
        series.setdefault(", ".join(parts), []).append(row)
    return series


def panel(title: str, count: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty plot of the card's look: ``count`` axes, two to a line."""
    lines = math.ceil(count / 2)
    width, height = 7.6, 0.6 + 3.0 * lines
    figure = Figure(figsize=(width, height), dpi=160, facecolor="none")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.2, h_pad=0.17, wspace=0, hspace=0)
    figure.add_artist(
        FancyBboxPatch(
            (0.03, 0.03),
            width - 0.06,
            height - 0.06,
            boxstyle="round,pad=0,rounding_size=0.14",
            transform=figure.dpi_scale_trans,
            facecolor=PANEL,
            edgecolor=GRID,
            zorder=-1,
        )
    )
    figure.suptitle(title, x=0.03, ha="left", fontsize=12, fontweight="bold", color=INK)
    grid = figure.subplots(lines, min(count, 2), squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(SOFT)
        axes.tick_params(colors=SOFT, labelcolor=INK, labelsize=9)
        axes.grid(axis="y", color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.label.set(color=INK, fontsize=10)
        axes.yaxis.label.set(color=INK, fontsize=10)
    return figure, grid[:count]


def legend(figure: Figure, *panels: Axes) -> None:
    """One legend beside the axes: above it would meet the title, inside it would hide a line.

    The name of a single series stands under the title instead.
    """
    named = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named |= {label: handle for handle, label in zip(handles, labels, strict=True)}
    if len(named) == 1:
        (label,) = named
        panels[0].set_title(label, loc="left", fontsize=10, color=SOFT, parse_math=False)
        return
    named_lines = figure.legend(
        named.values(),
        named,
        loc="outside right center",
        borderaxespad=2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    for text in named_lines.get_texts():
        text.set_parse_math(False)  # a name may hold a dollar sign


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version stamp equal facts give equal bytes.
    figure.savefig(buffer, format="png", facecolor="none", metadata={"Software": None})
    return buffer.getvalue()


PLOTS: dict[str, tuple[Callable[[Facts], Any], Callable[[Any], Figure]]] = {
    ACCURACY_OVER_STEPS: (lambda facts: facts.accuracy_curve, _accuracy_over_steps),
    ACCEPTANCE_OVER_K: (
        lambda facts: _rows_with(facts.acceptance.rows, "k", "acceptance_length"),
        _acceptance_over_k,
    ),
    ACCEPTANCE_PER_POSITION: (
        lambda facts: [r for r in _rows_with(facts.acceptance.rows, "k") if r.get("per_position")],
        _acceptance_per_position,
    ),
    THROUGHPUT: (
        lambda facts: _rows_with(facts.bench.rows, "concurrency", "tokens_per_second"),
        _throughput,
    ),
}
