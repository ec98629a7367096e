# SPDX-License-Identifier: Apache-2.0
"""A new pinned commit of NeMo RL: all facts about it, and every place that names the old one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from nemo_rl_ref.files.whole import write_text
from nemo_rl_ref.upstream.checkout import Checkout
from nemo_rl_ref.upstream.extract import extract_all, facts_text
from nemo_rl_ref.upstream.golden import golden_text

#: The files that may name the pinned commit, or a line of NeMo RL at it.
NAMING = ("*.md", "docs/**/*.md", "docs/**/*.py", "notebooks/*.py", "nemo_rl_ref/**/*.[mp][dy]")

_LINE = re.compile(r"(?<![\w.-])((?:nemo_rl|examples|research)/[\w./-]+)(#L|:)(\d+)(?:(-L)(\d+))?")


def update(
    old: Checkout, new: Checkout, root: Path, golden: Mapping[str, Any]
) -> tuple[list[Path], list[str]]:
    """Pin another commit. Everything is computed before the first file is written.

    Args:
        old: The commit that is pinned.
        new: The commit to pin.
        root: The repository.
        golden: What `golden.make_golden` returns for the new commit.

    Returns:
        The files that changed, and what a person has to look at: lines that are linked and are
        not there any more, ``file:line`` first.
    """
    notes: list[str] = []
    folder = root / "nemo_rl_ref/upstream"
    texts = {folder / name: facts_text(name, facts) for name, facts in extract_all(new).items()}
    texts[folder / "golden.json"] = golden_text(dict(golden))
    renamed = new.renamed_since(old.commit)
    for path in sorted({path for glob in NAMING for path in root.glob(glob)}):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for index, line in enumerate(lines):
            place = f"{path.relative_to(root)}:{index + 1}"
            lines[index] = _rename_commit(
                _move_lines(line, place, old, new, renamed, notes), old, new
            )
        texts[path] = "".join(lines)
    changed = [path for path, text in texts.items() if not _holds(path, text)]
    for path in changed:
        write_text(path, texts[path])
    return changed, notes + new.notes


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _rename_commit(line: str, old: Checkout, new: Checkout) -> str:
    """The new hash for the old, as long as it was, and in such a line the new date."""
    hashes = re.compile(rf"\b{old.commit[:7]}[0-9a-f]*\b")
    if not any(old.commit.startswith(match) for match in hashes.findall(line)):
        return line
    line = hashes.sub(lambda match: new.commit[: len(match[0])], line)
    return line.replace(old.date, new.date)


def _move_lines(
    line: str,
    place: str,
    old: Checkout,
    new: Checkout,
    renamed: Mapping[str, str],
    notes: list[str],
) -> str:
    """The new numbers of lines that are linked, a path with ``#`` and L12, or with a colon and 12."""

    def move(match: re.Match[str]) -> str:
        path, mark, first, dash, last = match.groups()
        now = renamed.get(path, path)
        if path not in old.texts:
            return match[0]
        numbers = []
        for number in (int(n) for n in (first, last) if n):
            moved = _line_now(old.texts[path], new.texts.get(now, ""), number)
            if moved is None:
                notes.append(f"{place}: line {number} of {path} is not there any more")
            numbers.append(str(moved or number))
        return f"{now}{mark}{(dash or '').join(numbers)}"

    return _LINE.sub(move, line)


def _line_now(before: str, after: str, number: int) -> int | None:
    """Where a line is now, by the lines that two texts have in common; None if it is not."""
    matcher = SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    for start, start_now, count in matcher.get_matching_blocks():
        if start < number <= start + count:
            return number - start + start_now
    return None
