# SPDX-License-Identifier: Apache-2.0
"""What a search leaves in its folder: ``report.html``, ``best.yaml``, and a re-evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.study import Study

if TYPE_CHECKING:
    from nemo_rl_ref.tune.reevaluate import Reevaluation
    from nemo_rl_ref.tune.spec import Spec


def write_outcome(
    study: Study,
    folder: str | Path,
    *,
    report: str | Path | None = None,
    rule: str | None = None,
    reevaluation: Reevaluation | None = None,
) -> list[str]:
    """Write the report and, if a trial is complete, the best configuration.

    Args:
        study: A study of this package.
        folder: Of the study.
        report: The HTML file; None for ``report.html`` in the folder.
        rule: How to choose one trial of several objectives, see `nemo_rl_ref.tune.best.choose`.
        reevaluation: Goes into the report.

    Returns:
        What was written, in words, a line each.

    Raises:
        ValueError: If the rule cannot be read, or the best configuration does not load as it is.
    """
    from nemo_rl_ref.tune.best import NoBest, best_of, check_with_nemo_rl, write_yaml
    from nemo_rl_ref.tune.report import write_report
    from nemo_rl_ref.utils.config import OverridesError

    lines = []
    try:
        best = best_of(study, rule)
    except NoBest as error:
        lines.append(f"no best configuration: {error}")
    else:
        path = write_yaml(best, Path(folder) / "best.yaml")
        lines.append(f"best configuration (trial {best.trial}, {best.rule}): {path}")
        try:
            check_with_nemo_rl(best.override_line, study.user_attrs["spec"]["algorithm"])
        except OverridesError as error:
            lines.append(f"NeMo RL's own file does not take these overrides: {error}")
    path = write_report(
        study,
        report or Path(folder) / "report.html",
        rule=rule,
        reevaluation=reevaluation,
    )
    return [*lines, f"report: {path}"]


def describe_reevaluation(result: Reevaluation) -> list[str]:
    """A re-evaluation in words and a table of text.

    Args:
        result: From `nemo_rl_ref.tune.reevaluate.reevaluate`.

    Returns:
        Lines to print.
    """
    columns, rows = result.table()
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    table = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
             for row in (columns, *rows)]  # fmt: skip
    failed = [f"{r.candidate}, seed {r.seed} failed: {r.failure}" for r in result.failures]
    return [*result.sentences(), "", *table, *failed]


def reevaluate_and_say(
    study: Study,
    spec: Spec,
    folder: str | Path,
    *,
    top: int,
    seeds: int,
    runner: Callable[..., Any],
    threads: int = 1,
    show: Callable[[str], None] = print,
) -> Reevaluation:
    """Re-evaluate in ``reevaluation`` in the folder of a study, and say what was found.

    Args:
        study: The study.
        spec: Its search.
        folder: Its folder.
        top: Number of candidates.
        seeds: Number of fresh seeds.
        runner: Runs a trial.
        threads: Torch's.
        show: Gets the lines.

    Returns:
        What was found.

    Raises:
        ValueError: As `nemo_rl_ref.tune.reevaluate.reevaluate`.
    """
    from nemo_rl_ref.tune.reevaluate import reevaluate
    from nemo_rl_ref.tune.study import torch_threads

    with torch_threads(threads):
        result = reevaluate(
            study, Path(folder) / "reevaluation", top=top, seeds=seeds, run_trial=runner, spec=spec,
            show=show,
        )  # fmt: skip
    for line in describe_reevaluation(result):
        show(line)
    return result
