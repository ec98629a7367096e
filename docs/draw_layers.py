# SPDX-License-Identifier: Apache-2.0
"""The picture of the package's layers, drawn from the contracts in pyproject.toml.

    python docs/draw_layers.py    # writes docs/_static/layers.svg

A folder imports itself and what is drawn below it. A test compares the file with the contracts.
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "_static" / "layers.svg"

WIDTH, ROW, GAP, PAD = 720, 46, 14, 10
STYLE = """
  .box { fill: #f3f6f8; stroke: #55636e; }
  .name { font: 600 14px ui-monospace, monospace; fill: #14202a; }
  .arrow { stroke: #55636e; stroke-width: 1.5; fill: none; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #232b32; stroke: #93a1ad; }
    .name { fill: #eef3f6; }
    .arrow { stroke: #93a1ad; }
  }
"""


def layers(pyproject: str) -> list[list[str]]:
    """Read the layers of the package, the highest first.

    Args:
        pyproject: The text of pyproject.toml.
    """
    contracts = tomllib.loads(pyproject)["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c["type"] == "layers")
    return [[name.strip(" ()") for name in row.split("|")] for row in contract["layers"]]


def draw(rows: list[list[str]]) -> str:
    """Draw layers as an SVG picture that follows the reader's light or dark theme."""
    height = len(rows) * (ROW + GAP) - GAP + 2 * PAD
    described = "; ".join(", ".join(row) for row in rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Layers of nemo_rl_ref, the highest first: {escape(described)}">',
        f"<style>{STYLE}</style>",
    ]
    for number, row in enumerate(rows):
        top = PAD + number * (ROW + GAP)
        width = (WIDTH - 2 * PAD - GAP * (len(row) - 1)) / len(row)
        for place, name in enumerate(row):
            left = PAD + place * (width + GAP)
            parts.append(
                f'<rect class="box" x="{left:.1f}" y="{top}" width="{width:.1f}" '
                f'height="{ROW}" rx="6"/>'
                f'<text class="name" x="{left + width / 2:.1f}" y="{top + ROW / 2 + 5:.0f}" '
                f'text-anchor="middle">{escape(name)}</text>'
            )
        if number + 1 < len(rows):
            middle, low = WIDTH / 2, top + ROW
            parts.append(f'<path class="arrow" d="M{middle:.0f} {low}v{GAP}m-5 -6l5 6l5 -6"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(layers((ROOT / "pyproject.toml").read_text("utf-8"))), "utf-8")
    print(PICTURE.relative_to(ROOT))
