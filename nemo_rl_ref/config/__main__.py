# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m nemo_rl_ref.config check FILE [overrides]``.

The exit status is 0, or 1 if a key is unknown, has a value of another type, or clashes with another
one, or 2 if the file cannot be read. A key that nothing reads is told, and is no error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from nemo_rl_ref.config.check import KeyFact, check_config, failed


def make_parser() -> argparse.ArgumentParser:
    """Make the command's parser; what it does not know are overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_rl_ref.config",
        allow_abbrev=False,
        description="Look up the keys of a NeMo RL configuration, offline.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="does each key exist, fit, and is it read?")
    check.add_argument("config", metavar="FILE", help="a YAML file of NeMo RL's")
    check.add_argument("--problems", action="store_true", help="leave out the keys without one")
    check.add_argument("--json", action="store_true", help="print a JSON list, one object a key")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = make_parser()
    options, overrides = parser.parse_known_args(argv)
    if misspelt := [text for text in overrides if text.startswith("-")]:
        parser.error(f"{misspelt[0]}: no such option")
    try:
        facts = check_config(options.config, overrides)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = [fact for fact in facts if fact.problem or not options.problems]
    if options.json:
        print(json.dumps([asdict(fact) for fact in shown], default=str))
    else:
        _print(shown)
        counts = Counter(fact.problem for fact in facts if fact.problem)
        told = ", ".join(f"{count} {problem}" for problem, count in counts.items())
        print(f"{len(facts)} keys: {told or 'no problem'}")
    return 1 if failed(facts) else 0


def _print(facts: Sequence[KeyFact]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("key", "value", "type", "default", "read by")
    for fact in facts:
        words = (fact.key, str(fact.value), fact.types, fact.default or "", fact.says or fact.read)
        table.add_row(*map(escape, words), style="bold red" if fact.problem else None)
    if facts:
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
