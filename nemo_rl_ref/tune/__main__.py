# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m nemo_rl_ref.tune``; see the package."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from nemo_rl_ref.tune.methods import PRUNERS, SAMPLERS
from nemo_rl_ref.tune.outcome.best import parse_rule
from nemo_rl_ref.tune.outcome.reevaluate import reevaluate
from nemo_rl_ref.tune.outcome.write import write_outcome
from nemo_rl_ref.tune.search import (
    FILE,
    Search,
    SearchStopped,
    Settings,
    address,
    open_search,
    stopping_at_signals,
    torch_threads,
    work,
)
from nemo_rl_ref.tune.spec import LAUNCHERS, make_spec
from nemo_rl_ref.tune.trainers import ALGORITHMS
from nemo_rl_ref.tune.trial import Runner, run_trial
from nemo_rl_ref.utils.config import OverridesError

DESCRIPTION = """
Search for hyperparameters over the keys of a NeMo RL configuration. The same command goes on with a
study that was interrupted, also by SIGKILL, and several of them, on one machine or (with --storage)
on many, work on one study."""

EPILOG = """
All other arguments are overrides in Hydra's grammar that all trials share: dpo.max_num_steps=60
++policy.optimizer.kwargs.amsgrad=true"""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_rl_ref.tune", description=DESCRIPTION, epilog=EPILOG,
        allow_abbrev=False,
    )  # fmt: skip
    add_search(parser)
    add_study(parser.add_argument_group("the study"))
    add_engine(parser.add_argument_group("where trials run"))
    add_outcome(parser.add_argument_group("what is made of the study"))
    return parser


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is searched, and how."""
    add = parser.add_argument
    add("algorithm", choices=ALGORITHMS, help="what is trained")
    add("--config", required=True, metavar="FILE", help="a YAML file of NeMo RL's")
    add("--space", required=True, metavar="FILE", help="which keys are searched, over what")
    objective = (
        "what is to be best at the end of a run, by its name in checkpointing.metric_name; a name "
        "that does not end in loss, accuracy or reward needs a direction, maximize or minimize. "
        "Several make a search for a Pareto front"
    )
    add("--objective", required=True, action="append", metavar="METRIC[:DIRECTION]", help=objective)
    loss = "a loss of your own to train with; its keys may be in the space"
    add("--loss", metavar="FILE.py:CLASS", help=loss)
    add("--env", metavar="FILE.py:FUNCTION", help="a reward of your own, for grpo and ppo")
    trials = "to finish; n processes may end with up to n - 1 more. Default: 30"
    add("--trials", type=int, default=30, metavar="N", help=trials)
    sampler = "default: tpe. cmaes keeps a pickle in the study: only go on with one that you know"
    add("--sampler", choices=SAMPLERS, default="tpe", help=sampler)
    pruner = "ends trials that are behind at the same step of validation; default: none"
    add("--pruner", choices=PRUNERS, default="none", help=pruner)
    add("--seed", type=int, metavar="N", help="of the sampler, for a search in one process")
    vary = (
        "train trial n with the configuration's seed + n; without it all have one seed, for which "
        "alone the best one may be best, so train it again with others"
    )
    add("--vary-seed", action="store_true", help=vary)
    failures = "of one cause that end the search, 0 for never; default: 3"
    add("--max-failures", type=int, default=3, metavar="N", help=failures)


def add_study(group: argparse._ArgumentGroup) -> None:
    """Add the options that say where the study is kept."""
    add = group.add_argument
    folder = "of the database and the trials' output; default: results/tune_ALGORITHM"
    add("--folder", metavar="FOLDER", help=folder)
    add("--storage", metavar="URL", help="a database instead of the file study.db in the folder")
    add("--name", metavar="NAME", help="of the study in the storage; default: the folder's")
    grace = "without a sign of life, after which a trial is run once more; default: 60"
    add("--grace", type=int, default=60, metavar="SECONDS", help=grace)


def add_engine(group: argparse._ArgumentGroup) -> None:
    """Add the options of processes, of Ray, and of trials that run NeMo RL."""
    add = group.add_argument
    jobs = (
        "start this command N times, each process on one GPU, in turn, where there are several; "
        "default: 1. On Ray: trials at a time; default: as many as there is room for"
    )
    add("--jobs", type=int, metavar="N", help=jobs)
    add("--threads", type=int, default=1, metavar="N", help="torch's, of each; default: 1")
    engine = "processes of this machine, or Ray; default: local"
    add("--engine", choices=("local", "ray"), default="local", help=engine)
    address = "of a Ray cluster, auto for this machine's; without it one is started here"
    add("--ray-address", metavar="ADDRESS", help=address)
    add("--cpus-per-trial", type=float, default=1, metavar="N", help="Ray's; default: 1")
    add("--gpus-per-trial", type=float, default=0, metavar="N", help="Ray's; default: 0")
    launcher = "this package's trainers, or NeMo RL's scripts in --checkout; default: here"
    add("--launcher", choices=LAUNCHERS, default=LAUNCHERS[0], help=launcher)
    add("--checkout", metavar="FOLDER", help="of NeMo RL, for --launcher nemo-rl")
    command = "what starts a script of the checkout; default: uv run"
    add("--launch-command", default="uv run", metavar="COMMAND", help=command)


def add_outcome(group: argparse._ArgumentGroup) -> None:
    """Add the options of report, best configuration and re-evaluation."""
    add = group.add_argument
    add("--report", metavar="FILE", help="HTML report; default: report.html in the folder")
    rule = "of a Pareto front: knee, METRIC, or 'METRIC where OTHER <= NUMBER'; default: knee"
    add("--choose", metavar="RULE", help=rule)
    again = (
        "after the search, run the best trials and the configuration as it was on so many fresh "
        "seeds, and say how sure it is that the best one is better"
    )
    add("--reevaluate", type=int, metavar="SEEDS", help=again)
    add("--top", type=int, default=3, metavar="N", help="trials to re-evaluate; default: 3")
    add("--only-trials", action="store_true", help="leave all that to another process")


def check_together(options: argparse.Namespace) -> str | None:
    """Say what is wrong with options that do not go together, or None."""
    if (options.launcher == "nemo-rl") != bool(options.checkout):
        return "--launcher nemo-rl and --checkout FOLDER go together"
    if options.engine == "local" and (options.gpus_per_trial or options.ray_address):
        return "--gpus-per-trial and --ray-address are for --engine ray"
    for name in ("jobs", "reevaluate", "top"):
        value = getattr(options, name)
        if value is not None and value < 1:
            return f"--{name}: got {value}, expected 1 or more"
    if options.seed is not None and options.engine == "local" and (options.jobs or 1) > 1:
        return "--seed: with --jobs each process needs another; expected it with one process"
    if options.reevaluate and len(options.objective) > 1:
        return "--reevaluate compares by one objective"
    if options.choose and len(options.objective) == 1:
        return "--choose is for several objectives"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 after an error, 130 if interrupted."""
    parser, argv = make_parser(), list(sys.argv[1:] if argv is None else argv)
    options, overrides = parser.parse_known_args(argv)
    if misspelt := [text for text in overrides if text.startswith("-")]:
        parser.error(f"{misspelt[0]}: no such option")
    if problem := check_together(options):
        parser.error(problem)
    again = f"python -m nemo_rl_ref.tune {shlex.join(argv)}"
    try:
        return run(options, overrides, again, argv)
    except (OverridesError, OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted. To go on: {again}")
        return 130
    except Exception as error:  # Optuna gives errors of a database whatever type it likes
        if not (why := database_problem(error)):
            raise
        print(f"error: the study's database: {why}. To go on: {again}", file=sys.stderr)
        return 1


def database_problem(error: BaseException | None) -> str:
    """Say what the database behind an error reported, such as a full disk; empty if nothing."""
    while error is not None and not isinstance(error, SQLAlchemyError):
        error = error.__cause__ or error.__context__
    return str(error).splitlines()[0] if error else ""


def run(
    options: argparse.Namespace, overrides: Sequence[str], again: str, argv: Sequence[str]
) -> int:
    """Run a search as the options say, and return the command's exit status."""
    spec = make_spec(
        options.algorithm, options.config, options.space, options.objective, overrides,
        options.launcher, loss=options.loss, env=options.env,
    )  # fmt: skip
    parse_rule(options.choose, [objective.metric for objective in spec.objectives])
    names = (
        "trials", "sampler", "pruner", "seed", "vary_seed", "threads", "max_failures", "storage",
        "name", "grace",
    )  # fmt: skip
    settings = Settings(**{name: getattr(options, name) for name in names})
    folder, runner = options.folder or f"results/tune_{options.algorithm}", make_runner(options)
    opened = open_search(spec, settings, folder, runner=runner, listen=say)
    print(describe_start(opened), flush=True)
    status, result = 0, None
    try:
        if options.engine == "ray":
            from nemo_rl_ref.tune.engines.ray import optimize_on_ray

            optimize_on_ray(
                spec, folder=folder, cpus_per_trial=options.cpus_per_trial, jobs=options.jobs,
                gpus_per_trial=options.gpus_per_trial, address=options.ray_address, runner=runner,
                listen=say, **vars(settings),
            )  # fmt: skip
        elif (options.jobs or 1) > 1:
            status = start_processes(argv, options.jobs)
        else:
            work(opened)
        if options.reevaluate and not options.only_trials and not status:
            result = run_best_again(opened, options)
    except KeyboardInterrupt:
        if not options.only_trials:  # the process that started this one says it for all
            done = f"{len(opened.finished())} of {opened.budget} trials are finished"
            print(f"interrupted; {done}, and nothing is lost. To go on: {again}")
        return 130
    except SearchStopped as error:
        print(f"error: the search ended itself: {error}", file=sys.stderr)
        print(f"To go on after mending it: {again}")
        status = 1
    if options.only_trials:
        return status
    if (over := len(opened.finished()) - opened.budget) > 0:
        print(
            f"{over} more than {opened.budget}: each process finishes the trial that it has begun"
        )
    written = write_outcome(
        opened.study, opened.folder, report=options.report, rule=options.choose,
        reevaluation=result,
    )  # fmt: skip
    print("\n".join(written))
    return status


def make_runner(options: argparse.Namespace) -> Runner:
    """Make what runs a trial."""
    if options.launcher != "nemo-rl":
        return run_trial
    from nemo_rl_ref.tune.engines.nemo_rl import launcher

    return launcher(options.checkout, command=shlex.split(options.launch_command))


def start_processes(argv: Sequence[str], jobs: int) -> int:
    """Start the same command so many times, and wait; 0 if one of them finishes the search.

    Ctrl-C reaches this process alone, and this one ends the others.
    """
    line = [sys.executable, "-m", "nemo_rl_ref.tune", *argv, "--jobs", "1", "--only-trials"]
    devices = visible_devices()
    processes = []
    with stopping_at_signals():
        try:
            for number in range(jobs):
                device = {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}
                environment = {**os.environ, **device}
                processes.append(subprocess.Popen(line, env=environment, start_new_session=True))
            statuses = [process.wait() for process in processes]
        except BaseException:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait()
            raise
    for number, status in enumerate(statuses):
        if status:
            print(f"process {number} ended with status {status}", file=sys.stderr)
    return 0 if 0 in statuses else 1


def visible_devices() -> list[str]:
    """List the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else map(str, range(count))
    return [name.strip() for name in names][:count]


def run_best_again(opened: Search, options: argparse.Namespace) -> Any:
    """Re-evaluate in ``reevaluation`` in the folder of a study, and say what was found."""
    with stopping_at_signals(), torch_threads(options.threads):
        result = reevaluate(
            opened.study, opened.folder / "reevaluation", top=options.top,
            seeds=options.reevaluate, run_trial=opened.runner, spec=opened.spec,
        )  # fmt: skip
    print("\n".join(result.sentences()))
    return result


def describe_start(opened: Search) -> str:
    """Say what is about to be done, in a few lines."""
    settings, searched = opened.settings, len(opened.spec.space.distributions())
    where = address(settings.storage or str(opened.folder / FILE))
    start = (
        f"study {opened.study.study_name}: {searched} keys searched with {settings.sampler}, "
        f"pruner {settings.pruner}; in {where}"
    )
    lines = [start]
    if done := len(opened.finished()):
        lines.append(f"goes on after {done} of {opened.budget} trials")
    if opened.budget < settings.trials:
        lines.append(f"the grid has {opened.budget} points")
    end = f"{opened.spec.algorithm}.val_at_end"
    if opened.spec.validates_at_end and not opened.spec.base.get(end):
        lines.append(f"every trial validates at its last step, as with {end}=true")
    return "\n".join(lines)


def say(search: Search, trial: FrozenTrial) -> None:
    """Print a finished trial, in one line."""
    parts = [f"trial {trial.number:>4}  {trial.state.name.lower():8}"]
    if reason := trial.user_attrs.get("failure"):
        parts.append(reason)
    elif trial.values:
        metrics = (objective.metric for objective in search.spec.objectives)
        parts += [f"{m} {v:.5g}" for m, v in zip(metrics, trial.values, strict=False)]
    for key, value in trial.user_attrs.get("values", {}).items():
        if search.spec.space.entries[key].search:
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    parts.append(f"{trial.user_attrs.get('seconds', 0):.1f} s")
    parts.append(f"({len(search.finished())}/{search.budget})")
    print("  ".join(parts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
