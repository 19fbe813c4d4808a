"""The card's plots as PNG bytes: one per question, none for what was not measured.

A Hub page is shown on white or near-black, as its reader chose, and one PNG must do for both. Mid
tones on a transparent ground reach neither page's text contrast, so every plot brings its own
light panel with rounded corners. Figures are built without pyplot, and their style holds only while
they are drawn: a training process keeps its global state, and the same files give the same bytes.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import cycler, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from peagle.card.markdown import as_number
from peagle.card.run_files import Curve, Points, Row, RunFiles, accuracies

INK, SOFT, GRID, PANEL = "#1f2328", "#59636e", "#d8dee4", "#fbfbfa"
# Okabe and Ito's colours: told apart by readers of every kind of colour vision.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "os^DvP"
LOOKS = cycler(color=SERIES, marker=list(MARKERS))
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.prop_cycle": LOOKS,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": SOFT,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.facecolor": "none",
    "text.parse_math": False,  # a name may hold a dollar sign
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9,
}
CONDITIONS = ("engine", "dtype", "temperature")


@rc_context(STYLE)
def draw_plots(run: RunFiles) -> dict[str, bytes]:
    """File name -> PNG of every plot that the metrics allow."""
    return {name: png(PLOTS[name][1](rows)) for name, rows in measured_plots(run).items()}


def measured_plots(run: RunFiles) -> dict[str, Any]:
    """File name -> the rows to draw, for every plot that has any."""
    data = {name: select(run) for name, (select, _) in PLOTS.items()}
    return {name: rows for name, rows in data.items() if rows}


def _accuracy_over_steps(curve: dict[int, Points]) -> Figure:
    figure, (axes,) = panel("Teacher-forced accuracy of each depth on validation data")
    _plot_accuracy(axes, curve)
    legend(figure, axes)
    return figure


def _loss_over_steps(curve: Curve) -> Figure:
    figure, (axes,) = panel("Loss over training")
    _plot_loss(axes, curve)
    legend(figure, axes)
    return figure


@rc_context(STYLE)
def draw_curve(curve: Curve) -> bytes | None:
    """Loss and accuracy of each depth, side by side: PNG, None before anything was logged.

    The accuracy is of validation data, until there is any of the data in training.
    """
    if not curve:
        return None
    figure, (left, right) = panel("Loss, and teacher-forced accuracy of each depth", 2)
    _plot_loss(left, curve)
    validated = accuracies(curve, "val")
    if validated:
        _plot_accuracy(right, validated)
    else:
        _plot_accuracy(right, accuracies(curve, "train"), marker="")
    right.set_title("on validation data" if validated else "in training")
    legend(figure, left, right)
    return png(figure)


def _plot_loss(axes: Axes, curve: Curve) -> None:
    for name, label, marker in (("train/loss", "training", ""), ("val/loss", "validation", "o")):
        if name in curve:
            axes.plot(*zip(*curve[name], strict=True), marker=marker, ms=3.5, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss", xlim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)


def _plot_accuracy(axes: Axes, curve: dict[int, Points], *, marker: str = "o") -> None:
    shades = matplotlib.colormaps["viridis"]
    last = max([*curve, 1])
    for depth, points in curve.items():
        # The far end of viridis is too pale for a light panel.
        looks = {"color": shades(0.82 * depth / last), "marker": marker, "ms": 3.5}
        axes.plot(*zip(*points, strict=True), **looks, label=f"depth {depth}")
    axes.set(xlabel="optimizer step", ylabel="top-1 accuracy", xlim=(0, None), ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)


def _acceptance_over_k(rows: list[Row]) -> Figure:
    intervals = any(row.get("acceptance_length_ci95") for row in rows)
    note = ", with 95% intervals" if intervals else ""
    figure, (axes,) = panel(f"Measured acceptance length over K{note}")
    for label, series in _series(rows).items():
        series = sorted(series, key=lambda row: row["k"])
        lengths = [row["acceptance_length"] for row in series]
        # Without an interval the error bar has no length.
        bounds = [row.get("acceptance_length_ci95") or [row["acceptance_length"]] * 2
                  for row in series]  # fmt: skip
        spread = np.abs(np.transpose(bounds) - lengths)
        depths = [row["k"] for row in series]
        axes.errorbar(depths, lengths, spread, label=label, capsize=3, elinewidth=1.1)
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
        shares = [as_number(share) or 0.0 for share in row["per_position"]]
        places = np.arange(len(shares)) + 1 + (i - (len(widest) - 1) / 2) * width
        label = label if len(depths) == 1 else f"{label}, K = {row['k']}"
        axes.bar(places, shares, 0.92 * width, label=label)
    where = f" (K = {depths.pop()})" if len(depths) == 1 else ""
    axes.set(xlabel=f"position in the draft{where}", ylabel="share of rounds", ylim=(0, 1))
    axes.set_xticks(range(1, 1 + max(len(row["per_position"]) for row in widest.values())))
    legend(figure, axes)
    return figure


def _throughput(rows: list[Row]) -> Figure:
    """One panel per prompt set; what runs without a drafter stays grey."""
    several = len({row.get("method") for row in rows if row.get("drafter") is not None}) > 1
    lines = _series([{**row, "prompt_set": _drafter_label(row, several),
                      "panel": str(row.get("prompt_set"))} for row in rows])  # fmt: skip
    alone = {"color": SOFT, "ls": "--", "marker": "x"}
    looks = [  # of a line, the same in every panel
        alone if line[0].get("drafter") is None else look
        for line, look in zip(lines.values(), LOOKS(), strict=False)
    ]
    prompt_sets = list(dict.fromkeys(str(row.get("prompt_set")) for row in rows))
    figure, panels = panel("Output tokens per second over concurrent requests", len(prompt_sets))
    ticks = sorted({row["concurrency"] for row in rows})
    for prompt_set, axes in zip(prompt_sets, panels, strict=True):
        for (label, line), look in zip(lines.items(), looks, strict=True):
            points = sorted(
                (row["concurrency"], row["tokens_per_second"])
                for row in line
                if row["panel"] == prompt_set
            )
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **look)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(0, None)
        axes.set_xlabel("concurrent requests")
        axes.set_title(prompt_set)
    panels[0].set_ylabel("tokens per second")
    legend(figure, *panels)
    return figure


def _drafter_label(row: Row, several: bool) -> str:
    """``several``: drafters of several methods are compared."""
    if row.get("drafter") is None:
        return "no drafter"
    return f"{row.get('method')}, K = {row.get('k')}" if several else f"K = {row.get('k')}"


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by prompt set and conditions; the label names only the conditions that differ."""
    varying = [key for key in CONDITIONS if len({str(row.get(key)) for row in rows}) > 1]
    series: dict[str, list[Row]] = {}
    for row in rows:
        label = [str(row.get("prompt_set"))]
        for key in varying:
            value = as_number(row.get(key))
            label.append(str(row.get(key)) if value is None else f"T = {value:g}")
        series.setdefault(", ".join(label), []).append(row)
    return series


