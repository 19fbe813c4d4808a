"""The card's plots as PNG bytes: one per question, none for what was not measured.

A Hub page is shown on white or near-black, as its reader chose, and one PNG must do for both. Mid
tones on a transparent ground reach neither page's text contrast, so every plot brings its own
light panel with rounded corners. Figures are built without pyplot: a training process keeps its
global state, and the same facts give the same bytes.
"""

import io
import math
from collections.abc import Iterable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from callbacks.facts import Facts, Row, number

ACCURACY_OVER_STEPS = "accuracy_over_steps.png"
ACCEPTANCE_OVER_K = "acceptance_over_k.png"
ACCEPTANCE_PER_POSITION = "acceptance_per_position.png"
THROUGHPUT = "throughput_over_concurrency.png"
PLOT_NAMES = (ACCURACY_OVER_STEPS, ACCEPTANCE_OVER_K, ACCEPTANCE_PER_POSITION, THROUGHPUT)

INK, SOFT, GRID, PANEL = "#1f2328", "#59636e", "#d8dee4", "#fbfbfa"
# Okabe and Ito's colours: told apart by readers of every kind of colour vision.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "os^DvP"
CONDITIONS = ("engine", "dtype", "temperature")


def draw_plots(facts: Facts) -> dict[str, bytes]:
    """File name -> PNG of every plot that the metrics allow, in the order of PLOT_NAMES."""
    figures = {
        ACCURACY_OVER_STEPS: _accuracy_over_steps(facts.accuracy_curve),
        ACCEPTANCE_OVER_K: _acceptance_over_k(facts.acceptance.rows),
        ACCEPTANCE_PER_POSITION: _acceptance_per_position(facts.acceptance.rows),
        THROUGHPUT: _throughput(facts.bench.rows),
    }
    return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def _accuracy_over_steps(curve: dict[int, list[tuple[int, float]]]) -> Figure | None:
    if not curve:
        return None
    figure, (axes,) = _panel("Teacher-forced accuracy of each depth on validation data")
    shades = matplotlib.colormaps["viridis"]
    last = max(max(curve), 1)
    for depth, points in curve.items():
        steps, accuracy = zip(*points, strict=True)
        # The far end of viridis is too pale for a light panel.
        colour = shades(0.85 * depth / last)
        axes.plot(steps, accuracy, "o-", color=colour, ms=3.5, lw=1.8, label=f"depth {depth}")
    axes.set(xlabel="optimizer step", ylabel="top-1 accuracy", ylim=(0, None))
    _integer_ticks(axes)
    _legend(axes)
    return figure


def _acceptance_over_k(rows: Sequence[Row]) -> Figure | None:
    rows = [row for row in rows if number(row.get("acceptance_length")) and number(row.get("k"))]
    if not rows:
        return None
    figure, (axes,) = _panel("Measured acceptance length over draft tokens per round")
    for i, (label, series) in enumerate(_series(rows).items()):
        series = sorted(series, key=lambda row: row["k"])
        lengths = [row["acceptance_length"] for row in series]
        axes.errorbar(
            [row["k"] for row in series],
            lengths,
            yerr=[[abs(a - b) for a, b in zip(lengths, _bound(series, j), strict=True)]
                  for j in (0, 1)],
            color=SERIES[i % len(SERIES)],
            marker=MARKERS[i % len(MARKERS)],
            ms=5,
            lw=1.8,
            capsize=3,
            elinewidth=1.1,
            label=label,
        )  # fmt: skip
    axes.set(xlabel="K, draft tokens per round", ylabel="tokens per verification")
    axes.set_ylim(1, None)  # the bonus token alone
    axes.set_xticks(sorted({row["k"] for row in rows}))
    axes.margins(x=0.1)
    _legend(axes)
    return figure


def _acceptance_per_position(rows: Sequence[Row]) -> Figure | None:
    rows = [row for row in rows if row.get("per_position") and number(row.get("k"))]
    if not rows:
        return None
    widest = {label: max(s, key=lambda row: row["k"]) for label, s in _series(rows).items()}
    figure, (axes,) = _panel("Share of rounds in which a position was accepted, at the largest K")
    width = 0.82 / len(widest)
    for i, (label, row) in enumerate(widest.items()):
        shares = [number(share) or 0.0 for share in row["per_position"]]
        offset = (i - (len(widest) - 1) / 2) * width
        at = [position + 1 + offset for position in range(len(shares))]
        colour = SERIES[i % len(SERIES)]
        axes.bar(at, shares, 0.92 * width, color=colour, label=f"{label}, K = {row['k']}")
    axes.set(xlabel="position in the draft", ylabel="share accepted", ylim=(0, 1))
    axes.set_xticks(range(1, 1 + max(len(row["per_position"]) for row in widest.values())))
    _legend(axes)
    return figure


def _throughput(rows: Sequence[Row]) -> Figure | None:
    rows = [r for r in rows if number(r.get("tokens_per_second")) and number(r.get("concurrency"))]
    if not rows:
        return None
    sets = _unique(str(row.get("prompt_set")) for row in rows)
    figure, panels = _panel("Output tokens per second over concurrent requests", len(sets))
    for prompt_set, axes in zip(sets, panels, strict=True):
        own = [{**row, "prompt_set": _drafted(row)} for row in rows
               if str(row.get("prompt_set")) == prompt_set]  # fmt: skip
        colour = 0
        for label, series in _series(own).items():
            points = sorted((row["concurrency"], row["tokens_per_second"]) for row in series)
            style = {"color": SOFT, "ls": "--", "marker": "x"}
            if series[0].get("drafter") is not None:
                style = {"color": SERIES[colour % len(SERIES)], "marker": MARKERS[colour % 6]}
                colour += 1
            axes.plot(*zip(*points, strict=True), ms=5, lw=1.8, label=label, **style)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["concurrency"] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(0, None)
        axes.set_xlabel("concurrent requests")
        axes.set_title(prompt_set, loc="left", fontsize=10, color=SOFT, parse_math=False)
        _legend(axes)
    panels[0].set_ylabel("tokens per second")
    return figure


def _drafted(row: Row) -> str:
    return "no drafter" if row.get("drafter") is None else f"K = {row.get('k')}"


def _series(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by prompt set and conditions; the label names only the conditions that differ."""
    rows = list(rows)
    varying = [key for key in CONDITIONS if len({str(row.get(key)) for row in rows}) > 1]
    series: dict[str, list[Row]] = {}
    for row in rows:
        parts = [str(row.get("prompt_set"))]
        parts += [f"T = {row.get(k)}" if k == "temperature" else str(row.get(k)) for k in varying]
        series.setdefault(", ".join(parts), []).append(row)
    return series


def _bound(series: Sequence[Row], side: int) -> list[float]:
    """One side of the 95% interval; without an interval the point itself, an error bar of 0."""
    return [
        (row.get("acceptance_length_ci95") or [row["acceptance_length"]] * 2)[side]
        for row in series
    ]


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _panel(title: str, count: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty plot of the card's look: ``count`` axes, two to a line."""
    lines = math.ceil(count / 2)
    width, height = 7.6, 0.6 + 3.0 * lines
    figure = Figure(figsize=(width, height), dpi=160, facecolor="none")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", rect=(0.02, 0.03, 0.96, 0.94))
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


def _integer_ticks(axes: Axes) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(axes: Axes) -> None:
    legend = axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a dollar sign


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version stamp equal facts give equal bytes.
    figure.savefig(buffer, format="png", facecolor="none", metadata={"Software": None})
    return buffer.getvalue()
