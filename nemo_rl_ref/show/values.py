# SPDX-License-Identifier: Apache-2.0
"""Numbers that a notebook hands to the pages of the site."""

from __future__ import annotations

import re
import sys

VALUES_MIME = "application/vnd.nemo-rl-ref.values+json"


def values(**named: str | int) -> None:
    """Store values under names, so that pages can print them with the role ``{num}``.

    ``values(dpo_max_diff=f"{difference:.1e}")`` in a notebook is ``{num}`dpo-max-diff``` in a
    page: an underscore in the argument's name is a hyphen in the value's. In a notebook the
    values are shown below the cell; in a plain script they are printed.

    Args:
        **named: the values as they are to be printed. A number that is no integer must be
            formatted first, because nobody else knows how many of its digits mean something.

    Raises:
        TypeError: a value is neither a string nor an integer.
        ValueError: no value is given, one is empty or spans several lines, or a name is not
            made of lower-case words and digits joined by underscores.
    """
    if not named:
        raise ValueError("values() needs at least one value, like loss=f'{loss:.3f}'")
    texts = {}
    for argument, value in named.items():
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", argument):
            raise ValueError(
                f"name {argument!r} should be lower-case words and digits joined by '_', "
                "like dpo_max_diff"
            )
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise TypeError(
                f"{argument} should be a string or an integer, got {type(value).__name__} "
                f"{value!r}; format it, like {argument}=f'{{...:.3g}}'"
            )
        text = str(value)
        if not text.strip() or "\n" in text:
            raise ValueError(f"{argument} should be one line of text, got {text!r}")
        texts[argument.replace("_", "-")] = text
    show(texts)


def show(texts: dict[str, str]) -> None:
    """Display values in a notebook, print them anywhere else."""
    width = max(map(len, texts))
    lines = "\n".join(f"{name:<{width}}  {text}" for name, text in texts.items())
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        print(lines)
        return
    from IPython.display import display

    display({VALUES_MIME: texts, "text/plain": lines}, raw=True)
