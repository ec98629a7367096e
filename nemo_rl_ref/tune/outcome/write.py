# SPDX-License-Identifier: Apache-2.0
"""What a search leaves in its folder, ``report.html`` and ``best.yaml``, and says at its end."""

from __future__ import annotations

from pathlib import Path

from optuna.study import Study

from nemo_rl_ref.tune.outcome.best import NoBest, best_of, check_with_nemo_rl, write_yaml
from nemo_rl_ref.tune.outcome.reevaluate import Reevaluation
from nemo_rl_ref.tune.outcome.report import describe_states, failures_of, write_report
from nemo_rl_ref.utils.config import OverridesError


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
        rule: How to choose one trial of several objectives, see
            `nemo_rl_ref.tune.outcome.best.choose`.
        reevaluation: Goes into the report.

    Returns:
        How the trials ended, the best one as overrides, and what was written: a line each.

    Raises:
        ValueError: If the rule cannot be read, or the best configuration does not load as it is.
    """
    lines = [f"trials: {describe_states(study)}"]
    lines += [f"  failed: {why} ({len(numbers)})" for why, numbers in failures_of(study)[:5]]
    try:
        best = best_of(study, rule)
    except NoBest as error:
        lines.append(f"no best configuration: {error}")
    else:
        scores = ", ".join(f"{metric} {value:.6g}" for metric, value in best.scores.items())
        path = write_yaml(best, Path(folder) / "best.yaml")
        lines += [
            f"best: trial {best.trial}, {scores}, {best.rule}; as overrides:",
            f"  {best.override_line}",
            f"best configuration: {path}",
        ]
        try:
            check_with_nemo_rl(best.override_line, study.user_attrs["spec"]["algorithm"])
        except OverridesError as error:
            lines.append(f"NeMo RL's own file does not take these overrides: {error}")
    path = Path(report or Path(folder) / "report.html")
    return [*lines, f"report: {write_report(study, path, rule=rule, reevaluation=reevaluation)}"]


def describe_reevaluation(result: Reevaluation) -> list[str]:
    """Write a re-evaluation as sentences and a table of text.

    Args:
        result: From `nemo_rl_ref.tune.outcome.reevaluate.reevaluate`.

    Returns:
        Lines to print.
    """
    columns, rows = result.table()
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    table = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
             for row in (columns, *rows)]  # fmt: skip
    failed = [f"{r.candidate}, seed {r.seed} failed: {r.failure}" for r in result.failures]
    return [*result.sentences(), "", *table, *failed]
