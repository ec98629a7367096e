# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m nemo_rl_ref.tune``; see the package."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_rl_ref.tune.runner import Runner, run_trial
from nemo_rl_ref.tune.samplers import PRUNERS, SAMPLERS
from nemo_rl_ref.tune.spec import ALGORITHMS, LAUNCHERS

if TYPE_CHECKING:
    from nemo_rl_ref.tune.study import Search

DESCRIPTION = """\
Search for hyperparameters over the keys of a NeMo RL configuration.

The same command goes on with a study that was interrupted, also by SIGKILL, and several of them, on
one machine or (with --storage) on many, work on one study."""

EPILOG = """\
All other arguments are overrides in Hydra's grammar that all trials share:
  dpo.max_num_steps=60 ++policy.optimizer.kwargs.amsgrad=true

example:
  python -m nemo_rl_ref.tune dpo --config configs/dpo.yaml --space configs/spaces/dpo.yaml \\
      --objective val:validation-default_accuracy --trials 30 --pruner successive-halving"""


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_rl_ref.tune",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("algorithm", choices=ALGORITHMS, help="what is trained")
    add("--config", required=True, metavar="FILE", help="a YAML file of NeMo RL's")
    add("--space", required=True, metavar="FILE", help="which keys are searched, over what")
    add(
        "--objective",
        required=True,
        action="append",
        metavar="METRIC[:DIRECTION]",
        help="what is to be best, by its name in checkpointing.metric_name, at the end of a run; "
        "the direction is maximize or minimize and may be left out of names that end in loss, "
        "accuracy or reward. Several make a search for a Pareto front",
    )
    add("--trials", type=int, default=30, metavar="N", help="finished trials; default: 30")
    add(
        "--sampler",
        choices=SAMPLERS,
        default="tpe",
        help="default: tpe. cmaes keeps its state in the study as a pickle: only go on with a "
        "study whose origin you know",
    )
    add(
        "--pruner",
        choices=PRUNERS,
        default="none",
        help="ends trials that are behind the others at the same step of validation; default: none",
    )
    add(
        "--folder",
        metavar="FOLDER",
        help="of the study: its storage, and the output of each trial; default: "
        "results/tune_ALGORITHM",
    )
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes that train, each on one GPU, in turn, where there are several; default: 1",
    )
    add("--threads", type=int, default=1, metavar="N", help="torch's, of each; default: 1")
    add("--seed", type=int, default=0, metavar="N", help="of the sampler; default: 0")
    add(
        "--vary-seed",
        action="store_true",
        help="train trial n with the configuration's seed + n. Without it all trials have one "
        "seed: then two trials differ by their values and not by their luck, but the best one may "
        "be best for this seed only, so train it again with others",
    )
    add(
        "--max-failures",
        type=int,
        default=3,
        metavar="N",
        help="failures of one cause that end the search, 0 for never; default: 3",
    )
    add("--storage", metavar="URL", help="a database instead of the file study.db in the folder")
    add("--name", metavar="NAME", help="of the study in the storage; default: the folder's")
    add(
        "--grace",
        type=int,
        default=60,
        metavar="SECONDS",
        help="without a sign of life, after which a trial is given to another process; default: 60",
    )
    add_engine(parser.add_argument_group("where trials run"))
    add_outcome(parser.add_argument_group("what is made of the study"))
    return parser


def add_engine(group: argparse._ArgumentGroup) -> None:
    """Options of Ray, and of trials that run NeMo RL."""
    add = group.add_argument
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine, or Ray Tune; default: local",
    )
    add(
        "--ray-address",
        metavar="ADDRESS",
        help="of a Ray cluster, auto for the one this machine is part of; without it a Ray is "
        "started here, with CPUs for --jobs trials",
    )
    add("--cpus-per-trial", type=float, default=1, metavar="N", help="Ray's; default: 1")
    add("--gpus-per-trial", type=float, default=0, metavar="N", help="Ray's; default: 0")
    add(
        "--launcher",
        choices=LAUNCHERS,
        default=LAUNCHERS[0],
        help="this package's trainers, or NeMo RL's own scripts in --checkout; default: here",
    )
    add("--checkout", metavar="FOLDER", help="of NeMo RL, for --launcher nemo-rl")
    add(
        "--launch-command",
        default="uv run",
        metavar="COMMAND",
        help="what starts a script of the checkout; default: uv run",
    )


def add_outcome(group: argparse._ArgumentGroup) -> None:
    """Options of report, best configuration and re-evaluation."""
    add = group.add_argument
    add("--report", metavar="FILE", help="HTML report; default: report.html in the folder")
    add(
        "--choose",
        metavar="RULE",
        help="of a Pareto front: knee, METRIC, or 'METRIC where OTHER <= NUMBER'; default: knee",
    )
    add(
        "--reevaluate",
        type=int,
        metavar="SEEDS",
        help="after the search, run the best trials and the configuration as it was on so many "
        "fresh seeds, and say how sure it is that the best one is better",
    )
    add("--top", type=int, default=3, metavar="N", help="trials to re-evaluate; default: 3")


