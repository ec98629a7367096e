# SPDX-License-Identifier: Apache-2.0
"""Plants faults in a copy of the project; the check of each must fail and name it.

    python tests/planted/plant.py            # all of faults.toml, in 10 to 15 minutes on two cores
    python tests/planted/plant.py names dpo  # those whose kind or name holds a word

A fault is an edit as people make them: a renamed key, a sign, a call that was left out. `check` is
the one check that must notice it: `sources`, what every build checks in pages and docstrings, or a
test. What it prints must hold the words of `says`; for `sources`, in a line with the fault's file.
The working tree is never touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

TOP = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("faults.toml")
SOURCES = "sources"
TIMEOUT = 300


@dataclass(frozen=True)
class Fault:
    """A line of the table."""

    name: str
    kind: str
    file: str
    old: str
    new: str
    check: str
    says: tuple[str, ...]

    def apply(self, top: Path) -> str:
        """Plant it; return the file's text as it was.

        Raises:
            ValueError: the old text does not stand there exactly once.
        """
        path = top / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(
                f"{self.name}: {self.old!r} stands {text.count(self.old)} times in {self.file}, "
                "expected once"
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text

    def is_seen(self, code: int, output: str) -> bool:
        """Say whether a check's output is about this fault."""
        if self.check == SOURCES:
            lines = [line for line in output.splitlines() if line.startswith(f"{self.file}:")]
            return code != 0 and any(all(word in line for word in self.says) for line in lines)
        return code == 1 and all(word in output for word in self.says)


def read_table() -> list[Fault]:
    """All faults, by kind as in the table."""
    kinds = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return [
        Fault(**{**fault, "kind": kind, "says": tuple(fault["says"])})
        for kind, faults in kinds.items()
        for fault in faults
    ]


def copy_project(folder: Path) -> Path:
    """Copy what git tracks, and what it would."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=TOP, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (TOP / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, folder / name)
    return folder


def run(checks: Sequence[str], top: Path) -> tuple[int, str]:
    """Run `sources` or tests in a copy; exit status and what was printed."""
    if list(checks) == [SOURCES]:
        command = [sys.executable, "docs/_ext/source_checks.py"]
    else:
        options = ["-q", "-p", "no:cacheprovider", "--no-header", "-vv"]
        command = [sys.executable, "-m", "pytest", *options, *checks]
    # Without files of bytecode: an edit of the same length within a second would not be read.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    seconds = TIMEOUT * len(checks)
    try:
        done = subprocess.run(
            command, cwd=top, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end after {seconds} s"
    return done.returncode, done.stdout + done.stderr


def batches(faults: Sequence[Fault]) -> list[list[Fault]]:
    """Faults that are planted together: of `sources`, which lists all it finds, one in each file."""
    found: list[list[Fault]] = []
    for fault in faults:
        for batch in found:
            if fault.check == batch[0].check == SOURCES:
                if fault.file not in {other.file for other in batch}:
                    batch.append(fault)
                    break
        else:
            found.append([fault])
    return found


def plant(faults: Sequence[Fault], copies: Sequence[Path]) -> Iterator[tuple[Fault, int, str]]:
    """Plant a batch at a time in each copy and run its check; what it came to, by fault."""
    free: Queue[Path] = Queue()
    for copy in copies:
        free.put(copy)

    def one(batch: list[Fault]) -> list[tuple[Fault, int, str]]:
        top = free.get()
        texts = {fault.file: fault.apply(top) for fault in batch}
        try:
            code, output = run([batch[0].check], top)
            return [(fault, code, output) for fault in batch]
        finally:
            for file, text in texts.items():
                (top / file).write_text(text, encoding="utf-8")
            free.put(top)

    with ThreadPoolExecutor(len(copies)) as pool:
        for results in pool.map(one, batches(faults)):
            yield from results


def main(words: Sequence[str]) -> int:
    """Plant what is asked for; 1 if a check fails by itself or a fault escapes."""
    faults = [
        fault
        for fault in read_table()
        if not words or any(word in f"{fault.kind} {fault.name}" for word in words)
    ]
    with tempfile.TemporaryDirectory() as folder:
        count = min(os.cpu_count() or 1, 4)
        copies = [copy_project(Path(folder) / str(number)) for number in range(count)]
        wanted = sorted({fault.check for fault in faults})
        tests = [check for check in wanted if check != SOURCES]
        for checks in ([SOURCES] if tests != wanted else [], tests):
            code, output = run(checks, copies[0]) if checks else (0, "")
            if code:
                print(f"{output[-3000:]}\nchecks that fail although nothing is planted")
                return 1
        escaped, planted = [], Counter(fault.kind for fault in faults)
        for fault, code, output in plant(faults, copies):
            seen = fault.is_seen(code, output)
            print(f"{'seen   ' if seen else 'ESCAPED'}  {fault.kind}: {fault.name}", flush=True)
            if not seen:
                escaped.append(fault)
                print(f"         {fault.file}; {fault.check}; exit {code}; expected {fault.says}")
                print("         | " + "\n         | ".join(output.splitlines()[-12:]))
    for kind, number in planted.items():
        missed = sum(fault.kind == kind for fault in escaped)
        print(f"{kind}: {number} planted, {number - missed} seen")
    print(f"all: {len(faults)} planted, {len(faults) - len(escaped)} seen")
    return int(bool(escaped) or not faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
