# SPDX-License-Identifier: Apache-2.0
"""What every build checks in the sources: names in backquotes, addresses, blocks, commands.

Each finding is a warning with file and line, so the build fails. Findings are kept under
`_build/sources` until a source changes. Commands are parsed in a process of their own, which imports
the package; what it finds is kept under `_build/commands` until a command or the package changes.
`{block-counts}` is a table of what became of each block.

    python docs/_ext/source_checks.py

prints the findings without a build.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import commands
from docutils import nodes
from execution import write_atomically
from known_names import Names, our_paths
from nemo_rl_facts import FACTS, FILES, Facts, UnknownName
from nemo_rl_roles import NEMO, NemoRL
from page_blocks import COMMANDS, YAML, Checked, all_blocks, dedented, our_signatures, treat
from page_uses import note_use, offer
from sources import (
    Literal,
    docstring_literals,
    docstrings,
    markdown_literals,
    markdown_sources,
    markdown_tokens,
)
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

#: Into NeMo RL's files: a role has the pinned commit and knows the line.
RAW = re.compile(r"github\.com/NVIDIA-NeMo/RL/(?:blob|tree|raw)/\S*")
#: An option in running text, whose hyphens become a dash: the command fails when it is pasted.
DASHED = re.compile(r"(?<![\w)–-])(?:--|–)[a-z][\w-]*")
#: Roles whose text holds names that this file checks.
PLAIN_ROLES = {"", "code"}
#: What is read, besides the facts about NeMo RL: these, and files that end so.
TOP_FILES = ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")
READ = (".md", ".py", ".toml", ".yaml")
COUNTS: Counter[str] = Counter()

logger = logging.getLogger(__name__)


class Finding(NamedTuple):
    """Something wrong in a source."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def literals(top: Path) -> list[Literal]:
    """All text in backquotes, of Markdown and of docstrings."""
    found = [
        x for file, text in markdown_sources(top).items() for x in markdown_literals(file, text)
    ]
    return found + [x for docstring in docstrings(top) for x in docstring_literals(*docstring)]


def name_findings(top: Path) -> Iterator[Finding]:
    """Find text in backquotes that is no known name."""
    names = Names(top, Facts(top / FACTS))
    for literal in literals(top):
        if literal.role in PLAIN_ROLES:
            for problem in names.problems(literal.text):
                yield Finding(literal.file, literal.line, problem)


def role_findings(top: Path) -> Iterator[Finding]:
    """Find roles of NeMo RL's names that a build would refuse."""
    facts, roles = Facts(top / FACTS), {"nemo": NEMO, **NemoRL.roles}
    for file, text in markdown_sources(top).items():
        for literal in markdown_literals(file, text):
            role = roles.get(literal.role.removeprefix("nemo:")) if "nemo" in literal.role else None
            if role:
                shown, _, target = literal.text.removesuffix(">").rpartition("<")
                try:
                    role.link(facts, target.strip(), (shown or target).strip())
                except UnknownName as problem:
                    yield Finding(file, literal.line, str(problem))


def address_findings(top: Path) -> Iterator[Finding]:
    """Find addresses into NeMo RL's files."""
    for file, text in markdown_sources(top).items():
        for number, line in enumerate(text.splitlines(), 1):
            for match in RAW.finditer(line):
                hint = "write {nemo}, {nemo:key}, {nemo:script} or {nemo:line} instead"
                yield Finding(
                    file, number, f"the address {match[0].rstrip(')')} can go stale; {hint}"
                )


def dash_findings(top: Path) -> Iterator[Finding]:
    """Find options outside backquotes."""
    for file, text in markdown_sources(top).items():
        for line, token in markdown_tokens(text):
            for child in token.children or ():
                if child.type == "text" and (match := DASHED.search(child.content)):
                    yield Finding(file, line, f"the option {match[0]} is not in backquotes")


def checked_blocks(top: Path) -> list[Checked]:
    """All fenced blocks and what they were taken for."""
    signatures = our_signatures(top)
    return [treat(block, signatures) for block in all_blocks(top)]


def block_findings(blocks: list[Checked]) -> Iterator[Finding]:
    """Find blocks that nothing checks, and what is wrong with the Python of others."""
    for checked in blocks:
        for problem in checked.problems:
            yield Finding(checked.block.file, checked.block.line, problem)


