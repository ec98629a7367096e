# SPDX-License-Identifier: Apache-2.0
"""How far each preference loss is from TRL's own code, recorded for the site.

    python benchmarks/record_trl_differences.py  # seconds; writes results/trl-differences.json

The comparison is the tests': `tests/help/trl_cases.py` drives the loss methods of TRL's trainers.
`tests/custom/test_against_trl.py` computes the numbers again and compares them with the record.
"""

import datetime
import json
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "help")]

from trl_differences import differences  # noqa: E402

from nemo_rl_ref.files.whole import write_text  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "trl-differences.json"


def main():
    """Compute the differences and write them, with date and versions."""
    record = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "differences": differences(),
    }
    write_text(RESULT, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
