# SPDX-License-Identifier: Apache-2.0
"""The figures of a study's report, as SVG that takes its colours from the page around it.

Matplotlib draws them. Every colour is then replaced by a CSS variable, so that one figure serves a
light and a dark page, and text stays text in the page's own font. What is drawn in large numbers
(the points of a thousand trials) is one path each, which keeps a figure at a few kilobytes.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rl_ref.show.figures import LINES

#: Colours as Matplotlib gets them, and the CSS variables that take their place.
INK, MUTED, GRID, GROUND = "#1b1b1f", "#63636e", "#dcdce1", "#fdfdfe"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", GROUND: "ground"} | {
    str(style["color"]): f"line-{number}" for number, style in enumerate(LINES)
}

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "path.simplify": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Axis:
    """One quantity: a parameter or an objective.

    Attributes:
        name: Its full name.
        log: Whether its scale is logarithmic.
        choices: Its values in order if it is categorical, else None.
        low: The least value that it may have, None if that is not known.
        high: The largest.
    """

    name: str
    log: bool = False
    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None

    def position(self, value: Any) -> float:
        """Where a value lies on the scale: its index if it is categorical, its log on a log one."""
        if self.choices is not None:
            return float(self.choices.index(value))
        return math.log10(value) if self.log else float(value)


def _styled(draw: Callable[..., str]) -> Callable[..., str]:
    """Draws in this module's style, whatever the caller's Matplotlib is set to."""

    @functools.wraps(draw)
    def styled(*arguments: Any, **named: Any) -> str:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return draw(*arguments, **named)

    return styled


@_styled
def history(
    values: Sequence[tuple[int, float]],
    best: Sequence[tuple[int, float]],
    pruned: Sequence[tuple[int, float]],
    failed: Sequence[int],
    axis: Axis,
) -> str:
    """The value of each trial in the order of their numbers, and the best up to each.

    Args:
        values: Number and value of each complete trial.
        best: Number and best value up to it, of each complete trial.
        pruned: Number and last intermediate value of each pruned trial.
        failed: Numbers of the failed trials, which have no value.
        axis: The objective.
    """
    figure, (axes,) = _figure(1, height=2.6)
    _dots(axes, values, 0, "finished")
    if pruned:
        axes.plot(*zip(*pruned, strict=True), ls="", marker="^", ms=4, mfc="none",
                  mec=LINES[3]["color"], mew=0.8, label="pruned: last value seen")  # fmt: skip
    if failed:
        axes.plot(failed, [0.02] * len(failed), ls="", marker="x", ms=4.5, color=LINES[1]["color"],
                  transform=axes.get_xaxis_transform(), label="failed: no value")  # fmt: skip
    if best:
        axes.step(*zip(*best, strict=True), where="post", color=INK, lw=1.4, label="best so far")
    _scale(axes.yaxis, axis)
    axes.set_xlabel("trial")
    _title(axes, axis.name)
    _integer_ticks(axes.xaxis)
    _legend(axes)
    return _svg(figure, f"history-{axis.name}")


@_styled
def curves(
    finished: Sequence[Sequence[tuple[int, float]]],
    pruned: Sequence[Sequence[tuple[int, float]]],
    best: Sequence[tuple[int, float]],
    axis: Axis,
) -> str:
    """Intermediate values over steps, one line a trial."""
    figure, (axes,) = _figure(1, height=2.6)
    for lines, color, style, label in (
        (finished, LINES[0]["color"], "-", "finished"),
        (pruned, LINES[3]["color"], "--", "pruned"),
    ):
        if lines:
            axes.plot(*_joined(lines), color=color, ls=style, lw=0.6, alpha=0.5, label=label)
            ends = [line[-1] for line in lines if line]
            _dots(axes, ends, 0 if style == "-" else 3, None, size=2.6)
    if best:
        axes.plot(*zip(*best, strict=True), color=INK, lw=1.8, marker="o", ms=3, label="best trial")
    _scale(axes.yaxis, axis)
    axes.set_xlabel("training step")
    _title(axes, axis.name)
    _integer_ticks(axes.xaxis)
    _legend(axes)
    return _svg(figure, "curves")


@_styled
def bars(rows: Mapping[str, float], chance: Mapping[str, float], name: str, color: int = 0) -> str:
    """Importances as bars, with a mark at what chance alone gives.

    Args:
        rows: Importance of each parameter, the largest first.
        chance: For the same parameters, what a parameter without influence reaches.
        name: Makes the figure's ids unique in the page.
        color: Number of the line style whose colour to take.
    """
    figure, (axes,) = _figure(1, height=0.5 + 0.42 * len(rows), left=0.22, top=0.04)
    style, most = LINES[color]["color"], max([*rows.values(), *chance.values(), 0.01])
    for row, (parameter, value) in enumerate(rows.items()):
        by_chance = chance.get(parameter, 0.0)
        face = style if value > by_chance else GROUND
        axes.barh(row, value, height=0.3, color=face, ec=style, lw=1)
        axes.text(0, row - 0.22, short(parameter, 60), va="bottom", ha="left", fontsize=8.5)
        axes.text(max(value, by_chance) + most * 0.015, row, f"{value:.0%}", va="center",
                  fontsize=8.5)  # fmt: skip
        axes.plot([by_chance] * 2, [row - 0.22, row + 0.22], color=INK, lw=1.6,
                  solid_capstyle="butt")  # fmt: skip
    axes.set_ylim(len(rows) - 0.65, -0.75)
    axes.set_xlim(0, most * 1.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    return _svg(figure, f"importances-{name}")


@_styled
def slices(
    points: Sequence[tuple[Any, float]], best: tuple[Any, float] | None, axis: Axis, value: Axis
) -> str:
    """The value against one parameter, a point for each complete trial that has it."""
    figure, (axes,) = _figure(1, height=2.3, width=3.7)
    spread = _spread(axis, [p for p, _ in points])
    placed = [(axis.position(p) if axis.choices else p, v) for p, v in points]
    _dots(axes, [(x + d, v) for (x, v), d in zip(placed, spread, strict=True)], 0, None)
    if best:
        at = axis.position(best[0]) if axis.choices else best[0]
        axes.plot([at], [best[1]], ls="", marker="D", ms=6, mfc="none", mec=INK, mew=1.6)
    if axis.choices:
        labels = [_shown(choice) for choice in axis.choices]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        if sum(map(len, labels)) > 34:
            axes.tick_params(axis="x", labelrotation=20)
    else:
        _scale(axes.xaxis, axis)
        _limits(axes, axis)
    _scale(axes.yaxis, value)
    _title(axes, short(value.name, 50))
    axes.set_xlabel(short(axis.name, 50))
    return _svg(figure, f"slice-{axis.name}-{value.name}")


@_styled
def parallel(
    rows: Sequence[Sequence[Any]], axes_of: Sequence[Axis], strong: Sequence[int], best: int | None
) -> str:
    """Parallel coordinates: a scale under each other for each parameter, a line for each trial.

    Args:
        rows: For each trial its values in the order of the scales; `NOT_SET` for a parameter that
            it does not have, which is drawn left of the scale.
        axes_of: The scales; the last is the objective.
        strong: Indices of the rows that are drawn strong.
        best: Index of the row that stands out, or None.
    """
    figure, (axes,) = _figure(1, height=0.3 + 0.6 * len(axes_of), left=0.08, top=0.04)
    figure.subplots_adjust(bottom=0.02)
    scaled = [_unit(axis, [row[i] for row in rows]) for i, axis in enumerate(axes_of)]
    some_missing = any(row[i] is NOT_SET for row in rows for i in range(len(axes_of)))
    lines = [[(column[r], i) for i, column in enumerate(scaled)] for r in range(len(rows))]
    chosen = set(strong)
    faint = [line for r, line in enumerate(lines) if r not in chosen]
    if faint:
        axes.plot(*_joined(faint), color=MUTED, lw=0.5, alpha=0.4)
    if chosen:
        axes.plot(*_joined([lines[r] for r in strong]), color=LINES[0]["color"], lw=1, alpha=0.8)
    if best is not None:
        axes.plot(*zip(*lines[best], strict=True), color=INK, lw=2.2, marker="o", ms=4)
    for i, axis in enumerate(axes_of):
        last = i == len(axes_of) - 1
        axes.plot([0, 1], [i, i], color=INK if last else MUTED, lw=1.4 if last else 0.9, zorder=1)
        text = {
            "fontsize": 8.2,
            "bbox": {"fc": GROUND, "ec": "none", "pad": 0.8, "alpha": 0.85},
            "zorder": 9,
        }
        name = short(axis.name) + (" (log)" if axis.log else "")
        axes.text(0, i - 0.08, name, ha="left", va="bottom", weight="bold", **text)
        for x, mark, side in _marks(axis, [row[i] for row in rows]):
            axes.text(x, i + 0.07, mark, ha=side, va="top", color=INK, **text)
    if some_missing:
        axes.text(-0.1, len(axes_of) - 0.55, "not set", ha="center", va="top", fontsize=8)
    axes.set_xlim(-0.16 if some_missing else -0.02, 1.02)
    axes.set_ylim(len(axes_of) - 0.45, -0.55)
    axes.axis("off")
    return _svg(figure, "parallel")


@_styled
def front(
    points: Sequence[tuple[float, float]],
    best: Sequence[tuple[float, float]],
    chosen: tuple[float, float] | None,
    x: Axis,
    y: Axis,
) -> str:
    """Two objectives against each other, and the trials that no other beats in all of them."""
    figure, (axes,) = _figure(1, height=2.9)
    _dots(axes, points, 0, "finished", alpha=0.5)
    if best:
        ordered = sorted(best)
        axes.plot(*zip(*ordered, strict=True), color=LINES[1]["color"], lw=1, ls="--", marker="s",
                  ms=5, label="Pareto front")  # fmt: skip
    if chosen:
        axes.plot(*[[c] for c in chosen], ls="", marker="D", ms=9, mfc="none", mec=INK, mew=1.6,
                  label="chosen")  # fmt: skip
    _scale(axes.xaxis, x)
    _scale(axes.yaxis, y)
    axes.set_xlabel(x.name)
    _title(axes, y.name)
    _legend(axes)
    return _svg(figure, f"front-{x.name}-{y.name}")


@_styled
def intervals(rows: Sequence[tuple[str, float, float, float]], title: str) -> str:
    """Means with their intervals, one under the other, and a line at zero.

    Args:
        rows: Name, low, mean, high.
        title: What is on the scale.
    """
    figure, (axes,) = _figure(1, height=0.75 + 0.42 * len(rows), left=0.2)
    for row, (name, low, mean, high) in enumerate(rows):
        axes.plot([low, high], [row, row], color=LINES[0]["color"], lw=2)
        axes.plot([mean], [row], marker="o", ms=6, color=LINES[0]["color"])
        axes.text(0, row - 0.18, name, va="bottom", ha="left", fontsize=8.5,
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.axvline(0, color=INK, lw=1.2)
    axes.set_ylim(len(rows) - 0.6, -0.8)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    _title(axes, title)
    return _svg(figure, "reevaluation")


class _NotSet:
    """A parameter that a trial does not have."""

    def __repr__(self) -> str:
        return "not set"


NOT_SET = _NotSet()


def short(name: str, most: int = 44) -> str:
    """A name that fits: the end of a dotted path where the whole is too long."""
    while len(name) > most and "." in name.removeprefix("…"):
        name = "…" + name.removeprefix("…").split(".", 1)[1]
    return name


# Parts


def _figure(
    count: int, *, height: float, width: float = 4.8, left: float = 0.62, top: float = 0.3
) -> Any:
    """A figure with axes under each other; margins in inches, the same in every figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * count))
    axes = [figure.add_subplot(count, 1, i + 1) for i in range(count)]
    figure.subplots_adjust(
        left=left / width, right=1 - 0.14 / width, bottom=0.44 / height, top=1 - top / height
    )
    return figure, axes


