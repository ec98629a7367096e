# SPDX-License-Identifier: Apache-2.0
"""What the comparison of facts finds in NeMo RL's own history, recorded for the site.

    python benchmarks/record_drift.py path/to/RL  # a minute; writes results/drift.txt and drift.csv

The facts are the tests': `tests/help/nemo_rl_history.py`. The report is of the longest time, with the
first entries under each heading.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "help")]

from nemo_rl_history import HISTORY, UNTIL, missed  # noqa: E402

from nemo_rl_ref.files.whole import write_text  # noqa: E402
from nemo_rl_ref.upstream.__main__ import drift  # noqa: E402
from nemo_rl_ref.upstream.checkout import Checkout  # noqa: E402
from nemo_rl_ref.upstream.drift import as_markdown  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SHOWN = 4


def main(path):
    """Compare each commit of the history with the last one, and write report and table."""
    rows, reports = ["since,until,facts,found,changes,used here"], []
    for since, facts in HISTORY.items():
        checkout = Checkout(Path(path), UNTIL)
        changes, (before, after) = drift(checkout, since)
        found = len(facts) - len(missed(since, changes))
        used = sum(change.used for change in changes)
        rows.append(f"{before},{after},{len(facts)},{found},{len(changes)},{used}")
        reports.append(as_markdown(changes, before, after, checkout.notes, most=SHOWN))
    write_text(RESULTS / "drift.csv", "\n".join(rows) + "\n")
    write_text(RESULTS / "drift.txt", reports[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