@rc_context(STYLE)
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
    return figure, grid[:count]


@rc_context(STYLE)
def legend(figure: Figure, *panels: Axes) -> None:
    """One legend beside the axes: above it would meet the title, inside it would hide a line.

    The name of a single series stands under the title instead.
    """
    named = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    if len(named) == 1:
        panels[0].set_title(*named)
    else:
        figure.legend(named.values(), named, loc="outside right center", borderaxespad=2)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version stamp equal files give equal bytes.
    figure.savefig(buffer, format="png", facecolor="none", metadata={"Software": None})
    return buffer.getvalue()


def _measured(rows: Sequence[Row], *keys: str) -> list[Row]:
    return [row for row in rows if all(as_number(row.get(key)) is not None for key in keys)]


# File name -> what of the run it shows, and how that is drawn.
PLOTS: dict[str, tuple[Callable[[RunFiles], Any], Callable[[Any], Figure]]] = {
    "accuracy_over_steps.png": (lambda run: accuracies(run.curve, "val"), _accuracy_over_steps),
    "loss_over_steps.png": (
        lambda run: {name: p for name, p in run.curve.items() if name.endswith("/loss")},
        _loss_over_steps,
    ),
    "acceptance_over_k.png": (
        lambda run: _measured(run.acceptance.rows, "k", "acceptance_length"),
        _acceptance_over_k,
    ),
    "acceptance_per_position.png": (
        lambda run: [r for r in _measured(run.acceptance.rows, "k") if r.get("per_position")],
        _acceptance_per_position,
    ),
    "throughput_over_concurrency.png": (
        lambda run: _measured(run.bench.rows, "concurrency", "tokens_per_second"),
        _throughput,
    ),
}