def _title(axes: Any, text: str) -> None:
    """A title at the left edge of the figure."""
    figure = axes.figure
    width, height = figure.get_size_inches()
    figure.text(0.06 / width, 1 - 0.06 / height, text, ha="left", va="top", fontsize=9.5)


def _svg(figure: Any, name: str) -> str:
    """The figure as an element to put into a page. Ids are unique to `name`, and reproducible."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    matplotlib.rcParams["svg.hashsalt"] = name
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=none)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'aria-hidden="true" focusable="false"',
                  text, count=1)  # fmt: skip
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font: ([^';]*?)'[^;\"]*", r"font: \1var(--sans)", text)
    text = re.sub(r' id="(?![mpch][0-9a-f]{6,})[^"]*"', "", text)
    for color, variable in VARIABLES.items():
        text = re.sub(re.escape(color), f"var(--{variable})", text, flags=re.IGNORECASE)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _dots(
    axes: Any,
    points: Sequence[tuple[float, float]],
    line: int,
    label: str | None,
    *,
    size: float = 4.0,
    alpha: float = 0.75,
) -> None:
    """Points as one path of strokes without length and with round ends."""
    if points:
        x, y = _joined([(point, point) for point in points])
        color = LINES[line]["color"]
        axes.plot(x, y, color=color, lw=size, alpha=alpha, solid_capstyle="round")
        if label:
            axes.plot([], [], ls="", marker="o", ms=4, color=color, label=label)


def _joined(lines: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """Many lines as one, with gaps between them."""
    gap = [(math.nan, math.nan)]
    joined = [point for line in lines for point in (*line, *gap)]
    return [x for x, _ in joined], [y for _, y in joined]


def _scale(axis: Any, what: Axis) -> None:
    if what.log:
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    else:
        axis.set_major_formatter(lambda value, _: _shown(value))


def _limits(axes: Any, axis: Axis) -> None:
    if axis.low is None or axis.high is None or axis.low == axis.high:
        return
    if axis.log:
        margin = (axis.high / axis.low) ** 0.04
        axes.set_xlim(axis.low / margin, axis.high * margin)
    else:
        margin = (axis.high - axis.low) * 0.04
        axes.set_xlim(axis.low - margin, axis.high + margin)


def _integer_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def _legend(axes: Any) -> None:
    """A row between title and axes, if there is more than one thing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) < 2:
        return
    figure = axes.figure
    width, height = figure.get_size_inches()
    figure.subplots_adjust(top=1 - 0.48 / height)
    legend = figure.legend(handles, labels, loc="upper left", borderaxespad=0, ncols=len(labels),
                           bbox_to_anchor=(0.06 / width, 1 - 0.25 / height), columnspacing=1.2,
                           handlelength=1.5, handletextpad=0.4, fontsize=8, borderpad=0)  # fmt: skip
    for handle in legend.get_lines():
        handle.set_alpha(1)


