# SPDX-License-Identifier: Apache-2.0
"""Pages that load only what they use.

The theme's stylesheet holds Bootstrap and 2,000 icons, and each page would load it whole. When the
site is built, the rules go whose classes are on no page and in no script. The icons that are left
become masks, drawn with the paths of the theme's own icons, so that neither its 1.5 MB script nor
its fonts are loaded. The template layout.html leaves out scripts with `without_scripts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from execution import write_atomically
from markupsafe import Markup
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

THEME = "styles/pydata-sphinx-theme.css"
#: Stylesheets, in `_static`, of which a site uses a part. Sphinx copies them at each build.
LARGE = (THEME, "sphinx-design.min.css")
#: An icon in the theme's script: its name, size, other names, code point, path.
ICON = re.compile(
    r'[{,]"?([\w-]+)"?:\[(\d+),(\d+),\[([^\]]*)\],"([0-9a-f]+)",(?:"([^"]+)"|\["[^"]*","([^"]+)"\])\]'
)
#: How an icon is drawn: of an element, and of what the theme draws with a character of its font.
DRAWN = (
    ".fa-solid",
    ".admonition>.admonition-title:after",
    "li.breadcrumb-item:not(.breadcrumb-home):before",
    "nav.bd-links li>a.reference.external:after",
    ".nav-link.nav-external:after",
    "a.reference.download:before",
    "span.versionmodified:before",
    "div#searchbox p.highlight-link a:before",
)
MASK = (
    '{background:currentColor;content:""!important;display:inline-block;height:1em;width:1em;'
    "-webkit-mask:var(--icon) center/contain no-repeat;mask:var(--icon) center/contain no-repeat;"
    "vertical-align:-.125em}"
)
MORE_RULES = """
.fa-lg{font-size:1.25em}
.fa-fw{width:1.25em}
.admonition>.admonition-title:after{--icon:var(--pst-icon-admonition-default)}
li.breadcrumb-item:before{--icon:var(--pst-breadcrumb-divider)}
a.reference.external:after,.nav-link.nav-external:after{--icon:var(--pst-icon-external-link)}
a.reference.download:before{--icon:var(--pst-icon-download);margin:0 .25em;padding:0}
span.versionmodified:before{--icon:var(--pst-icon-versionmodified-default)}
div#searchbox p.highlight-link a:before{--icon:var(--pst-icon-search-minus)}
html[data-mode=auto] .theme-switch-button .theme-switch[data-mode=auto],\
html[data-mode=dark] .theme-switch-button .theme-switch[data-mode=dark],\
html[data-mode=light] .theme-switch-button .theme-switch[data-mode=light]{display:inline-block}
"""
KINDS = ("attention", "caution", "warning", "danger", "error", "hint", "tip", "important", "note")
CLASS = re.compile(r"\.(-?[A-Za-z_][\w-]*)")


def without_scripts(html: str, *names: str) -> Markup:
    """Leave out of a page's head the scripts of these names."""
    pattern = rf"<script[^>]*[/\"](?:{'|'.join(map(re.escape, names))})\.js[^>]*></script>\s*"
    return Markup(re.sub(pattern, "", html))


def words_in_use(html: Path) -> set[str]:
    """Collect the classes on all pages and all words of the scripts, which may set classes."""
    words: set[str] = set()
    for page in html.rglob("*.html"):
        for names in set(re.findall(r'class="([^"]*)"', page.read_text(encoding="utf-8"))):
            words.update(names.split())
    for script in html.joinpath("_static").rglob("*.js"):
        if script.name == "fontawesome.js":
            continue
        words.update(re.findall(r"[\w-]+", script.read_text(encoding="utf-8")))
    return words


def used_rules(css: str, used: set[str]) -> str:
    """Leave out of a stylesheet the rules that need a class which is not used.

    A class inside `:not()` or `:is()` is not needed for a rule to apply.
    """
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)

    def keep(rule: re.Match[str]) -> str:
        selectors, body = rule.groups()
        if selectors.lstrip().startswith("@"):
            return "" if "Font Awesome" in body.replace("\\", "") else rule[0]
        # A comma inside parentheses separates no rules.
        kept = [
            selector
            for selector in re.split(r",(?![^(]*\))", selectors)
            if used.issuperset(CLASS.findall(re.sub(r":(?:not|is|where)\([^)]*\)", "", selector)))
        ]
        return f"{','.join(kept)}{{{body}}}" if kept else ""

    css = re.sub(r"([^{};]+)\{([^{}]*)\}", keep, css)
    return re.sub(r"@(?:media|supports)[^{};]*\{\s*\}", "", css)


def icons(script: str) -> dict[str, str]:
    """Read the theme's icons.

    Returns:
        The CSS image of each, by name and by code point (`f0eb`). Of an icon in several styles it
        is the solid one, which the script holds last.
    """
    found = {}
    for name, width, height, others, code, path, second in ICON.findall(script):
        svg = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}'>"
        image = f"{svg}<path d='{path or second}'/></svg>".replace("<", "%3C").replace(">", "%3E")
        for key in (name, code, *re.findall(r'"([\w-]+)"', others)):
            found[key] = f'url("data:image/svg+xml,{image}")'
    return found


def draw_icons(css: str, known: dict[str, str], used: set[str]) -> str:
    """Let the theme's stylesheet draw icons as masks, in the color of the text around them."""

    def image(variable: re.Match[str]) -> str:
        return f"{variable[1]}:{known.get(f'{ord(variable[2]):x}', 'none')}"

    css = re.sub(r'(--pst-(?:icon-[a-z-]*|breadcrumb-divider)):"([^"])"', image, css)
    rules = [css, ",".join(DRAWN) + MASK, MORE_RULES]
    rules += [
        f".admonition.{kind}>.admonition-title:after{{--icon:var(--pst-icon-admonition-{kind})}}"
        for kind in KINDS
    ]
    names = sorted(name.removeprefix("fa-") for name in used if name.startswith("fa-"))
    rules += [f".fa-{name}{{--icon:{known[name]}}}" for name in names if name in known]
    return "\n".join(rules)


def shrink_stylesheets(app: Sphinx, error: Exception | None) -> None:
    """Write the large stylesheets without the rules that no page uses."""
    if error is not None or app.builder.format != "html":
        return
    html = Path(app.outdir)
    used = words_in_use(html)
    files: Iterable[Path] = (path for name in LARGE for path in html.joinpath("_static").glob(name))
    for path in files:
        css = used_rules(path.read_text(encoding="utf-8"), used)
        if path == html / "_static" / THEME:
            script = html.joinpath("_static/scripts/fontawesome.js").read_text(encoding="utf-8")
            css = draw_icons(css, icons(script), used)
        write_atomically(path, css.encode())


def offer_to_template(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Let templates leave scripts out."""
    context["without_scripts"] = without_scripts


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the extension."""
    app.connect("html-page-context", offer_to_template)
    app.connect("build-finished", shrink_stylesheets)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
