# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m nemo_rl_ref.export``; see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_rl_ref.contract.user_code import UsageError
from nemo_rl_ref.export.carry import ExportError
from nemo_rl_ref.export.project import SCRIPTS, make_files, write_folder
from nemo_rl_ref.utils.config import OverridesError


def make_parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_rl_ref.export",
        allow_abbrev=False,
        description="Pack a loss or a reward of your own as a folder that NeMo RL runs.",
    )
    add = parser.add_argument
    add("loss", nargs="?", metavar="FILE.py:CLASS", help="a loss of your own; is imported")
    add("pairs", nargs="*", metavar="key=value", help="settings of the loss, for the YAML file")
    add("--env", metavar="FILE.py:FUNCTION", help="a reward of your own, for grpo")
    add("--algorithm", required=True, choices=SCRIPTS, help="which of NeMo RL's scripts trains it")
    add("--to", required=True, metavar="FOLDER", help="the folder to write")
    add("--force", action="store_true", help="replace a folder that was exported before")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 after an error."""
    options = make_parser().parse_intermixed_args(argv)
    to = Path(options.to)
    try:
        files = make_files(
            options.algorithm, options.loss, options.env, options.pairs, to.absolute().name
        )
        write_folder(files, to, force=options.force)
    except (UsageError, ExportError, OverridesError, OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{to}:")
    for name in sorted(files):
        print(f"  {name}")
    launcher = next(name for name in files if name.startswith("run_"))
    print(
        f"With this folder in examples/ of a checkout of NeMo RL:\n"
        f"  uv run examples/{to.absolute().name}/{launcher}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