def command_findings(
    top: Path, blocks: list[Checked], run: Callable[[str], str] | None = None
) -> Iterator[Finding]:
    """Find commands and YAML that are not understood, in blocks and in backquotes.

    Args:
        top: the project's folder.
        blocks: its blocks.
        run: gives the answer of `commands.py` to its input; by default in this process.
    """
    places, asked = [], []
    for checked in blocks:
        if checked.treatment in (COMMANDS, YAML):
            kind = "yaml" if checked.treatment == YAML else "sh"
            places.append((checked.block.file, checked.block.line))
            asked.append([kind, dedented(checked.block.text)])
    for literal in literals(top):
        if literal.role in PLAIN_ROLES and re.match(r"(make|pip install) [\w'.\[]", literal.text):
            places.append((literal.file, literal.line))
            asked.append(["sh", literal.text])
    answers = json.loads(run(json.dumps(asked))) if run else commands.answer(asked)
    for (file, line), problems in zip(places, answers, strict=True):
        yield from (Finding(file, line, problem) for problem in problems)


def ask_once(top: Path, store: Path) -> Callable[[str], str]:
    """Run `commands.py` in a process, or give the answer that it gave to the same question."""

    def run(question: str) -> str:
        files = [*(top / "nemo_rl_ref").rglob("*.py"), *(top / "docs/_ext").glob("*.py")]
        files += [*(top / "configs").rglob("*.yaml"), top / "Makefile", top / "pyproject.toml"]
        files += [top / FACTS / name for name in FILES]
        digest = hashlib.sha256(question.encode())
        for file in sorted(files):
            digest.update(file.relative_to(top).as_posix().encode() + b"\0" + file.read_bytes())
        kept = store / f"{digest.hexdigest()[:24]}.json"
        if not kept.is_file():
            program = [sys.executable, str(top / "docs/_ext/commands.py")]
            done = subprocess.run(program, input=question, cwd=top, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"commands could not be checked: {done.stderr[-2000:]}")
            store.mkdir(parents=True, exist_ok=True)
            for old in store.glob("*.json"):
                old.unlink()
            write_atomically(kept, done.stdout.encode())
        return kept.read_text(encoding="utf-8")

    return run


def findings(top: Path, blocks: list[Checked], run: Callable[[str], str] | None) -> list[Finding]:
    """Everything that is wrong in the sources of a project."""
    return [
        *name_findings(top),
        *address_findings(top),
        *dash_findings(top),
        *block_findings(blocks),
        *command_findings(top, blocks, run),
    ]


def digest_of(top: Path) -> str:
    """Hash the sources: the names of all files that may be named, what is in those that are read."""
    digest = hashlib.sha256()
    read = {*TOP_FILES, *(f"{FACTS}/{name}" for name in FILES)}
    for name in sorted({*our_paths(top), *read}):
        digest.update(name.encode() + b"\0")
        if name in read or name.endswith(READ):
            digest.update((top / name).read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def check_sources(app: Sphinx) -> None:
    """Warn of each finding; what was found is kept until a source changes."""
    top = Path(app.srcdir)
    if not (top / FACTS / FILES[0]).is_file():
        return  # a small site of the tests, which is not about NeMo RL
    built = Path(app.outdir).parent
    kept = built / "sources" / f"{digest_of(top)}.json"
    if not kept.is_file():
        blocks = checked_blocks(top)
        counts = Counter(checked.treatment for checked in blocks)
        found = findings(top, blocks, ask_once(top, built / "commands"))
        kept.parent.mkdir(parents=True, exist_ok=True)
        for old in kept.parent.glob("*.json"):
            old.unlink()
        write_atomically(kept, json.dumps([counts, found]).encode())
    counts, found = json.loads(kept.read_text(encoding="utf-8"))
    COUNTS.clear()
    COUNTS.update(counts)
    for file, line, message in found:
        logger.warning(message, location=f"{top / file}:{line}", type="sources")


class BlockCounts(SphinxDirective):
    """Show how many blocks of each treatment there are."""

    def run(self) -> list[nodes.Node]:
        """Make the table."""
        note_use(self.env, "block-counts", "")
        rows = [f"| {what} | {count} |" for what, count in COUNTS.most_common()]
        rows.append(f"| all | {COUNTS.total()} |")
        return self.parse_text_to_nodes(
            "\n".join(["| blocks | how many |", "| --- | --- |", *rows])
        )


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    offer("block-counts", lambda _: sorted(COUNTS.items()))
    app.connect("builder-inited", check_sources)
    app.add_directive("block-counts", BlockCounts)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def main() -> int:
    """Print what is wrong in the sources, without a build; 1 if there is anything."""
    top = Path(__file__).parents[2]
    sys.path.insert(0, str(top))
    found = [*role_findings(top), *findings(top, checked_blocks(top), None)]
    print("\n".join(map(str, found)))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
