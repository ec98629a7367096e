# SPDX-License-Identifier: Apache-2.0
"""Check a loss from the command line: ``python -m nemo_rl_ref.contract my_loss.py:MyLoss k=v``.

It imports the file or module that is named, and so runs its code. The exit status is 0 if all promises
are kept, or broken as NeMo RL's own class breaks them, 1 if the author has broken one, and 2 if the
command cannot be understood.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from nemo_rl_ref.contract import PROMISES, check_loss
from nemo_rl_ref.contract.build import build_loss
from nemo_rl_ref.contract.limits import written_at
from nemo_rl_ref.contract.user_code import UsageError, find, one_line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        argv: the arguments; None for those of the process.
    """
    description = (__doc__ or "").split("\n")[0]
    parser = _Parser(prog="python -m nemo_rl_ref.contract", description=description)
    parser.add_argument("loss", nargs="?", help="my_loss.py:MyLoss or package.module:MyLoss")
    parser.add_argument("pairs", nargs="*", metavar="key=value", help="fields of its configuration")
    parser.add_argument("--junit", metavar="FILE", help="also write the report as JUnit XML")
    parser.add_argument("--batch-maker", metavar="FILE:FUNCTION", help="makes the batches")
    parser.add_argument(
        "--preference-pairs", action="store_true", help="rows are chosen and rejected in turn"
    )
    parser.add_argument(
        "--only", action="append", choices=tuple(PROMISES), help="check this promise; repeatable"
    )
    parser.add_argument(
        "--details", action="store_true", help="also print what was measured, promise by promise"
    )
    try:
        return _run(parser.parse_intermixed_args(argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    """Check the loss that the options name, print the report, and return the exit status."""
    if options.loss is None:
        raise UsageError("no loss, expected path/to/my_loss.py:MyLoss or package.module:MyLoss")
    if options.junit and not Path(options.junit).parent.is_dir():
        raise UsageError(f"--junit is {options.junit!r}, whose folder does not exist")
    loss_fn = build_loss(find(options.loss), options.pairs)
    maker: Any = find(options.batch_maker) if options.batch_maker else None
    if options.batch_maker and not inspect.isroutine(maker):
        raise UsageError(f"--batch-maker is {options.batch_maker}{written_at(maker)}, no function")
    try:
        report = check_loss(
            loss_fn, maker, pairs=options.preference_pairs or None, only=options.only
        )
    except (KeyError, TypeError, ValueError) as error:  # about the batches, see check_loss
        raise UsageError(one_line(error)) from error
    print(report.summary())
    if options.details:
        print(report)
    elif not report.ok:
        print("With --details: what was measured, and the smallest batches.")
    if options.junit:
        report.to_junit(options.junit)
    return 1 if report.own else 0


if __name__ == "__main__":
    sys.exit(main())
