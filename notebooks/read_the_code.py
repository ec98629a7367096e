# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Read the code in an afternoon: the list
#
# The cells behind the page [Read the Code](../docs/reference/read-the-code.md).

# %%
#| label: core-files
#| num: core-files = {len(core)}
#| num: core-lines = {sum(lines.values()):,}
#| num: package-lines = {sum(map(line_count, package.rglob("*.py"))):,}
import ast
from pathlib import Path

from IPython.display import Markdown

import nemo_rl_ref

package = Path(nemo_rl_ref.__file__).parent
ORDER = {
    "The losses": "algorithms/loss: interfaces _nll _preference _policy_gradient"
    " _clipped_pg_terms _clipped_pg",
    "Advantages": "algorithms: utils _group_advantages grpo",
    "Data": "data: processors llm_message_utils collate_fn",
    "A batch": "distributed: batched_data_dict",
    "Training": "training: samples step supervised loop reference",
    "Reinforcement learning": "rl: rollouts generate trainer",
    "What a person starts": ": run_sft run_dpo run_rm run_grpo",
}


def files_of(text):
    """The paths in "folder: name name, folder: name"."""
    for part in text.split(", "):
        folder, names = part.split(":")
        yield from (Path(folder) / f"{name}.py" for name in names.split())


def line_count(path):
    """Number of lines of a file of the package."""
    return len((package / path).read_text(encoding="utf-8").splitlines())


def first_line(path):
    """What a file is, from its docstring."""
    docstring = ast.get_docstring(ast.parse((package / path).read_text(encoding="utf-8")))
    return docstring.splitlines()[0].removesuffix(" ::")


core = {path: part for part, text in ORDER.items() for path in files_of(text)}
lines = {path: line_count(path) for path in core}

# %%
#| label: core-list
rows = ["| file | what it is | lines |", "| --- | --- | ---: |"]
part_before = None
for path, part in core.items():
    if part != part_before:
        folder = "" if path.parent == Path() else f"`{path.parent.as_posix()}/`"
        rows.append(f"| **{part}** | {folder} | |")
        part_before = part
    rows.append(f"| `{path.name}` | {first_line(path)} | {lines[path]} |")
Markdown("\n".join(rows))
