# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. Build with `make html`."""

import importlib
import sys
from html import escape
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "docs" / "_ext"), str(HERE)]

project = "NeMo RL: algorithm development"
author = "The authors of this repository"
copyright = "the authors, Apache-2.0"
root_doc = "index"

extensions = [
    # our own, in docs/_ext
    "one_build",
    "page_paths",
    "notebook_pages",
    "embed",
    "nemo_rl_roles",
    "source_checks",
    "copy_loss",
    "equations",
    "key_table",
    "glossary_links",
    "section_search",
    "repository_links",
    "light_pages",
    "typeset_math",
    # others
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.bibtex",
]

# Sources are found by docs/_ext/page_paths.py in docs/ and notebooks/ alone.
exclude_patterns = ["_build"]

# Formulas are typeset by docs/_ext/typeset_math.py.
html_math_renderer = "typeset"
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!nemo_rl_ref).*"),  # other projects' classes
    ("py:.*", r"nemo_rl_ref\..*\.(T|DictT|Settings)"),  # type variables
    ("py:.*", r"nemo_rl_ref\.(config\.sections|memory)\.(Annotated|_\w+)"),  # fields of settings
]
default_role = "literal"  # single backquotes in docstrings are code
suppress_warnings = ["design.card_legacy"]

# Notebooks are executed by docs/_ext/execution.py before any page is read. MyST-NB is given
# executed copies (.ipynb text under the name of the .py file) and must not execute.
nb_execution_mode = "off"
nb_custom_formats = {".py": ["nbformat.reads", {"as_version": 4}]}
nb_merge_streams = True
nb_render_markdown_format = "myst"  # Markdown outputs may hold tables and formulas

myst_enable_extensions = [
    "amsmath",
    "attrs_block",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
    "fieldlist",
    "smartquotes",
    "tasklist",
]
myst_heading_anchors = 4
myst_dmath_double_inline = True

add_module_names = False
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {
    "members": True,
    "special-members": "__call__",
    "exclude-members": "model_config",
    "show-inheritance": True,
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

copybutton_prompt_text = r">>> |\.\.\. |\$ |In \[\d*\]: | {2,5}\.\.\.: | {5,8}: "
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = "\\"

# Equations are numbered (3.1), (3.2), … on these pages, docs/_ext/equations.py.
THEORY = "advanced/algorithm-development/mathematical-foundations"
equation_chapters = {
    THEORY: "1",
    f"{THEORY}/policy-gradient": "2",
    f"{THEORY}/preferences": "3",
    f"{THEORY}/ppo": "4",
    f"{THEORY}/grpo": "5",
    f"{THEORY}/kl-and-distillation": "6",
    f"{THEORY}/scaling": "7",
    "advanced/algorithm-development/custom-dpo": "8",
    "core-design/design-principles/loss-functions": "9",
    "advanced/performance/fused-kernels": "10",
}

bibtex_bibfiles = ["docs/references.bib"]
bibtex_reference_style = "author_year"
bibtex_default_style = "plain"

html_theme = "pydata_sphinx_theme"
html_title = project
templates_path = ["docs/_templates"]
html_static_path = ["docs/_static"]
html_css_files = ["custom.css"]
html_favicon = "docs/_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_sidebars = {"get-started": []}  # one page, which has no section to show
html_theme_options = {
    "logo": {"text": project},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "primary_sidebar_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["repository"],
    "show_prev_next": True,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


# The order in which "next" leads through the guides. The seed of the site has a tree of its own.
READING_ORDER = (
    "index",
    "get-started",
    "advanced/algorithm-development/index",
    "core-design/design-principles/loss-functions",
    "advanced/algorithm-development/data-to-batch",
    "advanced/algorithm-development/custom-dpo",
    "advanced/algorithm-development/preference-data",
    "advanced/algorithm-development/custom-grpo",
    "advanced/algorithm-development/hyperparameter-optimization",
    "advanced/algorithm-development/mathematical-foundations",
    *(
        f"advanced/algorithm-development/mathematical-foundations/{chapter}"
        for chapter in (
            "policy-gradient", "preferences", "ppo", "grpo", "kl-and-distillation", "scaling",
        )
    ),
    "advanced/performance/fused-kernels",
    "reference/index",
)  # fmt: skip


def follow_reading_order(app, page, template, context, doctree):
    """Let "previous" and "next" lead through the guides in READING_ORDER."""
    if page not in READING_ORDER or not app.env.found_docs.issuperset(READING_ORDER):
        return  # not one of them, or a part of the site is built
    place = READING_ORDER.index(page)
    for key, other in (("prev", place - 1), ("next", place + 1)):
        if 0 <= other < len(READING_ORDER):
            name = READING_ORDER[other]
            title = escape(app.env.titles[name].astext())
            context[key] = {"link": app.builder.get_relative_uri(page, name), "title": title}
        elif key == "prev":
            context[key] = None


def import_package(app, env, docnames):
    """Import what holds pydantic classes before autodoc does.

    Autodoc turns `typing.TYPE_CHECKING` on, and a class that is imported then fails.
    """
    if any(name.startswith("reference/api/") for name in docnames):
        for module in ("algorithms.grpo", "algorithms.ppo", "rl.settings", "memory", "tune.space"):
            importlib.import_module(f"nemo_rl_ref.{module}")


def find_source(app, module):
    """Read a module's source from disk; viewcode alone would import torch in every build."""
    path = HERE.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            return text, ModuleAnalyzer.for_string(text, module).find_tags()
    return None


def describe(app, page, template, context, doctree):
    """Write the description in a page's front matter for search engines."""
    text = app.env.metadata.get(page, {}).get("description")
    if text:
        context["metatags"] += f'<meta name="description" content="{escape(text)}" />\n'


def setup(app):
    """Register the handlers above."""
    app.connect("env-before-read-docs", import_package)
    app.connect("viewcode-find-source", find_source)
    app.connect("html-page-context", describe)
    app.connect("html-page-context", follow_reading_order, priority=900)
