# SPDX-License-Identifier: Apache-2.0
"""Every configuration key that a page names is one of NeMo RL's."""

import re
from pathlib import Path

import pytest

from nemo_rl_ref.upstream import load_keys

DOCS = Path(__file__).parents[2] / "docs"
KEYS = load_keys()
KNOWN, OPEN = set(KEYS["keys"]), set(KEYS["open"])
SECTIONS = {key for key in KNOWN if any(other.startswith(f"{key}.") for other in KNOWN)}
TOP = sorted({key.split(".")[0] for key in SECTIONS} - {"_teachers"})
#: Keys in text: `loss_fn.ratio_clip_c`, also with a value behind, `loss_fn.use_cispo: true`.
KEY = re.compile(rf"`((?:{'|'.join(TOP)})\.(?!yaml`)[a-z_0-9.]+)(?:[:=][^`]*)?`")
PAGES = sorted(path for path in DOCS.rglob("*.md") if "reference" not in path.parts)


def is_known(key):
    """Say whether NeMo RL has a key, or takes any key where it stands."""
    parts = key.split(".")
    above = {".".join(parts[:count]) for count in range(1, len(parts))}
    return key in KNOWN or bool(above & OPEN)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_a_page_names_real_keys(page):
    text = page.read_text(encoding="utf-8")
    assert sorted({key for key in KEY.findall(text) if not is_known(key)}) == []


def test_keys_are_found_in_text_and_a_misspelt_one_is_not_known():
    found = KEY.findall("with `loss_fn.ratio_clip_c` or `loss_fn.use_cispo: true`, `grpo.nonsense`")
    assert found == ["loss_fn.ratio_clip_c", "loss_fn.use_cispo", "grpo.nonsense"]
    assert [is_known(key) for key in found] == [True, True, False]
