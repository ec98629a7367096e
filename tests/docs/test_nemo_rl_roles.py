# SPDX-License-Identifier: Apache-2.0
"""NeMo RL's names in a page: roles link to its lines, and refuse what is not there."""

import json
import re
import shutil

import pytest
from nemo_rl_facts import FILES, READERS, Facts
from small_site import TOP

FOLDER = TOP / "nemo_rl_ref" / "upstream"
FACTS = Facts(FOLDER)
PLACES = json.loads((FOLDER / "places.json").read_text())


@pytest.fixture
def page(site, monkeypatch):
    """Builds a site of one page with the project's own facts about NeMo RL."""
    (site.top / "nemo_rl_ref/upstream").mkdir()
    for name in (*FILES, READERS):
        shutil.copy(FOLDER / name, site.top / "nemo_rl_ref/upstream")
    conf = site.top / "conf.py"  # the checks of the whole project's sources have no project here
    conf.write_text(conf.read_text().replace('    "source_checks",\n', ""))

    def build(text):
        site.write("docs/index.md", f"# Home\n\n{text}\n")
        return site.build()

    return build


def links_of(result):
    assert result.code == 0, result.text
    return [
        (a.get_text(), *re.fullmatch(r".*/blob/(\w+)/([^#]*)#?L?(\d*)", a["href"]).groups())
        for a in result.page("index.html").select("article a:has(code)")
    ]


def test_keys_are_links_to_their_lines_in_a_role_and_in_plain_backquotes(page):
    result = page(
        "{nemo:key}`policy.optimizer.kwargs.lr`, {nemo:key}`dpo.seed=1`, "
        "{nemo:key}`++policy.scheduler.0.kwargs.any`, `dpo.seed: 2`"
    )
    dpo = "examples/configs/dpo.yaml"
    assert links_of(result) == [
        ("policy.optimizer.kwargs.lr", FACTS.commit, dpo, "103"),
        ("dpo.seed=1", FACTS.commit, dpo, "11"),
        # any key is legal below, so the section is linked
        ("++policy.scheduler.0.kwargs.any", FACTS.commit, dpo, "114"),
        ("dpo.seed: 2", FACTS.commit, dpo, "11"),
    ]
    hover = result.page("index.html").select("article a:has(code)")[1]["title"]
    assert hover == f"NeMo RL, {dpo}, line 11; type int; default 42; set in dpo.yaml: 42"


def test_symbols_scripts_lines_and_defaults_are_links(page):
    result = page(
        "{nemo}`~algorithms.loss.DPOLossFn`, {nemo}`algorithms.dpo`, {nemo:script}`dpo.yaml`, "
        "{nemo:script}`examples/run_dpo.py`, {nemo:line}`nemo_rl/algorithms/dpo.py:401`, "
        "{nemo:default}`dpo.reference_policy_kl_penalty`, "
        "{nemo:default}`policy.optimizer.kwargs.lr in grpo_math_8B.yaml`"
    )
    loss, dpo = "nemo_rl/algorithms/loss/loss_functions.py", "nemo_rl/algorithms/dpo.py"
    line = str(FACTS.symbol("algorithms.loss.DPOLossFn").line)
    expected = [
        ("DPOLossFn", loss, line),
        ("algorithms.dpo", dpo, ""),
        ("dpo.yaml", "examples/configs/dpo.yaml", ""),
        ("examples/run_dpo.py", "examples/run_dpo.py", ""),
        ("nemo_rl/algorithms/dpo.py:401", dpo, "401"),
        ("0.05", "examples/configs/dpo.yaml", "13"),
        ("3e-07", "examples/configs/grpo_math_8B.yaml", ""),
    ]
    assert [(text, *place) for text, _, *place in links_of(result)] == expected


def test_an_unknown_name_fails_the_build(page):
    unknown = {
        "{nemo:key}`dpo.reference_kl_penalty`": "no configuration key 'dpo.reference_kl_penalty'; "
        "did you mean 'dpo.reference_policy_kl_penalty'?",
        "{nemo:key}`xyzzy`": "no configuration key 'xyzzy' [nemo",  # nothing is near
        "{nemo}`algorithms.loss.DPOLosFn`": "has no symbol 'algorithms.loss.DPOLosFn'; did you mean",
        "{nemo:script}`examples/run_dpos.py`": "did you mean 'examples/run_dpo.py'?",
        "{nemo:line}`nemo_rl/algorithms/dpo.py:402`": "nemo_rl.algorithms.dpo.validate_one_dataset "
        "stands on line 401",
        "{nemo:default}`cluster.num_nodes`": "NeMo RL declares no default",
        "{nemo:default}`dpo.seed in dpos.yaml`": "no script or configuration 'dpos.yaml'",
        "{nemo:commit}`1234567`": f"the pinned commit is {FACTS.commit[:7]}",
    }
    result = page("\n\n".join(f"Here is {text}." for text in unknown))
    assert result.code != 0
    for line, message in enumerate(unknown.values()):
        assert re.search(
            rf"docs/index.md:{3 + 2 * line}: WARNING: .*{re.escape(message)}", result.text
        )


def test_every_place_is_of_a_key_and_of_one_commit():
    assert PLACES["commit"] == FACTS.commit
    assert sorted(set(PLACES["places"]) - FACTS.keys) == []
    assert {number for number, _ in PLACES["places"].values()} == set(range(len(PLACES["files"])))
    assert all(line >= 1 for _, line in PLACES["places"].values())


def test_a_section_of_keys_is_a_table_with_types_values_and_readers(page):
    built = page("Set `dpo.sft_loss_weight`.\n\n```{key-table} dpo\n:but: dpo.val_period\n```")
    assert built.code == 0, built.text
    rows = [[c.get_text() for c in r.select("td")] for r in built.page("index.html").select("tr")]
    (row,) = [row for row in rows if row and row[0] == "dpo.sft_loss_weight"]
    assert "float" in row[1] and "(" in row[3] and row[4].partition(":")[2].isdecimal()
    assert row[5] == "Home"
    assert not [row for row in rows if row and row[0] == "dpo.val_period"]
    assert "NeMo RL has no key below dop" in page("```{key-table} dop\n```").text
