# SPDX-License-Identifier: Apache-2.0
"""What a search leaves in its folder, ``report.html`` and ``best.yaml``, and says at its end."""

from __future__ import annotations

from pathlib import Path

from optuna.study import Study

from nemo_rl_ref.tune.outcome.best import (
    NoBest,
    best_of,
    describe_scores,
    differing_steps,
    write_yaml,
)
from nemo_rl_ref.tune.outcome.reevaluate import Reevaluation
from nemo_rl_ref.tune.outcome.report import describe_states, failures_of, write_report


def write_outcome(
    study: Study,
    folder: str | Path,
    *,
    report: str | Path | None = None,
    rule: str | None = None,
    reevaluation: Reevaluation | None = None,
) -> list[str]:
    """Write the report, to ``report`` if that is given, and the best configuration if there is one.

    Returns:
        How the trials ended, the best one as overrides, and what was written: a line each.

    Raises:
        ValueError: As `nemo_rl_ref.tune.outcome.best.best_of`, which explains ``rule``.
    """
    lines = [f"trials: {describe_states(study)}"]
    lines += [f"  failed: {why} ({len(numbers)})" for why, numbers in failures_of(study)[:5]]
    try:
        best = best_of(study, rule)
    except NoBest as error:
        lines.append(f"no best configuration: {error}")
    else:
        scores = describe_scores(best.scores, best.step)
        path = write_yaml(best, Path(folder) / "best.yaml")
        lines += [
            f"best: trial {best.trial}, {scores}, {best.rule}; as overrides:",
            f"  {best.override_line}",
            f"best configuration: {path}",
        ]
    if note := differing_steps(study):
        lines.append(f"NOTE: {note}")
    path = Path(report or Path(folder) / "report.html")
    return [*lines, f"report: {write_report(study, path, rule=rule, reevaluation=reevaluation)}"]
