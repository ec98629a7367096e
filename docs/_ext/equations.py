# SPDX-License-Identifier: Apache-2.0
"""The directive `{equation}`: an equation that was checked, with what the check found.

    ```{equation} dpo-loss
    ```

prints the equation `dpo-loss` of `nemo_rl_ref.equations`, numbered, for `{eq}`eq-dpo-loss``; below
it what it was checked against, the largest difference, its paper and its symbols. With `:repeat:`
it is shown again, without a number and with a link to the numbered one. The API entries of what
implements an equation link back to it.

`{equation-table}` lists all equations and how each was checked, `{notation-table}` all symbols.

The equations are checked in a process of their own, beside the notebooks, before any page is
read. The result is kept under `_build/equations` until something that it stands on changes.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from embed import nearest
from execution import environment_key, write_atomically
from page_uses import note_use, offer
from sphinx.application import Sphinx
from sphinx.domains.math import MathDomain
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

logger = logging.getLogger(__name__)

KEPT = 3  # results that stay in the store
PREFIX = "eq-"  # of the label for `{eq}`, which prints the number
TITLE_PREFIX = "equation-"  # of the label for `{ref}`, which prints the title
UNCHECKED_PAGES = ("reference/api/",)  # formulas in docstrings are not displayed equations


# ---- the checks -------------------------------------------------------------------------------


@dataclass
class Checks:
    """The checks of this build's equations, and what they found.

    Attributes:
        results: the file with what was found; None where the project has no equations.
        process: computes it; None where it is there.
        output: what the process writes.
        checked: the description of each checked equation, by label.
        unchecked: why an equation is not checked, by label.
        runtime: JavaScript that the sliders below equations call.
    """

    results: Path | None = None
    process: subprocess.Popen[str] | None = None
    output: Any = None
    checked: dict[str, dict[str, Any]] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    runtime: str = ""

    def implemented_by(self, name: str) -> list[tuple[str, str]]:
        """List the equations, label and title, that a function or class implements."""
        entries = self.checked.items()
        return [(label, e["title"]) for label, e in entries if name in e["implementations"]]


#: Filled at the start of a build. A process builds one site; its parallel readers are forks.
CHECKS = Checks()


def start_checks(app: Sphinx) -> None:
    """Begin to check the equations, unless the result is there."""
    root = Path(app.srcdir)
    CHECKS.results, CHECKS.process = None, None
    CHECKS.checked, CHECKS.unchecked = {}, {}
    if not (root / "nemo_rl_ref" / "equations").is_dir():
        return
    own = Path(__file__).read_bytes()
    key = hashlib.sha256(environment_key(root).encode() + own).hexdigest()[:16]
    CHECKS.results = Path(app.outdir).parent / "equations" / f"{key}.json"
    if not CHECKS.results.is_file():
        logger.info("checking the equations ...")
        # Into a file, which takes all at once. A full pipe makes the process wait in its write; if
        # it is stopped and continued there, the rest is lost where PYTHONUNBUFFERED is set.
        CHECKS.output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        CHECKS.process = subprocess.Popen(
            [sys.executable, "-m", "nemo_rl_ref.equations", "--json"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdout=CHECKS.output,
            stderr=subprocess.PIPE,
            text=True,
        )
        atexit.register(CHECKS.process.kill)  # where a notebook fails, nobody waits for it


def finish_checks(app: Sphinx) -> None:
    """Wait for the checks and put the result where the directives find it.

    An equation that failed ends the build, with a message that names it.
    """
    if CHECKS.results is None:
        return
    if CHECKS.process is not None:
        _, errors = CHECKS.process.communicate()
        if CHECKS.process.returncode != 0:
            raise SystemExit(f"\nEquation error: {errors.strip()}")
        with CHECKS.output as file:
            file.seek(0)
            output = file.read()
        json.loads(output)  # what is kept can be read
        write_atomically(CHECKS.results, output.encode())
        for old in sorted(CHECKS.results.parent.glob("*.json"), key=os.path.getmtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    found = json.loads(CHECKS.results.read_text(encoding="utf-8"))
    CHECKS.checked, CHECKS.unchecked = found["checked"], found["unchecked"]
    CHECKS.runtime = found["runtime"]


# ---- numbers ----------------------------------------------------------------------------------


class NumberedByChapter(MathDomain):
    """Numbers equations (3.1), (3.2), … on the pages that conf.py gives a chapter.

    A reference from another page then says which equation it means.
    """

    def note_equation(self, docname: str, labelid: str, location: Any = None) -> None:
        """Give an equation its number."""
        super().note_equation(docname, labelid, location)
        chapter = self.env.config.equation_chapters.get(docname)
        if chapter:
            numbers: dict[str, Any] = self.equations
            numbers[labelid] = (docname, f"{chapter}.{numbers[labelid][1]}")


# ---- the directives ---------------------------------------------------------------------------


class EquationDirective(SphinxDirective):
    """What the three directives share."""

    def parsed(self, *lines: str) -> list[nodes.Node]:
        """Parse Markdown as if it stood on the page here."""
        place = nodes.container()
        place.document = self.state.document
        source, _ = self.get_source_info()
        self.state.nested_parse(StringList(list(lines), source=source), self.content_offset, place)
        return place.children

    def table(self, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[nodes.Node]:
        """Make a table of Markdown cells."""
        lines = [row_text(head), row_text(tuple("---" for _ in head))]
        return self.parsed(*lines, *map(row_text, rows))


def row_text(cells: tuple[str, ...]) -> str:
    """Write a row of a Markdown table; a bar inside a formula would end its cell."""
    plain = (cell.replace(r"\|", r"\Vert ").replace("|", r"\vert ") for cell in cells)
    return "| " + " | ".join(plain) + " |"


def difference_text(entry: dict[str, Any]) -> str:
    """Say how large the largest difference is."""
    return f"{entry['difference']:.0e}" if entry["difference"] > 0 else "0"


def implementation_text(entry: dict[str, Any]) -> str:
    """Link to what implements an equation."""
    return ", ".join(f"{{py:obj}}`~{name}`" for name in entry["implementations"])


def source_text(entry: dict[str, Any]) -> str:
    """Cite the paper that an equation comes from."""
    if not entry["source"]:
        return ""
    at = f", {entry['at']}" if entry["at"] else ""
    return f"{{cite:t}}`{entry['source']}`{at}"


class ShowEquation(EquationDirective):
    """Print an equation and what its check found."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"repeat": directives.flag}

    def run(self) -> list[nodes.Node]:
        """Find the equation and print it."""
        name = self.arguments[0].strip()
        note_use(self.env, "equation", name)
        entry = CHECKS.checked.get(name)
        if entry is None:
            known = list(CHECKS.checked)
            message = f"no equation is labeled {name!r}; {nearest(name, known)}"
            logger.warning(message, location=self.get_location(), type="equation")
            return []
        shown = nodes.math_block(
            entry["latex"],
            entry["latex"],
            nowrap=False,
            number=None,
            docname=self.env.docname,
            label=None,
            checked=True,
        )
        shown["no-wrap"] = False
        self.set_source_info(shown)
        if "repeat" in self.options:
            link = self.parsed(f"Checked, with its symbols, as {{eq}}`{PREFIX}{name}`.")
            return [shown, nodes.container("", *link, classes=["equation-note"])]
        target = self.number(shown, name, entry["title"])
        return [target, shown, self.note(entry)]

    def number(self, shown: nodes.math_block, name: str, title: str) -> nodes.target:
        """Give the equation its number and make it a target of `{eq}` and of `{ref}`."""
        label = PREFIX + name
        domain = self.env.domains.math_domain
        domain.note_equation(self.env.docname, label, location=shown)
        shown["label"] = label
        shown["number"] = domain.get_equation_number_for(label)
        target = nodes.target("", "", ids=[make_id_of(label)])
        self.state.document.note_explicit_target(target)
        standard = self.env.domains.standard_domain
        standard.labels[TITLE_PREFIX + name] = (self.env.docname, make_id_of(label), title)
        standard.anonlabels[TITLE_PREFIX + name] = (self.env.docname, make_id_of(label))
        return target

    def note(self, entry: dict[str, Any]) -> nodes.container:
        """Say below the equation how it was checked, where it is from, what its symbols mean."""
        sentences = [
            f"Checked against {implementation_text(entry)}: {entry['inputs']:,} random inputs,",
            f"largest difference {difference_text(entry)}.",
            entry["note"],
            f"Source: {source_text(entry)}." if entry["source"] else "",
        ]
        rows = [(f"${symbol['latex']}$", symbol["meaning"]) for symbol in entry["symbols"]]
        return nodes.container(
            "",
            *self.parsed(" ".join(filter(None, sentences))),
            nodes.raw("", "<details><summary>Symbols</summary>", format="html"),
            *self.table(("symbol", "meaning"), rows),
            nodes.raw("", "</details>", format="html"),
            *self.play(entry),
            classes=["equation-note"],
        )

    def play(self, entry: dict[str, Any]) -> list[nodes.Node]:
        """Make a slider for each number that can be moved; equation-play.js shows and runs them."""
        sliders = entry["play"]["sliders"]
        if not sliders:
            return []
        data = {**entry["play"], "sliders": [[s["name"], s["places"]] for s in sliders]}
        data["simplex"] = [s["name"] for s in sliders if s["sums_to_one"]]
        text = escape(json.dumps(data, separators=(",", ":")))
        title = escape(entry["title"])
        rows = [(f"${s['latex']}$", slider_html(s)) for s in sliders]
        return [
            nodes.raw(
                "",
                f'<details class="equation-play" hidden data-play="{text}" data-title="{title}">'
                '<summary>Move it</summary><div class="equation-curve"></div>',
                format="html",
            ),
            *self.table(("symbol", "value"), rows),
            nodes.raw("", "</details>", format="html"),
        ]


