# SPDX-License-Identifier: Apache-2.0
"""The role `{key}`: a configuration key, linked to its line in NeMo RL's configuration.

    {key}`policy.optimizer.kwargs.lr`     {key}`dpo.seed=1`

The link leads to the pinned commit: to the YAML file of an example that has the key, else to the
class that has it. A key that NeMo RL does not have is a warning, so the build fails.
"""

from __future__ import annotations

import difflib
import json
import re
from functools import lru_cache
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole
from sphinx.util.typing import ExtensionMetadata

SOURCE = "https://github.com/NVIDIA-NeMo/RL/blob"
FACTS = "nemo_rl_ref/upstream"
#: A key, and after it what Hydra's override or YAML would have: `dpo.seed=1`, `dpo.seed: 1`.
TEXT = re.compile(r"[+]{0,2}(?P<key>[\w.#*-]+)(?:\s*[=:].*)?")

logger = logging.getLogger(__name__)


class Keys:
    """NeMo RL's configuration keys and where they stand.

    Args:
        folder: holds `keys.json` and `places.json`, of the same commit.

    Raises:
        ValueError: they describe different commits.
    """

    def __init__(self, folder: Path) -> None:
        keys, places = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("keys.json", "places.json")
        )
        self.commit = places["commit"]
        if keys["commit"] != self.commit:
            raise ValueError(
                f"{folder}: keys.json is of commit {keys['commit']}, places.json of {self.commit}"
            )
        self.keys, self.open = set(keys["keys"]), set(keys["open"])
        self.files, self.places = places["files"], places["places"]

    def exists(self, key: str) -> bool:
        """Say whether NeMo RL has a key, or takes any key where it stands."""
        return key in self.keys or any(above in self.open for above in self.above(key))

    def above(self, key: str) -> list[str]:
        """The sections that a key is in, the nearest first."""
        parts = key.split(".")
        return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]

    def place(self, key: str) -> tuple[str, int] | None:
        """File and line of a key that exists; of the section above it where any key is taken."""
        for name in (key, *self.above(key)):
            if name in self.places:
                number, line = self.places[name]
                return self.files[number], line
        return None

    def nearest(self, key: str) -> str:
        """Suggest what a key that does not exist may have meant."""
        close = difflib.get_close_matches(key, self.keys, n=1)
        return f"; did you mean {close[0]!r}?" if close else ""


@lru_cache(maxsize=1)
def read_keys(folder: Path) -> Keys:
    """Read the keys once in a build."""
    return Keys(folder)


class ConfigKey(SphinxRole):
    """Print a key as code and link it."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Look the key up."""
        folder, text = Path(self.env.srcdir) / FACTS, self.text.strip()
        for name in ("keys.json", "places.json"):
            self.env.note_dependency(str(folder / name))
        known = read_keys(folder)
        match = TEXT.fullmatch(text)
        key = match["key"] if match else text
        key = ".".join("#" if part.isdecimal() else part for part in key.split("."))
        if not known.exists(key):
            return self.refuse(f"NeMo RL has no configuration key {key!r}{known.nearest(key)}")
        place = known.place(key)
        if place is None:
            return self.refuse(f"it is not known where in NeMo RL's source the key {key!r} stands")
        file, line = place
        link = nodes.reference(
            "",
            "",
            nodes.literal(text, text, classes=["config-key"]),
            internal=False,
            refuri=f"{SOURCE}/{known.commit}/{file}#L{line}",
            reftitle=f"NeMo RL, {file}, line {line}",
        )
        return [link], []

    def refuse(self, message: str) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Warn, naming the page and the line; warnings are errors in this project's builds."""
        logger.warning(message, location=self.get_location(), type="config", subtype="key")
        return [nodes.literal(self.text, self.text)], []


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.add_role("key", ConfigKey())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
