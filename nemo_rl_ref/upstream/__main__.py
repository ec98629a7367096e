# SPDX-License-Identifier: Apache-2.0
"""The commands that extract the facts about NeMo RL from a checkout, and compare them.

.. code-block:: sh

    python -m nemo_rl_ref.upstream extract path/to/RL
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_rl_ref.upstream import COMMIT, FOLDER
from nemo_rl_ref.upstream.checkout import Checkout, CheckoutError
from nemo_rl_ref.upstream.extract import extract, write_facts


def main(argv: list[str] | None = None) -> int:
    """Run a command; 2 and one line on an error."""
    arguments = _parse(argv)
    try:
        return arguments.run(arguments)
    except CheckoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_rl_ref.upstream", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(run, summary: str) -> argparse.ArgumentParser:
        name = run.__name__.strip("_")
        added = commands.add_parser(name, help=summary, description=summary)
        added.add_argument("checkout", type=Path, help="root of a checkout of NVIDIA-NeMo/RL")
        added.add_argument("--at", default="HEAD", help="the commit to read; HEAD")
        added.set_defaults(run=run)
        return added

    to = command(_extract, "write the facts about one commit; nothing is imported")
    to.add_argument("--to", type=Path, default=FOLDER, help="folder for the files; the package's")
    return parser.parse_args(argv)


def _extract(arguments: argparse.Namespace) -> int:
    checkout = Checkout(arguments.checkout, arguments.at)
    if arguments.to == FOLDER and checkout.commit != COMMIT:
        raise CheckoutError(
            f"checkout {checkout.path}: got commit {checkout.commit}, expected {COMMIT}; "
            "--at names another commit, --to another folder, update changes what is pinned"
        )
    facts = extract(checkout)
    write_facts(facts, arguments.to)
    for note in checkout.notes:
        print(f"note: {note}", file=sys.stderr)
    manifest, keys = facts["manifest.json"], facts["keys.json"]["keys"]
    print(
        f"{checkout.commit[:9]} of {checkout.date}: {len(manifest['symbols'])} symbols, "
        f"{len(manifest['configs'])} configurations, {len(keys)} keys -> {arguments.to}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