def slider_html(slider: dict[str, Any]) -> str:
    """Write a slider's input, named by what its symbol means."""
    name = escape(re.sub(r"[$`\\{}|]", "", slider["meaning"]))
    place = f", entry {', '.join(str(p + 1) for p in slider['places'])}" if slider["places"] else ""
    return (
        f'<input type="range" aria-label="{name}{place}" min="{slider["low"]:g}" '
        f'max="{slider["high"]:g}" step="{slider["step"]:g}"><output></output>'
    )


def load_player(app: Sphinx, page: str, template: str, context: Any, doctree: Any) -> None:
    """Give a page that has sliders the script that runs them."""
    raws = doctree.findall(nodes.raw) if doctree is not None else ()
    if any('class="equation-play"' in raw.astext() for raw in raws):
        app.add_js_file(None, body=CHECKS.runtime, priority=700)
        app.add_js_file("equation-play.js", loading_method="defer", priority=710)


def make_id_of(label: str) -> str:
    """Return the HTML id that Sphinx's `{eq}` links to."""
    return nodes.make_id(f"equation-{label}")


class EquationTable(EquationDirective):
    """List all equations and how each was checked."""

    def run(self) -> list[nodes.Node]:
        """Make both tables."""
        note_use(self.env, "equations", "")
        checked, unchecked = CHECKS.checked, CHECKS.unchecked
        rows = [
            (
                f"{{eq}}`{PREFIX}{name}`",
                f"{{ref}}`{TITLE_PREFIX}{name}`",
                implementation_text(entry),
                f"{entry['inputs']:,}",
                difference_text(entry),
                source_text(entry),
            )
            for name, entry in checked.items()
        ]
        head = ("", "equation", "checked against", "inputs", "largest difference", "source")
        content = self.parsed(f"{len(checked)} displayed equations are checked.")
        content += self.table(head, rows)
        if not unchecked:
            content += self.parsed("No displayed equation is left unchecked.")
        else:
            content += self.parsed(
                f"{len(unchecked)} are not, because there is nothing to compute:"
            )
            rows = [(f"{{eq}}`{label}`", why) for label, why in unchecked.items()]
            content += self.table(("", "why"), rows)
        return content


