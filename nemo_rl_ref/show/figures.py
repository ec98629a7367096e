# SPDX-License-Identifier: Apache-2.0
"""One look for all figures: colors that color-blind readers can tell apart, legible on a phone.

Color never carries a difference alone: each line style below also has its own dashes and marker.
Axes have no ground of their own. The site draws figures without any, and inverts them in the dark.
"""

from __future__ import annotations

from typing import Any

#: Line styles to use in this order. The colors are those of Okabe and Ito (2008).
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#007A5A", "linestyle": "-.", "marker": "^"},
    {"color": "#8E4585", "linestyle": ":", "marker": "D"},
    {"color": "#000000", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
)


def panels(count: int, *, height: float = 2.6) -> tuple[Any, list[Any]]:
    """Make a figure of panels that stand under each other, narrow enough for a phone.

    Args:
        count: Number of panels.
        height: Height of a panel in inches.

    Returns:
        The Matplotlib figure and the list of its axes.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.grid": True,
            "grid.color": "#dddddd",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.markersize": 4.5,
            "legend.frameon": False,
            "figure.facecolor": "white",
            "axes.facecolor": "none",
            "svg.hashsalt": "nemo_rl_ref",  # the same names in every build
            "figure.constrained_layout.use": True,
        }
    )
    figure, axes = plt.subplots(count, 1, figsize=(4.8, height * count), squeeze=False)
    return figure, list(axes[:, 0])


def band(axis: Any, x: list[float], runs: list[list[float]], label: str, line: int) -> None:
    """Draw the mean of several runs as a line and their spread as a band.

    Args:
        axis: Matplotlib axes.
        x: Positions, one for every value of a run.
        runs: The values, one list a run (a seed).
        label: Name in the legend.
        line: Index into :data:`LINES`.
    """
    columns = list(zip(*runs, strict=True))
    style = LINES[line % len(LINES)]
    means = [sum(column) / len(column) for column in columns]
    axis.plot(x, means, label=label, **style)
    axis.fill_between(
        x,
        [min(column) for column in columns],
        [max(column) for column in columns],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )
