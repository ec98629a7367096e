# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m nemo_rl_ref.compare``; see the package."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_rl_ref.compare.paired import Result, compare_sides
from nemo_rl_ref.tune.space import Space
from nemo_rl_ref.tune.spec import Spec, make_spec
from nemo_rl_ref.tune.trainers import ALGORITHMS
from nemo_rl_ref.utils.config import OverridesError

#: What is compared if nothing is said: what each algorithm's shipped configuration validates.
METRICS = {
    "sft": "val:val_loss",
    "dpo": "val:validation-default_accuracy",
    "rm": "val:validation-default_accuracy",
    "grpo": "val:accuracy",
    "ppo": "val:accuracy",
}


def make_parser() -> argparse.ArgumentParser:
    """Make the command's parser; what it does not know are overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_rl_ref.compare",
        allow_abbrev=False,
        description="Train two sides on the same seeds and say what their difference settles.",
        epilog="All other arguments are overrides in Hydra's grammar, of both sides: "
        "dpo.max_num_steps=40 ++dpo.margin=0.5",
    )
    add = parser.add_argument
    add("algorithm", choices=ALGORITHMS, help="what is trained")
    add("--config", required=True, metavar="FILE", help="a YAML file of NeMo RL's")
    add("--loss", metavar="FILE.py:CLASS", help="a loss of your own, of the first side")
    add("--env", metavar="FILE.py:FUNCTION", help="a reward of your own, of both sides")
    change = "an override of the first side alone; may be given several times"
    add("--change", action="append", default=[], metavar="OVERRIDE", help=change)
    against = "the other side: the algorithm's own loss, or another one; default: default"
    add("--against", default="default", metavar="default|FILE.py:CLASS", help=against)
    metric = "at the last step, by its name in checkpointing.metric_name; default: the validation's"
    add("--metric", metavar="METRIC[:DIRECTION]", help=metric)
    add(
        "--seeds", type=int, default=5, metavar="N", help="from the configuration's own; default: 5"
    )
    add("--level", type=float, default=0.95, help="of the interval; default: 0.95")
    add("--folder", metavar="FOLDER", help="of the runs; default: results/compare_ALGORITHM")
    add("--json", action="store_true", help="print the result as one JSON object, and nothing else")
    return parser


def sides_of(
    options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[tuple[str, Spec], tuple[str, Spec]]:
    """Make names and configurations of both sides, checked."""
    other = None if options.against == "default" else options.against
    metric = options.metric or METRICS[options.algorithm]

    def spec(loss: str | None, lines: Sequence[str]) -> Spec:
        return make_spec(
            options.algorithm, options.config, Space({}), [metric], lines, loss=loss,
            env=options.env,
        )  # fmt: skip

    name = options.loss.rpartition(":")[2] if options.loss else "default"
    name = f"{name} changed" if options.change else name
    name_of_other = other.rpartition(":")[2] if other else "default"
    if name == name_of_other:
        name, name_of_other = options.loss or name, other or name_of_other
    mine = spec(options.loss, [*overrides, *options.change])
    return (name, mine), (name_of_other, spec(other, overrides))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 after an error, 130 if interrupted."""
    parser, argv = make_parser(), list(sys.argv[1:] if argv is None else argv)
    options, overrides = parser.parse_known_args(argv)
    if misspelt := [text for text in overrides if text.startswith("-")]:
        parser.error(f"{misspelt[0]}: no such option")
    folder = Path(options.folder or f"results/compare_{options.algorithm}")
    show = (lambda _: None) if options.json else print
    try:
        mine, other = sides_of(options, overrides)
        result = compare_sides(mine, other, options.seeds, folder, level=options.level, show=show)
    except KeyboardInterrupt:
        print(
            "interrupted; what was trained is kept. To go on:\n  python -m nemo_rl_ref.compare "
            f"{shlex.join(argv)}",
            file=sys.stderr,
        )
        return 130
    except (OverridesError, OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result.to_dict()) if options.json else summary(result, folder))
    return 0 if result.found["pairs"] else 1


def summary(result: Result, folder: Path) -> str:
    """Say what was found, and where it is."""
    return "\n".join([*result.sentences(), f"In {folder}: result.json, difference.svg."])


if __name__ == "__main__":
    sys.exit(main())
