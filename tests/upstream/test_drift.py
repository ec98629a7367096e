# SPDX-License-Identifier: Apache-2.0
"""What changed in NeMo RL, and which page or mirror it concerns: planted changes, and real ones."""

import csv
import json
import os
import textwrap
from pathlib import Path

import pytest
from nemo_rl_checkouts import commit
from nemo_rl_history import HISTORY, UNTIL, missed

from nemo_rl_ref.upstream.__main__ import drift, main
from nemo_rl_ref.upstream.checkout import Checkout

LOSSES = """
    from nemo_rl.algorithms.interfaces import LossFunction
    def _scale(x): return 2 * x
    def masked_mean(values, mask, eps=1e-8): return (values * mask).sum() / (mask.sum() + eps)
    def unused_helper(x, y): return x - y
    class TinyLossConfig(BaseModel):
        beta: float = 0.1
        clip_low: float = 0.2
        other: int = 1
    class TinyLossFn(LossFunction):
        def __init__(self, config): self.config = config
        def __call__(self, logits, data): return _scale(logits)
        def describe(self): return "tiny"
"""
CONFIG = """
    tiny: {seed: 1, beta: 0.1, old_name: 3}
    policy:
      optimizer: {kwargs: {lr: 5e-7}}
    data: {dataset_name: math}
"""
BASE = {
    "nemo_rl/__init__.py": "",
    "nemo_rl/algorithms/__init__.py": "from nemo_rl.algorithms.losses import TinyLossFn",
    "nemo_rl/algorithms/interfaces.py": "class LossFunction(Protocol): pass",
    "nemo_rl/algorithms/losses.py": LOSSES,
    "nemo_rl/algorithms/tiny.py": "def tiny_train(policy, dataloader, loss_fn): return 1",
    "examples/run_tiny.py": "print(1)",
    "examples/configs/tiny.yaml": CONFIG,
}
HERE = {
    "docs/page.md": """
        The loss `TinyLossFn` and {key}`tiny.old_name`, in `examples/run_tiny.py`.

        ```yaml
        tiny:
          beta: 0.1
        ```

        `tiny_train` runs it.
    """,
    "configs/tiny.yaml": """
        data:
          dataset_name: x
    """,
    "nemo_rl_ref/algorithms/_losses.py": """
        def masked_mean(values, mask): return 1
        class TinyLossConfig:
            beta: float = 0.1
            clip_low: float = 0.2
        class TinyLossFn:
            def __call__(self, logits, data): return 1
    """,
}


@pytest.fixture
def repositories(tmp_path):
    """A checkout with its first commit, and a repository that uses it."""
    for name, text in HERE.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text(textwrap.dedent(text))
    return tmp_path / "RL", commit(tmp_path / "RL", BASE), tmp_path / "here"


def changes(repositories, files, gone=()):
    """The changes after a second commit, as ``kind what name`` to the change."""
    checkout, first, here = repositories
    commit(checkout, files, gone)
    found, _ = drift(Checkout(checkout), first, here)
    return {f"{c.kind} {c.what} {c.name}": c for c in found}


def losses(*replacements):
    text = LOSSES
    for before, after in replacements:
        assert before in text
        text = text.replace(before, after)
    return {"nemo_rl/algorithms/losses.py": text}


def config(before, after):
    assert before in CONFIG
    return {"examples/configs/tiny.yaml": CONFIG.replace(before, after)}


LOSS = "nemo_rl.algorithms.losses"


def test_nothing_changed(repositories):
    assert changes(repositories, {"README.md": "new"}) == {}


def test_a_loss_module_that_moves(repositories):
    package = "from nemo_rl.algorithms.loss.functions import TinyLossFn"
    found = changes(
        repositories,
        {"nemo_rl/algorithms/loss/functions.py": LOSSES, "nemo_rl/algorithms/__init__.py": package},
        gone=["nemo_rl/algorithms/losses.py"],
    )
    moved = found[f"moved symbol {LOSS}.TinyLossFn"]
    assert moved.new == "nemo_rl.algorithms.loss.functions.TinyLossFn"
    assert moved.mirror == "nemo_rl_ref/algorithms/_losses.py:6" and moved.used
    assert moved.uses == ("docs/page.md:2",)
    file = found["moved file nemo_rl/algorithms/losses.py"]
    assert file.new == "nemo_rl/algorithms/loss/functions.py" and not file.used
    assert not any(name.startswith(("removed", "formula", "new")) for name in found)


