# SPDX-License-Identifier: Apache-2.0
"""Roles for what NeMo RL has, each a link to the pinned commit. An unknown name fails the build.

    {nemo}`algorithms.loss.DPOLossFn`       a module, class, function, method or field
    {nemo:key}`dpo.seed=1`                  a configuration key; type, default, recipes on hover
    {nemo:script}`examples/run_dpo.py`      an entry script or a YAML file, `dpo.yaml` for short
    {nemo:line}`nemo_rl/algorithms/dpo.py:401`   a line where something known stands
    {nemo:default}`dpo.sft_loss_weight`     prints the default; `KEY in dpo.yaml`, that file's value
    {nemo:commit}`7ea279a`                  the pinned commit

`{nemo}` prints the last part of `~algorithms.loss.DPOLossFn`. Other words stand in front:
``{nemo}`the loss <algorithms.loss.DPOLossFn>` ``. A configuration key in plain backquotes becomes
such a link by itself; `source_checks.py` refuses what is no name of anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from nemo_rl_facts import FACTS, FILES, SOURCE, Facts, Place, UnknownName, read_facts
from sphinx.application import Sphinx
from sphinx.domains import Domain
from sphinx.util import logging
from sphinx.util.docutils import ReferenceRole
from sphinx.util.typing import ExtensionMetadata

#: A key, and after it what Hydra's override or YAML would have: `dpo.seed=1`, `dpo.seed: 1`.
KEY = re.compile(r"[+]{0,2}(?P<key>[\w.#*-]+)(?:\s*[=:].*)?")

logger = logging.getLogger(__name__)


def key_in(text: str) -> str:
    """The key of an override or a line of YAML, `#` for an index."""
    match = KEY.fullmatch(text)
    key = match["key"] if match else text
    return ".".join("#" if part.isdecimal() else part for part in key.split("."))


def symbol_link(facts: Facts, target: str, text: str) -> tuple[str, str, str]:
    """What is printed, the address and the hover of a symbol."""
    place = facts.symbol(target.removeprefix("~"))
    shown = target.rpartition(".")[2] if text.startswith("~") else text
    return shown, facts.url(place), title(place)


def key_link(facts: Facts, target: str, text: str) -> tuple[str, str, str]:
    """The same of a configuration key."""
    key = key_in(target)
    place = facts.key_place(key)
    return text, facts.url(place), "; ".join(filter(None, [title(place), facts.describe_key(key)]))


def script_link(facts: Facts, target: str, text: str) -> tuple[str, str, str]:
    """The same of a script or a configuration file."""
    place = facts.script(target)
    return text, facts.url(place), title(place)


def line_link(facts: Facts, target: str, text: str) -> tuple[str, str, str]:
    """The same of a line."""
    place, name = facts.line(target)
    return text, facts.url(place), f"{title(place)}: {name}"


def default_link(facts: Facts, target: str, text: str) -> tuple[str, str, str]:
    """The same of a value: it is printed in place of the key."""
    value, origin = facts.default(target)
    key, _, config = target.partition(" in ")
    place = facts.script(origin) if config else facts.key_place(key)
    return value, facts.url(place), f"{title(place)}: {key} in {origin}"


def commit_link(facts: Facts, target: str, text: str) -> tuple[str, str, str]:
    """The same of the pinned commit."""
    if len(target) < 7 or not facts.commit.startswith(target):
        raise UnknownName(f"the pinned commit is {facts.commit[:7]}, got {target!r}")
    return text, f"{SOURCE}/tree/{facts.commit}", f"NeMo RL at {facts.commit}"


def title(place: Place) -> str:
    """Say where a link leads."""
    return f"NeMo RL, {place.file}" + (f", line {place.line}" if place.line else "")


class NemoRole(ReferenceRole):
    """Print a name as code and link it.

    Args:
        link: finds what is printed, the address and the hover.
        css: the class of the code.
    """

    def __init__(self, link: Callable[[Facts, str, str], tuple[str, str, str]], css: str) -> None:
        super().__init__()
        self.link, self.css = link, css

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Look the name up."""
        folder = Path(self.env.srcdir) / FACTS
        for name in FILES:
            self.env.note_dependency(str(folder / name))
        try:
            found = self.link(read_facts(folder), self.target.strip(), self.title.strip())
        except UnknownName as problem:
            location = self.get_location()
            logger.warning(str(problem), location=location, type="nemo", subtype="name")
            return [nodes.literal(self.text, self.text)], []
        return [linked(*found, self.css)], []


def linked(text: str, url: str, hover: str, css: str) -> nodes.reference:
    """Code that is a link."""
    code = nodes.literal(text, text, classes=[css])
    return nodes.reference("", "", code, internal=False, refuri=url, reftitle=hover)


#: The role without a colon.
NEMO = NemoRole(symbol_link, "nemo-symbol")


class NemoRL(Domain):
    """The roles with a colon."""

    name = "nemo"
    label = "NeMo RL"
    roles: ClassVar[dict[str, Any]] = {
        "key": NemoRole(key_link, "config-key"),
        "script": NemoRole(script_link, "nemo-script"),
        "line": NemoRole(line_link, "nemo-line"),
        "default": NemoRole(default_link, "nemo-default"),
        "commit": NemoRole(commit_link, "nemo-commit"),
    }

    def merge_domaindata(self, docnames: Any, otherdata: Any) -> None:
        """Nothing is kept, so nothing is merged."""

    def resolve_any_xref(self, *args: Any) -> list[Any]:
        """Nothing here is found by the role `any`."""
        return []


def link_keys(facts: Facts, doctree: nodes.document) -> None:
    """Link each configuration key with a dot that stands in plain backquotes."""
    for code in list(doctree.findall(nodes.literal)):
        text, parent = code.astext(), code.parent
        if code["classes"] or "." not in text or isinstance(parent, (nodes.reference, nodes.title)):
            continue
        key = key_in(text)
        if key in facts.keys and any(
            name in facts.places for name in (key, key.rpartition(".")[0])
        ):
            shown, url, hover = key_link(facts, text, text)
            parent.replace(code, linked(shown, url, hover, "config-key"))


def read_page(app: Sphinx, doctree: nodes.document) -> None:
    """Link keys on pages of prose; in the API they stand beside cross references of their own."""
    folder = Path(app.srcdir) / FACTS
    if (folder / FILES[0]).is_file() and not app.env.docname.startswith("reference/"):
        link_keys(read_facts(folder), doctree)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.add_domain(NemoRL)
    app.add_role("nemo", NEMO)
    app.connect("doctree-read", read_page)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
