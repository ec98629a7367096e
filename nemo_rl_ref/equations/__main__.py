# SPDX-License-Identifier: Apache-2.0
"""Check every equation: `python -m nemo_rl_ref.equations [LABEL ...]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from nemo_rl_ref.equations import (
    EquationError,
    Result,
    all_equations,
    not_checked,
    verify,
)
from nemo_rl_ref.equations._equation import Equation
from nemo_rl_ref.equations._javascript import RUNTIME, sliders
from nemo_rl_ref.equations._symbols import Symbol


def described(equation: Equation, found: Result) -> dict[str, Any]:
    """Return all that a page shows of an equation, as JSON data."""
    return {
        "title": equation.title,
        "latex": equation.latex,
        "implementations": list(equation.implementations),
        "source": equation.source,
        "at": equation.at,
        "note": equation.note,
        "symbols": [symbol_data(symbol) for symbol in equation.symbols],
        "play": sliders(equation),
        "inputs": found.inputs,
        "difference": found.difference,
    }


def symbol_data(symbol: Symbol) -> dict[str, str]:
    """Return what a table of symbols shows."""
    return {"latex": symbol.plain_latex, "meaning": symbol.meaning}


def main() -> int:
    """Check the equations named, or all of them, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", nargs="*", metavar="LABEL", help="which ones; default: all")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--latex", action="store_true", help="print their LaTeX, too")
    shown.add_argument("--json", action="store_true", help="print what pages show, as JSON")
    arguments = parser.parse_args()
    equations = all_equations()
    unknown = [label for label in arguments.labels if label not in equations]
    if unknown:
        parser.error(f"no equation is labeled {unknown[0]!r}; there are {', '.join(equations)}")
    results: dict[str, Any] = {}
    failures = 0
    for label in arguments.labels or equations:
        began = time.perf_counter()
        try:
            found = verify(equations[label])
        except EquationError as error:
            failures += 1
            print(error, file=sys.stderr)
            continue
        seconds = time.perf_counter() - began
        results[label] = described(equations[label], found)
        if not arguments.json:
            print(f"{found.difference:8.1e}  {found.inputs} inputs  {seconds:5.2f} s  {label}")
        if arguments.latex:
            print(equations[label].latex)
    if arguments.json:
        shown = {"runtime": RUNTIME, "checked": results, "unchecked": not_checked()}
        print(json.dumps(shown, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
