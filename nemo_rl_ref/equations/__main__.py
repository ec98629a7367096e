# SPDX-License-Identifier: Apache-2.0
"""Check every equation: `python -m nemo_rl_ref.equations [LABEL ...]`."""

from __future__ import annotations

import argparse
import sys
import time

from nemo_rl_ref.equations import EquationError, all_equations, verify


def main() -> int:
    """Check the equations named, or all of them, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "labels", nargs="*", metavar="LABEL", help="equations to check; default: all"
    )
    parser.add_argument("--latex", action="store_true", help="print their LaTeX, too")
    arguments = parser.parse_args()
    equations = all_equations()
    unknown = [label for label in arguments.labels if label not in equations]
    if unknown:
        parser.error(f"no equation is labelled {unknown[0]!r}; there are {', '.join(equations)}")
    failures = 0
    for label in arguments.labels or equations:
        began = time.perf_counter()
        try:
            found = verify(equations[label])
        except EquationError as error:
            failures += 1
            print(f"FAILED  {error}")
        else:
            seconds = time.perf_counter() - began
            print(f"{found.difference:8.1e}  {found.inputs} inputs  {seconds:5.2f} s  {label}")
        if arguments.latex:
            print(equations[label].latex)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
