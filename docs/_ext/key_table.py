# SPDX-License-Identifier: Apache-2.0
"""The directive `{key-table}`: the configuration keys of a section of NeMo RL's.

    ```{key-table} grpo
    :but: grpo.async_grpo
    ```

lists each key below `grpo` with its declared type and default, the values that NeMo RL's own
configuration files give it, the line that reads it, and the pages here that name it.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from equations import EquationDirective
from nemo_rl_facts import FACTS, FILES, READERS, Facts, Place, read_facts, value_text
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

#: Values and pages that a row names, at most.
MOST = 3
#: A key in backquotes; where a page keeps which others name which.
KEY = re.compile(r"`\+{0,2}([a-z_]+(?:\.\w+)+)")
NAMED = "pages that name keys"


class KeyTable(EquationDirective):
    """List the keys below a section, or several."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {"but": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Make the table."""
        folder = Path(self.env.srcdir) / FACTS
        facts = read_facts(folder)
        for name in (*FILES, READERS):
            self.env.note_dependency(str(folder / name))
        wanted, but = self.arguments[0].split(), self.options.get("but", "").split()
        keys = [
            key
            for key in sorted(facts.keys - facts.sections)
            if not {"#", "*"} & set(key.split(".")) and within(key, wanted) and not within(key, but)
        ]
        if not keys:
            raise self.error(f"NeMo RL has no key below {' or '.join(wanted)}")
        pages = self.pages()
        rows = [
            (
                f"{{nemo:key}}`{key}`",
                code(facts.key_fields.get(key, {}).get("type", "")),
                code(facts.key_fields.get(key, {}).get("default", "")),
                values_text(facts.set_in(key)),
                read_by(facts, key),
                " ".join(f"{{doc}}`/{page}`" for page in pages.get(key, ())[:MOST]),
            )
            for key in keys
        ]
        head = ("key", "type", "default", "set to", "read by", "explained in")
        return [
            *self.parsed(f"{len(keys)} keys."),
            nodes.container("", *self.table(head, rows), classes=["key-table"]),
        ]

    def pages(self) -> dict[str, list[str]]:
        """The pages that name each key, those that name it most often first."""
        paths = {
            page: self.env.doc2path(page)
            for page in sorted(self.env.found_docs)
            if not page.startswith(("notebooks/", "reference/"))
        }
        for path in paths.values():
            self.env.note_dependency(path)
        if NAMED not in self.env.temp_data:  # once for all tables of the page
            counts: dict[str, Counter[str]] = {}
            for page, path in paths.items():
                for key in KEY.findall(Path(path).read_text("utf-8")):
                    counts.setdefault(key, Counter())[page] += 1
            self.env.temp_data[NAMED] = {
                key: [page for page, _ in count.most_common()] for key, count in counts.items()
            }
        return self.env.temp_data[NAMED]


def within(key: str, sections: list[str]) -> bool:
    """Say whether a key is one of several, or below one."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def read_by(facts: Facts, key: str) -> str:
    """Link to the first line that reads a key, or say that none was found."""
    found = facts.readers.get(key)
    if isinstance(found, Place):
        return f"[{found.file.rpartition('/')[2]}:{found.line}]({facts.url(found)})"
    return found or "no line found"


def code(text: str) -> str:
    """Set a text as code that is no name."""
    return f"{{code}}`{text}`" if text else ""


def values_text(values: dict[str, Any]) -> str:
    """The values that files give a key, the commonest first, with how many files do."""
    count = Counter(value_text(value) for value in values.values())
    shown = [f"{code(value[:40] or '…')} ({n})" for value, n in count.most_common(MOST)]
    return ", ".join([*shown, *(["…"] if len(count) > MOST else [])])


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.add_directive("key-table", KeyTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
