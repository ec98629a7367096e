# SPDX-License-Identifier: Apache-2.0
"""Configuration keys in a page: `{key}` links to NeMo RL's line, and refuses what is not there."""

import json
import re
import shutil

import pytest
from small_site import TOP

FACTS = TOP / "nemo_rl_ref" / "upstream"
COMMIT = json.loads((FACTS / "places.json").read_text())["commit"]
PLACES = json.loads((FACTS / "places.json").read_text())
KEYS = json.loads((FACTS / "keys.json").read_text())


@pytest.fixture
def page(site):
    """Builds a site of one page with the project's own keys."""
    (site.top / "nemo_rl_ref/upstream").mkdir()
    for name in ("keys.json", "places.json"):
        shutil.copy(FACTS / name, site.top / "nemo_rl_ref/upstream")

    def build(text):
        site.write("docs/index.md", f"# Home\n\n{text}\n")
        return site.build()

    return build


def test_keys_are_links_to_their_lines(page):
    result = page(
        "{key}`policy.optimizer.kwargs.lr`, {key}`dpo.seed=1`, "
        "{key}`++policy.scheduler.0.kwargs.any`"
    )
    assert result.code == 0, result.text
    links = result.page("index.html").select("article a:has(code.config-key)")
    found = [
        (a.get_text(), *re.fullmatch(r".*/blob/(\w+)/(.*)#L(\d+)", a["href"]).groups())
        for a in links
    ]
    dpo = "examples/configs/dpo.yaml"
    assert found == [
        ("policy.optimizer.kwargs.lr", COMMIT, dpo, "103"),
        ("dpo.seed=1", COMMIT, dpo, "11"),
        # any key is legal below, so the section is linked
        ("++policy.scheduler.0.kwargs.any", COMMIT, dpo, "114"),
    ]
    assert links[1]["title"] == f"NeMo RL, {dpo}, line 11"


def test_an_unknown_key_fails_the_build(page):
    unknown = ("dpo.reference_kl_penalty", "xyzzy", "not a key")
    result = page("\n\n".join(f"Here is {{key}}`{key}`." for key in unknown))
    assert result.code != 0
    for line, key in zip((3, 5, 7), unknown, strict=True):
        message = f"docs/index.md:{line}: WARNING: NeMo RL has no configuration key {key!r}"
        assert message in result.text
    assert "did you mean 'dpo.reference_policy_kl_penalty'?" in result.text
    assert "key 'xyzzy' [config" in result.text  # nothing is near


def test_every_place_is_of_a_key_and_of_one_commit():
    assert KEYS["commit"] == COMMIT
    assert sorted(set(PLACES["places"]) - set(KEYS["keys"])) == []
    assert {number for number, _ in PLACES["places"].values()} == set(range(len(PLACES["files"])))
    assert all(line >= 1 for _, line in PLACES["places"].values())
