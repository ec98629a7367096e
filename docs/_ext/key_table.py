# SPDX-License-Identifier: Apache-2.0
"""The directive `{key-table}`: the configuration keys of a section of NeMo RL's.

    ```{key-table} grpo
    :but: grpo.async_grpo
    ```

lists each key below `grpo` with its declared type and default, the values that NeMo RL's own
configuration files give it, the line that reads it, and the pages here that name it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from equations import EquationDirective
from nemo_rl_facts import FACTS, Place, above_key, read_facts, value_text
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

#: Values and pages that a row names, at most.
MOST = 3


class KeyTable(EquationDirective):
    """List the keys below a section, or several."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {"but": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Make the table."""
        root = Path(self.env.srcdir)
        folder = root / FACTS
        facts = read_facts(folder)
        readers = json.loads((folder / "readers.json").read_text("utf-8"))
        self.env.note_dependency(str(folder / "readers.json"))
        but = tuple(f"{key}." for key in self.options.get("but", "").split())
        wanted = tuple(self.arguments[0].split())
        below = tuple(f"{section}." for section in wanted)
        sections = {above for key in facts.keys for above in above_key(key)}
        keys = [
            key
            for key in sorted(facts.keys)
            if (key in wanted or key.startswith(below)) and not f"{key}.".startswith(but or ("\0",))
            if "#" not in key and "*" not in key and key not in sections
        ]
        if not keys:
            raise self.error(f"NeMo RL has no key below {' or '.join(wanted)}")
        pages = self.pages(root)
        rows = [
            (
                f"{{nemo:key}}`{key}`",
                code(facts.key_fields.get(key, {}).get("type", "")),
                code(facts.key_fields.get(key, {}).get("default", "")),
                values_text(facts.set_in(key)),
                self.read_by(facts, readers, key),
                " ".join(f"{{doc}}`/{page}`" for page in pages.get(key, ())[:MOST]),
            )
            for key in keys
        ]
        head = ("key", "type", "default", "set to", "read by", "explained in")
        return [
            *self.parsed(f"{len(keys)} keys."),
            nodes.container("", *self.table(head, rows), classes=["key-table"]),
        ]

    @staticmethod
    def read_by(facts: Any, readers: dict[str, Any], key: str) -> str:
        """Link to the first line that reads a key, or say that none was found."""
        found = readers["readers"].get(key)
        if isinstance(found, list):
            number, line = found[0]
            place = Place(readers["files"][number], line)
            name = place.file.rpartition("/")[2]
            return f"[{name}:{line}]({facts.url(place)})"
        return found if isinstance(found, str) else "no line found"

    def pages(self, root: Path) -> dict[str, list[str]]:
        """The pages that name each key, those that name it most often first."""
        counts: dict[str, Counter[str]] = {}
        for page in sorted(self.env.found_docs):
            if page.startswith(("notebooks/", "reference/")):
                continue
            path = self.env.doc2path(page)
            self.env.note_dependency(path)
            for key in re.findall(r"`\+{0,2}([a-z_]+(?:\.\w+)+)", Path(path).read_text("utf-8")):
                counts.setdefault(key, Counter())[page] += 1
        return {key: [page for page, _ in count.most_common()] for key, count in counts.items()}


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
