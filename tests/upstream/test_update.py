# SPDX-License-Identifier: Apache-2.0
"""Another commit is pinned in one difference that a person can read."""

import difflib
import json
import os
import textwrap
from pathlib import Path

import pytest
import torch
from nemo_rl_checkouts import commit

from nemo_rl_ref.upstream import COMMIT, FOLDER
from nemo_rl_ref.upstream.__main__ import main
from nemo_rl_ref.upstream.checkout import Checkout
from nemo_rl_ref.upstream.extract import extract_all, facts_text
from nemo_rl_ref.upstream.golden import _agree, _encode, golden_text, make_golden
from nemo_rl_ref.upstream.update import update

DPO = "".join(f"def step_{n}(a, b=1): return a\n\n" for n in range(40))
FILES = {
    "nemo_rl/__init__.py": "",
    "nemo_rl/dpo.py": DPO,
    "examples/configs/dpo.yaml": "dpo: {seed: 1, beta: 0.05}",
}
GOLDEN = {"commit": "", "cases": [{"symbol": "a", "inputs": {"x": [1.0, 2.0]}}]}


@pytest.fixture
def pinned(tmp_path):
    """A checkout, and a repository whose facts and pages are those of its first commit."""
    first = commit(tmp_path / "RL", FILES)
    old = Checkout(tmp_path / "RL", first)
    page = f"""
        At [commit {first[:7]}](https://x/tree/{first}) of {old.date}; not {"0" * 7}.
        [a](https://x/blob/{first}/nemo_rl/dpo.py#L21), `nemo_rl/dpo.py:23`, nemo_rl/dpo.py#L21-L23,
        nemo_rl/none.py:7, in 2020: 12, my_nemo_rl/dpo.py:21
    """
    files = {"docs/page.md": page, "nemo_rl_ref/upstream/__init__.py": f'COMMIT = "{first}"\n'}
    for name, text in files.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True)
        (tmp_path / "here" / name).write_text(textwrap.dedent(text))
    folder = tmp_path / "here/nemo_rl_ref/upstream"
    for name, content in extract_all(old).items():
        (folder / name).write_text(facts_text(name, content))
    (folder / "golden.json").write_text(golden_text(GOLDEN | {"commit": first}))
    return old, tmp_path / "here"


def pin(pinned, files, gone=()):
    """The files that changed and the notes after pinning another commit."""
    old, here = pinned
    second = commit(old.path, files, gone)
    changed, notes = update(old, Checkout(old.path), here, GOLDEN | {"commit": second})
    return second, {path.relative_to(here).as_posix() for path in changed}, notes


def test_every_file_names_the_new_commit_and_links_move_with_their_lines(pinned):
    old, here = pinned
    second, changed, notes = pin(pinned, {"nemo_rl/dpo.py": "# one\n# two\n" + DPO})
    names = (
        "__init__.py",
        "golden.json",
        "keys.json",
        "manifest.json",
        "places.json",
        "readers.json",
        "sources.json",
    )
    assert changed == {"docs/page.md", *(f"nemo_rl_ref/upstream/{name}" for name in names)}
    assert notes == []
    page = (here / "docs/page.md").read_text()
    assert old.commit[:7] not in page
    assert f"[commit {second[:7]}](https://x/tree/{second})" in page and "not 0000000" in page
    assert f"https://x/blob/{second}/nemo_rl/dpo.py#L23" in page
    assert "`nemo_rl/dpo.py:25`, nemo_rl/dpo.py#L23-L25," in page
    assert "nemo_rl/none.py:7, in 2020: 12, my_nemo_rl/dpo.py:21" in page
    for name in names[1:]:
        assert json.loads((here / "nemo_rl_ref/upstream" / name).read_text())["commit"] == second


def test_a_second_update_changes_nothing(pinned):
    old, here = pinned
    pin(pinned, {"nemo_rl/dpo.py": "# one\n" + DPO})
    new = Checkout(old.path)
    assert update(new, new, here, GOLDEN | {"commit": new.commit}) == ([], [])


def test_a_file_that_moved_is_linked_where_it_is(pinned):
    _, here = pinned
    pin(pinned, {"nemo_rl/preference/dpo.py": DPO}, ["nemo_rl/dpo.py"])
    assert "`nemo_rl/preference/dpo.py:23`" in (here / "docs/page.md").read_text()


