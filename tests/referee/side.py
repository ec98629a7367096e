# SPDX-License-Identifier: Apache-2.0
"""One side of a variant in a process of its own: ``side.py FOLDER SIDE VARIANT CHECKOUT``."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main(folder, side, name, checkout):
    """Run the variant on this side; what it did goes to ``record.json`` in the folder."""
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    import record
    import variants

    kind, words = variants.algorithm(name), variants.overrides(name, folder)
    pieces = variants.PIECES.get(name)
    if pieces:
        prefix = "nemo_rl" if side == "nemo_rl" else "nemo_rl_ref"
        variants.write_pieces(pieces, folder, prefix)
        sys.path.insert(0, folder)
    words = ["--config", str(ROOT / f"configs/{kind}.yaml"), *words]
    if side == "nemo_rl":
        import nemo_rl_side

        nemo_rl_side.run(checkout, kind, words, pieces)
    else:
        import this_side

        this_side.run(kind, words, pieces, folder)
    record.write(Path(folder, "record.json"))


if __name__ == "__main__":
    main(*sys.argv[1:])
