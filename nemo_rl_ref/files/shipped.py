# SPDX-License-Identifier: Apache-2.0
"""Files of the repository outside the package: configurations, recorded results, first examples.

In a clone they stand beside the package; ``pip install`` puts them into ``share/nemo-rl-ref`` of the
environment.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

SHARE = "share/nemo-rl-ref"


def shipped(path: str) -> Path:
    """Return where a file or folder of the repository is on this machine.

    Args:
        path: In the repository: ``"configs/dpo.yaml"``, ``"benchmarks/results"``.

    Raises:
        FileNotFoundError: It is neither beside the package nor installed.
    """
    places = [Path(__file__).parents[2] / path]
    try:
        files = distribution("nemo-rl-ref").files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        before, share, _ = str(file.locate()).replace("\\", "/").partition(f"/{SHARE}/")
        if share:
            places.append(Path(f"{before}/{SHARE}", path))
            break
    for place in places:
        if place.exists():
            return place.resolve()
    looked = " and ".join(map(str, places))
    raise FileNotFoundError(f"{path!r} of the nemo-rl-ref repository is not at {looked}")