def test_a_line_that_is_gone_is_a_note_with_page_and_line(pinned):
    changed = DPO.replace("step_10(a", "step_10(c").replace("step_11(a", "step_11(c")
    _, _, notes = pin(pinned, {"nemo_rl/dpo.py": changed})
    assert "docs/page.md:3: line 21 of nemo_rl/dpo.py is not there any more" in notes
    assert len(notes) == 4


def test_the_difference_is_as_small_as_the_change(pinned):
    _, here = pinned
    folder = here / "nemo_rl_ref/upstream"
    names = (
        "golden.json", "keys.json", "manifest.json", "places.json", "readers.json", "sources.json",
    )  # fmt: skip
    before = {name: (folder / name).read_text().splitlines() for name in names}
    pin(pinned, {"nemo_rl/dpo.py": DPO.replace("step_39(a, b=1)", "step_39(a, b=2)")})
    for name, lines in before.items():
        after = (folder / name).read_text().splitlines()
        marks = [line for line in difflib.ndiff(lines, after) if line[0] in "+-"]
        more = {"manifest.json": 2, "sources.json": 2}.get(name, 0)
        assert len(marks) == 2 + more, name  # the commit; the signature, its hash


def test_golden_json_is_written_as_it_stands():
    text = (FOLDER / "golden.json").read_text(encoding="utf-8")
    assert golden_text(json.loads(text)) == text
    assert max(map(len, text.splitlines())) < 5000


def test_numbers_are_written_so_that_float32_comes_back():
    values = torch.tensor([[1 / 3, 1e-8], [-2.5, 3e7]])
    written = _encode({"loss": values[0, 0], "kl": values, "n": 3, "valid": torch.tensor([True])})
    assert written["n"] == 3 and written["valid"]["data"] == [True]
    assert written["kl"]["shape"] == [2, 2] and written["kl"]["dtype"] == "float32"
    assert torch.equal(torch.tensor(written["kl"]["data"]).reshape(2, 2), values)
    assert written["loss"] == {"shape": [], "dtype": "float32", "data": [0.333333343]}


@pytest.mark.parametrize(
    ("made", "agree"),
    [
        ({"loss": 1.0000001, "n": 3, "kl": [0.0, float("nan")]}, True),
        ({"loss": 1.00001, "n": 3, "kl": [0.0, float("nan")]}, False),
        ({"loss": 1.0, "n": 4, "kl": [0.0, float("nan")]}, False),
        ({"loss": 1.0, "n": 3, "kl": [0.0, 0.0]}, False),
        ({"loss": 1.0, "n": 3, "kl": [0.0]}, False),
        ({"loss": 1.0, "n": 3}, False),
        ({"loss": 1, "n": 3, "kl": [0.0, float("nan")]}, False),
    ],
)
def test_rounding_is_no_other_output(made, agree):
    assert _agree(made, {"loss": 1.0, "n": 3, "kl": [0.0, float("nan")]}) is agree


def test_golden_and_update_want_the_pinned_commit(pinned, capsys):
    old, _ = pinned
    assert main(["golden", str(old.path)]) == 2
    assert f"got commit {old.commit}, expected {COMMIT}" in capsys.readouterr().err
    assert main(["update", str(old.path)]) == 2
    assert f"it has no commit {COMMIT}" in capsys.readouterr().err


def test_an_environment_that_fails_is_one_error(pinned, tmp_path):
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "golden.txt").write_text((FOLDER / "golden.txt").read_text())
    python = environment / "bin/python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named x' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(ValueError, match="golden: NeMo RL's code failed: ModuleNotFoundError"):
        make_golden(pinned[0], environment)


def test_nemo_rl_gives_the_recorded_outputs():
    """With the environment that ``golden`` makes; what is recorded comes back to 1e-6."""
    path, environment = os.environ.get("NEMO_RL_CHECKOUT"), os.environ.get("NEMO_RL_ENVIRONMENT")
    if not path or not environment:
        pytest.skip("NEMO_RL_CHECKOUT and NEMO_RL_ENVIRONMENT do not name a checkout and a folder")
    made = make_golden(Checkout(Path(path), COMMIT), Path(environment))
    recorded = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
    assert made["cases"] == recorded["cases"]
