# SPDX-License-Identifier: Apache-2.0
"""The commands that extract the facts about NeMo RL from a checkout, and compare them.

.. code-block:: sh

    python -m nemo_rl_ref.upstream extract path/to/RL
    python -m nemo_rl_ref.upstream drift path/to/RL
    python -m nemo_rl_ref.upstream update path/to/RL
    python -m nemo_rl_ref.upstream golden path/to/RL

Only ``golden``, and ``update`` with it, run NeMo RL's code, in an environment of its own. ``drift``
ends with 0 if nothing changed that this project uses, with 1 if something did, with 2 on an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from nemo_rl_ref.files.whole import write_text
from nemo_rl_ref.upstream import COMMIT, FOLDER, read_facts
from nemo_rl_ref.upstream.checkout import Checkout, CheckoutError
from nemo_rl_ref.upstream.drift import Change, as_json, as_markdown, find_drift, shared_names
from nemo_rl_ref.upstream.extract import extract, extract_all, facts_text
from nemo_rl_ref.upstream.golden import golden_text, make_golden
from nemo_rl_ref.upstream.update import update
from nemo_rl_ref.upstream.uses import Uses

#: The repository that this package is in.
ROOT = FOLDER.parent.parent


def main(argv: list[str] | None = None) -> int:
    """Run a command; 2 and one line on an error."""
    arguments = _parse(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
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
    drift = command(_drift, "report what changed since the pinned commit and who uses it")
    drift.add_argument("--from", dest="since", help="compare with this commit, not the pinned one")
    drift.add_argument("--root", type=Path, default=ROOT, help="the repository with the pages")
    drift.add_argument("--json", action="store_true", help="print all changes as JSON")
    golden = command(_golden, "run NeMo RL's code again on the inputs in golden.json")
    golden.add_argument(
        "--to", type=Path, default=FOLDER, help="folder for the file; the package's"
    )
    pin = command(_update, "pin another commit: all files, and the pages that name the old one")
    for added in (golden, pin):
        added.add_argument(
            "--environment", type=Path, default=ROOT / "_build/upstream", help="the virtual one"
        )
    return parser.parse_args(argv)


def _extract(arguments: argparse.Namespace) -> int:
    checkout = Checkout(arguments.checkout, arguments.at)
    _refuse_another_commit(checkout, arguments.to)
    facts = extract_all(checkout)
    for name, content in facts.items():
        write_text(arguments.to / name, facts_text(name, content))
    _print_notes(checkout.notes)
    manifest, keys = facts["manifest.json"], facts["keys.json"]["keys"]
    print(
        f"{checkout.commit[:9]} of {checkout.date}: {len(manifest['symbols'])} symbols, "
        f"{len(manifest['configs'])} configurations, {len(keys)} keys -> {arguments.to}"
    )
    return 0


def _golden(arguments: argparse.Namespace) -> int:
    checkout = Checkout(arguments.checkout, arguments.at)
    _refuse_another_commit(checkout, arguments.to)
    golden = make_golden(checkout, arguments.environment)
    write_text(arguments.to / "golden.json", golden_text(golden))
    print(f"{checkout.commit[:9]}: {len(golden['cases'])} cases -> {arguments.to}")
    return 0


def _update(arguments: argparse.Namespace) -> int:
    new = Checkout(arguments.checkout, arguments.at)
    old = Checkout(arguments.checkout, COMMIT)
    golden = make_golden(new, arguments.environment)
    changed, notes = update(old, new, ROOT, golden)
    _print_notes(notes)
    print(f"{old.commit[:9]} -> {new.commit[:9]} of {new.date}: {len(changed)} files changed")
    return 0


def _refuse_another_commit(checkout: Checkout, to: Path) -> None:
    if to == FOLDER and checkout.commit != COMMIT:
        raise CheckoutError(
            f"checkout {checkout.path}: got commit {checkout.commit}, expected {COMMIT}; "
            "--at names another commit, --to another folder, update changes what is pinned"
        )


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _drift(arguments: argparse.Namespace) -> int:
    checkout = Checkout(arguments.checkout, arguments.at)
    changes, (before, after) = drift(checkout, arguments.since, arguments.root)
    if arguments.json:
        content = {"from": before, "to": after, "notes": checkout.notes}
        print(json.dumps(content | {"changes": as_json(changes)}, indent=1))
    else:
        print(as_markdown(changes, before, after, checkout.notes), end="")
    return int(any(change.used for change in changes))


def drift(
    checkout: Checkout, since: str | None = None, root: Path = ROOT
) -> tuple[list[Change], tuple[str, str]]:
    """Compare a commit with the pinned one, or with another of the same checkout.

    Args:
        checkout: The later commit.
        since: The earlier one; None takes the facts that are pinned.
        root: The repository whose pages and mirror are searched for uses.

    Returns:
        The changes, and what to call the two commits.

    Raises:
        CheckoutError: `since` is no commit of the checkout, or `root` has no mirror.
    """
    if not (root / "nemo_rl_ref").is_dir():
        raise CheckoutError(f"--root: got {root}, where there is no folder nemo_rl_ref")
    names = ("manifest.json", "keys.json", "sources.json")
    earlier = Checkout(checkout.path, since) if since else None
    old = extract(earlier) if earlier else {name: read_facts(name) for name in names}
    new = extract(checkout)
    manifest = old["manifest.json"]
    unread = checkout.unread | (earlier.unread if earlier else set())
    uses = Uses(root, shared_names(old, new))
    renamed = checkout.renamed_since(manifest["commit"])
    changes = find_drift(old, new, uses, renamed, unread)
    called = [f"{f['commit'][:9]} ({f['date']})" for f in (manifest, new["manifest.json"])]
    return changes, (called[0], called[1])


if __name__ == "__main__":
    sys.exit(main())
