# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. Build with `make html`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "docs" / "_ext"), str(HERE)]

project = "NeMo RL: algorithm development"
author = "The authors of this repository"
copyright = "the authors, Apache-2.0"
root_doc = "index"

extensions = [
    # our own, in docs/_ext
    "page_paths",
    "strict_builds",
    "front_matter",
    "local_mathjax",
    "notebook_pages",
    "embed",
    "stored_values",
    "config_links",
    "equations",
    "glossary_links",
    # others
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "module_sources",
    "package_first",
    "sphinxcontrib.bibtex",
]

# Sources are found by docs/_ext/page_paths.py in docs/ and notebooks/ alone.
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!nemo_rl_ref).*"),  # other projects' classes
    ("py:.*", r"nemo_rl_ref\..*\.(T|DictT)"),  # type variables
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
html_static_path = ["docs/_static"]
html_css_files = ["custom.css"]
html_favicon = "docs/_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": project},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "primary_sidebar_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
