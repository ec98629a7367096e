# SPDX-License-Identifier: Apache-2.0
"""What NeMo RL's own history says moved, and whether the comparison of facts finds it.

``tests/upstream/history.json`` has facts by the commit from which on they are counted: renamed files
(``git diff -M``), classes and functions that stand elsewhere or nowhere (``git grep``), renames read in
commits, values of examples (by OmegaConf), fields and arguments (``ast``). They were listed before the
comparison first ran, and not by its code.
"""

import json
from pathlib import Path

#: The commit up to which the facts are counted.
UNTIL = "7ea279abfbeb698b092856d0dab61e7cf39bc909"

HISTORY = json.loads(
    (Path(__file__).parents[1] / "upstream/history.json").read_text(encoding="utf-8")
)


def missed(since, changes):
    """The facts since a commit that no change reports."""
    return [fact for fact in HISTORY[since] if not any(map(fact_is(fact), changes))]


def fact_is(fact):
    """Whether a change reports a fact; a removed name may be told with a likely new one."""
    kinds = {fact["kind"]} | ({"renamed", "moved"} if fact["kind"] == "removed" else set())
    return lambda change: (
        change.name == fact["old"]
        and change.kind in kinds
        and ("new" not in fact or change.new == fact["new"])
        and fact.get("what", "") in change.detail
    )