class NotationTable(EquationDirective):
    """List all symbols that equations use."""

    def run(self) -> list[nodes.Node]:
        """Make the table."""
        note_use(self.env, "equations", "")
        symbols = {
            (symbol["latex"], symbol["meaning"]): None
            for entry in CHECKS.checked.values()
            for symbol in entry["symbols"]
        }
        return self.table(("symbol", "meaning"), [(f"${latex}$", what) for latex, what in symbols])


# ---- links back, and equations that nobody checks ---------------------------------------------


def link_back(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Append to an API entry the equations that it implements."""
    note_use(app.env, "implementation", name)
    entries = CHECKS.implemented_by(name)
    if entries:
        links = ", ".join(f":ref:`{title} <{TITLE_PREFIX}{label}>`" for label, title in entries)
        lines += ["", f"Checked equations: {links}.", ""]


def is_output(node: nodes.Element) -> bool:
    """Say whether a formula was printed by a notebook's cell."""
    while node.parent is not None:
        node = node.parent
        if "cell_output" in node.attributes.get("classes", []):
            return True
    return False


def refuse_unchecked(app: Sphinx, doctree: nodes.document) -> None:
    """Warn of a displayed equation that is neither checked nor listed with a reason."""
    docname = app.env.docname
    if docname.startswith(UNCHECKED_PAGES):
        return
    reasons = CHECKS.unchecked
    for shown in doctree.findall(nodes.math_block):
        if shown.get("checked") or shown.get("label") in reasons or is_output(shown):
            continue
        note_use(app.env, "equations", "")
        label = shown.get("label")
        named = f"the equation {label!r}" if label else "a displayed equation without a label"
        message = (
            f"{named} is not checked; make it an Equation and show it with {{equation}}, or give "
            "its label an entry in UNCHECKED that says why it cannot be checked"
        )
        logger.warning(message, location=shown, type="equation", subtype="unchecked")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.setup_extension("page_uses")
    app.setup_extension("sphinx.ext.autodoc")
    offer("equation", lambda name: CHECKS.checked.get(name))
    offer("equations", lambda name: [CHECKS.checked, CHECKS.unchecked])
    offer("implementation", CHECKS.implemented_by)
    app.connect("builder-inited", start_checks, priority=850)
    app.connect("builder-inited", finish_checks, priority=950)
    app.connect("autodoc-process-docstring", link_back, priority=400)
    app.connect("doctree-read", refuse_unchecked)
    app.connect("html-page-context", load_player)
    app.add_config_value("equation_chapters", {}, "env", types=(dict,))
    app.add_domain(NumberedByChapter, override=True)
    app.add_directive("equation", ShowEquation)
    app.add_directive("equation-table", EquationTable)
    app.add_directive("notation-table", NotationTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