def test_a_class_that_is_renamed(repositories):
    package = {"nemo_rl/algorithms/__init__.py": ""}
    found = changes(repositories, losses(("TinyLossFn", "SmallTinyLossFn")) | package)
    renamed = found[f"renamed symbol {LOSS}.TinyLossFn"]
    assert renamed.new == f"{LOSS}.SmallTinyLossFn" and renamed.used
    export = found["moved export nemo_rl.algorithms.TinyLossFn"]
    assert export.used and export.new == renamed.new


def test_a_function_that_is_removed(repositories):
    found = changes(repositories, {"nemo_rl/algorithms/tiny.py": ""})
    removed = found["removed symbol nemo_rl.algorithms.tiny.tiny_train"]
    assert removed.used and removed.mirror is None and removed.uses == ("docs/page.md:9",)


def test_what_nobody_uses_is_not_called_used(repositories):
    found = changes(repositories, losses(("def unused_helper(x, y): return x - y", "")))
    assert not found.pop(f"removed symbol {LOSS}.unused_helper").used
    assert found == {}


@pytest.mark.parametrize(
    ("before", "after", "name", "detail"),
    [
        ("eps=1e-8", "eps=1e-6", f"signature symbol {LOSS}.masked_mean", "eps=1e-06"),
        ("logits, data)", "logits, data, n)", f"signature method {LOSS}.TinyLossFn.__call__", "n)"),
        ("float = 0.1", "float = 0.5", f"default field {LOSS}.TinyLossConfig.beta", "0.1 -> 0.5"),
        ("beta: float", "beta: int", f"signature field {LOSS}.TinyLossConfig.beta", "float -> int"),
        ("clip_low", "clip_lower", f"renamed field {LOSS}.TinyLossConfig.clip_low", ""),
        ("return _scale(logits)", "return logits", f"formula method {LOSS}.TinyLossFn.__call__", ""),
        ("return 2 * x", "return 3 * x", f"formula method {LOSS}.TinyLossFn.__call__", ""),
        (".sum() / (", ".mean() / (", f"formula symbol {LOSS}.masked_mean", ""),
    ],
)  # fmt: skip
def test_a_change_in_what_is_mirrored(repositories, before, after, name, detail):
    change = changes(repositories, losses((before, after)))[name]
    assert detail in change.detail
    assert change.used and change.mirror.startswith("nemo_rl_ref/algorithms/_losses.py:")


@pytest.mark.parametrize("change", [("other: int = 1", "other: int = 2"), ("'tiny'", "'t'")])
def test_what_the_mirror_leaves_out_is_not_used(repositories, change):
    found = changes(repositories, losses(tuple(part.replace("'", '"') for part in change)))
    assert found and not any(c.used for c in found.values())


def test_a_key_that_is_renamed_moved_removed_or_has_another_default(repositories):
    text = CONFIG.replace("old_name", "old_names").replace(
        "{dataset_name: math}", "{train: {dataset_name: math}}"
    )
    text = (
        text.replace("beta: 0.1, ", "")
        .replace("lr: 5e-7", "lr: 0.0000005")
        .replace("seed: 1", "seed: 2")
    )
    found = changes(repositories, {"examples/configs/tiny.yaml": text})
    renamed = found["renamed key tiny.old_name"]
    assert renamed.new == "tiny.old_names" and renamed.uses == ("docs/page.md:2",)
    moved = found["renamed key data.dataset_name"]
    assert moved.new == "data.train.dataset_name" and moved.uses == ("configs/tiny.yaml:3",)
    assert found["removed key tiny.beta"].uses == ("docs/page.md:6",)
    assert found["default key tiny.seed"].detail == "1 -> 2 in tiny.yaml"
    assert not any("kwargs.lr" in name for name in found)  # 5e-7 and 0.0000005 are one number


def test_a_value_that_is_taken_over_from_another_file_is_no_change(repositories):
    checkout, _, here = repositories
    child = {"examples/configs/child.yaml": "defaults: tiny.yaml\ntiny: {seed: 1}"}
    first = commit(checkout, child)
    second = {"examples/configs/child.yaml": "defaults: tiny.yaml\nextra: 1"}
    found = changes((checkout, first, here), second)
    assert list(found) == ["new key extra"]


