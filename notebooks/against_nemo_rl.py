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
# # Against NeMo RL: what was recorded
#
# The cells behind the page [Against NeMo RL](../docs/reference/against-nemo-rl.md). They read what
# `make referee` has written.

# %%
#| label: referee
#| num: referee-variants = {len(variants)}
#| num: referee-commit = {recorded["nemo_rl"][:9]}
#| num: referee-steps = {sum(found["steps"] for found in variants.values())}
#| num: referee-batches = {sum(found["batches"] for found in variants.values())}
#| num: referee-worst = {worst("train"):.1e}
#| num: referee-worst-validation = {worst("validation"):.1e}
#| num: referee-worst-columns = {worst("batch columns"):.1e}
#| num: referee-bound = {recorded["bound"]:.0e}
#| num: referee-date = {max(found["date"] for found in variants.values())}
#| num: referee-versions = {", ".join(f"{name} {version}" for name, version in versions.items())}
import json
from pathlib import Path

from IPython.display import Markdown

import nemo_rl_ref

path = Path(nemo_rl_ref.__file__).parents[1] / "benchmarks/results/referee.json"
recorded = json.loads(path.read_text(encoding="utf-8"))
variants = recorded["variants"]
versions = list(variants.values())[-1]["versions"]
assert not any(found["unexplained"] for found in variants.values())


def worst(kind):
    """The largest difference of a kind in any variant."""
    return max(found["largest"].get(kind, 0.0) for found in variants.values())


# %%
#| label: referee-table
KINDS = ("batch columns", "train", "learning rate", "validation")
rows = ["| variant | steps | tokens, masks | " + " | ".join(KINDS) + " | checkpoints kept |"]
rows.append("| --- | ---: | --- |" + " ---: |" * len(KINDS) + " --- |")
for name, found in variants.items():
    largest = [found["largest"].get(kind) for kind in KINDS]
    shown = ["" if value is None else f"{value:.1e}" if value else "0" for value in largest]
    kept = ", ".join(map(str, found["checkpoints"]))
    rows.append(f"| {name} | {found['steps']} | equal | {' | '.join(shown)} | {kept} |")
Markdown("\n".join(rows))

# %%
#| label: referee-names
rows = ["| logged by one side alone | NeMo RL | here |", "| --- | --- | --- |"]
for algorithm in dict.fromkeys(name.partition(":")[0] for name in variants):
    of = [found["names"] for name, found in variants.items() if name.partition(":")[0] == algorithm]
    cells = [sorted({name for names in of for name in names[side]}) for side in ("nemo_rl", "here")]
    text = " | ".join(", ".join(f"`{name}`" for name in names) or "none" for names in cells)
    rows.append(f"| {algorithm} | {text} |")
Markdown("\n".join(rows))

# %%
#| label: referee-units
#| num: referee-unit-files = {len(units)}
#| num: referee-unit-passed = {sum(found["passed"] for found in units.values()):,}
#| num: referee-unit-failed = {sum(len(found["failed"]) for found in units.values())}
units = recorded["unit_tests"]


def reasons(found):
    """Why tests of a file are not applicable, the most frequent reasons first."""
    ordered = sorted(found["not applicable"].items(), key=lambda item: -item[1])
    shown = [f"{count} × {reason.removeprefix('not mirrored: ')}" for reason, count in ordered[:4]]
    rest = sum(count for _, count in ordered[4:])
    return "; ".join(shown + [f"{rest} × others"] * bool(rest))


# %%
#| label: referee-units-table
rows = ["| file | passed | failed | not applicable | for want of |"]
rows.append("| --- | ---: | ---: | ---: | --- |")
for name, found in units.items():
    if found["passed"]:
        skipped = sum(found["not applicable"].values())
        why = reasons(found).replace("|", "\\|")
        failed = len(found["failed"])
        rows.append(f"| `{name}` | {found['passed']} | {failed} | {skipped} | {why} |")
Markdown("\n".join(rows))

# %%
#| label: referee-units-failed
rows = ["| test | what it found |", "| --- | --- |"]
for name, found in units.items():
    for test, message in found["failed"].items() if found["passed"] else ():
        text = message.replace("|", "\\|").replace("`", "'")
        rows.append(f"| `{name}::{test}` | `{text}` |")
Markdown("\n".join(rows))

# %%
#| label: referee-units-none
#| num: referee-unit-none = {len(none)}
none = {name: found for name, found in units.items() if not found["passed"]}
rows = ["| file | tests | for want of |", "| --- | ---: | --- |"]
for name, found in none.items():
    tests = sum(found["not applicable"].values()) + len(found["failed"])
    why = reasons(found) or next(iter(found["failed"].values()), "")[:80]
    text = why.replace("|", "\\|").replace("`", "'")
    rows.append(f"| `{name}` | {tests} | {text} |")
Markdown("\n".join(rows))