def check_together(options: argparse.Namespace) -> str | None:
    """What is wrong with options that do not go together, or None."""
    if (options.launcher == "nemo-rl") != bool(options.checkout):
        return "--launcher nemo-rl and --checkout FOLDER go together"
    if options.engine == "local" and (options.gpus_per_trial or options.ray_address):
        return "--gpus-per-trial and --ray-address are for --engine ray"
    if options.reevaluate is not None and options.reevaluate < 1:
        return f"--reevaluate: got {options.reevaluate}, expected 1 seed or more"
    if options.top < 1:
        return f"--top: got {options.top}, expected 1 or more"
    if options.reevaluate and len(options.objective) > 1:
        return "--reevaluate compares by one objective"
    if options.choose and len(options.objective) == 1:
        return "--choose is for several objectives"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 after an error, 130 if interrupted."""
    parser = make_parser()
    options, overrides = parser.parse_known_args(argv)
    if misspelt := [text for text in overrides if text.startswith("-")]:
        parser.error(f"{misspelt[0]}: no such option")
    if problem := check_together(options):
        parser.error(problem)
    arguments = shlex.join(sys.argv[1:] if argv is None else argv)
    return search(options, overrides, f"{parser.prog} {arguments}")


def search(options: argparse.Namespace, overrides: Sequence[str], again: str) -> int:
    """Run a search as the options say.

    Args:
        options: Of the command.
        overrides: That all trials share.
        again: The command, to say how to go on.

    Returns:
        The exit status.
    """
    from nemo_rl_ref.tune.best import check_rule
    from nemo_rl_ref.tune.outcome import reevaluate_and_say, write_outcome
    from nemo_rl_ref.tune.spec import make_spec
    from nemo_rl_ref.tune.study import SearchStopped, Settings, Stopped, open_search
    from nemo_rl_ref.tune.table import Display, describe_result
    from nemo_rl_ref.utils.config import OverridesError

    folder = options.folder or f"results/tune_{options.algorithm}"
    names = [
        "trials",
        "sampler",
        "pruner",
        "seed",
        "vary_seed",
        "threads",
        "max_failures",
        "storage",
        "name",
        "grace",
    ]
    display = Display()
    try:
        spec = make_spec(
            options.algorithm, options.config, options.space, options.objective, overrides,
            options.launcher,
        )  # fmt: skip
        check_rule(options.choose, [objective.metric for objective in spec.objectives])
        runner = make_runner(options)
        settings = Settings(**{name: getattr(options, name) for name in names})
        opened = open_search(spec, settings, folder, runner=runner, listen=display)
        print(describe_start(opened, options.jobs), flush=True)

        def outcome(result: object) -> None:
            written = write_outcome(
                opened.study, opened.folder, report=options.report, rule=options.choose,
                reevaluation=result,
            )  # fmt: skip
            print("\n".join(written))

        try:
            with display:
                run_engine(opened, options)
        except Stopped:
            done = f"{opened.finished()} of {opened.budget} trials are finished"
            print(f"interrupted; {done}, and nothing is lost. To go on:\n  {again}")
            return 130
        except SearchStopped as error:
            print(f"error: the search ended itself: {error}", file=sys.stderr)
            print(f"{describe_result(opened)}\nTo go on after mending it:\n  {again}")
            outcome(None)
            return 1
        print(describe_result(opened))
        result = None
        try:
            if options.reevaluate:
                result = reevaluate_and_say(
                    opened.study, spec, opened.folder, top=options.top, seeds=options.reevaluate,
                    runner=runner, threads=options.threads,
                )  # fmt: skip
        except KeyboardInterrupt:
            print(f"interrupted; the runs so far are kept. To go on:\n  {again}")
            return 130
        finally:
            outcome(result)
    except (OverridesError, OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make_runner(options: argparse.Namespace) -> Runner:
    """What runs a trial."""
    if options.launcher == "nemo-rl":
        from nemo_rl_ref.tune.nemo_rl_launcher import launcher

        return launcher(options.checkout, command=shlex.split(options.launch_command))
    return run_trial


def run_engine(opened: Search, options: argparse.Namespace) -> None:
    """Run the trials, here or on Ray."""
    from nemo_rl_ref.tune.study import run_search

    if options.engine == "local":
        run_search(opened, options.jobs)
        return
    from nemo_rl_ref.tune.ray_engine import run_on_ray

    run_on_ray(
        opened, cpus_per_trial=options.cpus_per_trial, gpus_per_trial=options.gpus_per_trial,
        address=options.ray_address, cpus=math.ceil(options.jobs * options.cpus_per_trial) or None,
    )  # fmt: skip


def describe_start(opened: Search, jobs: int) -> str:
    """What is about to be done, in two lines."""
    from nemo_rl_ref.tune.storage import FILE, address

    settings, spec = opened.settings, opened.spec
    searched = len(spec.space.distributions())
    where = address(settings.storage or str(opened.folder / FILE))
    start = (
        f"study {opened.study.study_name}: {searched} keys searched with {settings.sampler}, "
        f"pruner {settings.pruner}, {jobs} process(es); in {where}"
    )
    lines = [start]
    if done := opened.finished():
        lines.append(f"goes on after {done} of {opened.budget} trials")
    if opened.budget < settings.trials:
        lines.append(f"the grid has {opened.budget} points, so there are {opened.budget} trials")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