def test_new_losses_flags_and_keys_that_are_not_covered(repositories):
    found = changes(
        repositories,
        {
            **losses(("other: int = 1", "other: int = 1\n        flag: bool = False")),
            **config("seed: 1", "seed: 1, fresh: 2"),
            "nemo_rl/algorithms/more.py": "class NewLossFn(LossFunction): pass",
        },
    )
    assert set(found) == {
        "new symbol nemo_rl.algorithms.more.NewLossFn",
        f"new field {LOSS}.TinyLossConfig.flag",
        "new key tiny.fresh",
    }
    assert not any(change.used for change in found.values())


def test_a_script_that_moves(repositories):
    found = changes(
        repositories, {"examples/tiny/run_tiny.py": "print(1)"}, ["examples/run_tiny.py"]
    )
    moved = found["moved file examples/run_tiny.py"]
    assert moved.new == "examples/tiny/run_tiny.py" and moved.uses == ("docs/page.md:2",)


def test_what_cannot_be_parsed_is_not_called_removed(repositories):
    found = changes(repositories, {"nemo_rl/algorithms/tiny.py": "def tiny_train(:"})
    unread = found["unread symbol nemo_rl.algorithms.tiny.tiny_train"]
    assert unread.detail == "nemo_rl/algorithms/tiny.py"
    assert not any(name.startswith("removed") for name in found)


def test_a_key_that_may_stand_in_a_file_that_cannot_be_read_is_not_called_removed(repositories):
    checkout, first, here = repositories
    files = {"examples/configs/tiny.yaml": "tiny: [", "nemo_rl/a.py": ""}
    found = changes(repositories, files)
    unread = found["unread key tiny.beta"]
    assert unread.detail == "perhaps in examples/configs/tiny.yaml" and unread.used
    commit(checkout, {"examples/configs/tiny.yaml": "tiny: {seed: 1}"})
    found, _ = drift(Checkout(checkout), first, here)
    assert "removed" in {c.kind for c in found if c.name == "tiny.beta"}


def test_the_command_reports_and_ends_with_a_status(repositories, capsys):
    checkout, first, here = repositories

    def run(*more):
        status = main(["drift", str(checkout), "--from", first, "--root", str(here), *more])
        return status, capsys.readouterr().out

    assert run()[0] == 0
    commit(checkout, losses(("def unused_helper(x, y)", "def unused_helper(x)")))
    assert run()[0] == 0
    commit(checkout, {**losses(("beta: float = 0.1", "beta: float = 0.5")), "nemo_rl/bad.py": "("})
    status, report = run()
    assert status == 1
    assert "1 changes touch what this project uses" in report
    report = " ".join(report.split())
    line = "- `nemo_rl.algorithms.losses.TinyLossConfig`: `beta` 0.1 -> 0.5 (mirror nemo_rl_ref/"
    assert "## Default changed (1)" in report and line in report
    assert "- nemo_rl/bad.py:1: not read: '(' was never closed" in report
    status, text = run("--json")
    (change,) = [c for c in json.loads(text)["changes"] if c["used"]]
    assert status == 1 and change["kind"] == "default" and change["detail"] == "0.1 -> 0.5"
    assert main(["drift", str(checkout), "--from", "nothing"]) == 2
    assert "it has no commit nothing" in capsys.readouterr().err
    assert main(["drift", str(checkout), "--root", str(checkout)]) == 2
    assert "where there is no folder nemo_rl_ref" in capsys.readouterr().err


@pytest.mark.parametrize("since", HISTORY)
def test_the_moves_of_nemo_rls_own_history_are_found(since):
    """At least 95 % of the facts in ``history.json``."""
    path = os.environ.get("NEMO_RL_CHECKOUT")
    if not path:
        pytest.skip("NEMO_RL_CHECKOUT does not name a checkout of NeMo RL")
    changes, _ = drift(Checkout(Path(path), UNTIL), since)
    lost = missed(since, changes)
    assert len(lost) <= 0.05 * len(HISTORY[since]), lost


def test_the_table_on_the_page_is_about_these_facts():
    path = Path(__file__).parents[2] / "benchmarks/results/drift.csv"
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [(row["since"][:9], int(row["facts"])) for row in rows] == [
        (since[:9], len(facts)) for since, facts in HISTORY.items()
    ]
    assert all(int(row["found"]) >= 0.95 * int(row["facts"]) for row in rows)
    assert {row["until"][:9] for row in rows} == {UNTIL[:9]}