def _spread(axis: Axis, values: Sequence[Any]) -> list[float]:
    """Moves points of one category apart, by a fixed sequence."""
    if not axis.choices:
        return [0.0] * len(values)
    return [((i * 0.618034) % 1 - 0.5) * 0.4 for i in range(len(values))]


def _unit(axis: Axis, values: Sequence[Any]) -> list[float]:
    """Positions in [0, 1] on the scale; −0.1 for what is not set."""
    known = [axis.position(value) for value in values if value is not NOT_SET]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if axis.choices:
        low, high = 0.0, float(len(axis.choices) - 1)
    width = high - low
    return [
        -0.1 if value is NOT_SET else ((axis.position(value) - low) / width if width else 0.5)
        for value in values
    ]


def _marks(axis: Axis, values: Sequence[Any]) -> list[tuple[float, str, str]]:
    """What to write below a scale: position, text, and the side of the text that stands there."""
    known = [value for value in values if value is not NOT_SET]
    if axis.choices:
        shown = (
            list(axis.choices) if len(axis.choices) <= 6 else [axis.choices[0], axis.choices[-1]]
        )
        at = _unit(axis, shown)
        names = [_shown(choice) for choice in shown]
    elif not known or min(known) == max(known):
        return [(0.5, _shown(known[0]) if known else "", "center")]
    else:
        at, names = [0.0, 1.0], [_shown(min(known)), _shown(max(known))]
    sides = ["left" if x == 0 else "right" if x == 1 else "center" for x in at]
    return list(zip(at, names, sides, strict=True))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return text if len(text) <= 18 else text[:17] + "…"
