# SPDX-License-Identifier: Apache-2.0
"""The sources of the site's text: every name, address, block and command in them is checked."""

import subprocess
import sys
from pathlib import Path

import commands
import known_names
import page_blocks
import pytest
import source_checks
import sources
from nemo_rl_facts import FACTS, Facts
from small_site import TOP

BLOCKS = source_checks.checked_blocks(TOP)
NAMES = known_names.Names(TOP, Facts(TOP / FACTS))


@pytest.mark.parametrize(
    "find",
    [
        source_checks.name_findings,
        source_checks.role_findings,
        source_checks.address_findings,
        source_checks.dash_findings,
    ],
)
def test_names_addresses_and_options_of_the_sources(find):
    assert [str(finding) for finding in find(TOP)] == []


def test_blocks_of_the_sources():
    assert [str(finding) for finding in source_checks.block_findings(BLOCKS)] == []
    assert len(BLOCKS) > 500


def test_commands_of_the_sources():
    assert [str(finding) for finding in source_checks.command_findings(TOP, BLOCKS)] == []


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("dpo.reference_policy_kl_penalti", "dpo.reference_policy_kl_penalty"),
        ("grpo.num_prompts_per_steps", "grpo.num_prompts_per_step"),
        ("ratio_clip_maxi", "ratio_clip_max"),
        ("nemo_rl.algorithms.loss.DPOLosFn", ""),
        ("nemo_rl_ref.algorithms.los", "nemo_rl_ref.algorithms.loss"),
        ("examples/run_dpos.py", ""),
        ("grpo_math_2B.yaml", "grpo_math_"),
        ("--allow-config-change", "--allow-config-changes"),
        ("prev_logprobz", "prev_logprobs"),
        ("sampling_importance_ratios_", ""),
        ("NEMO_RL_REF_BACKENDS", "NEMO_RL_REF_BACKEND"),
        ("icepopp", "icepop"),
        ("advantages[:, 1:] * token_maskk", ""),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_the_nearest(text, nearest):
    (problem,) = NAMES.problems(text)
    assert f"did you mean '{nearest}" in problem


@pytest.mark.parametrize(
    "text",
    [
        "dpo.seed=1",
        "loss_fn.ratio_clip_max: 0.28",
        "algorithms.loss.DPOLossFn",
        "nemo_rl/algorithms/dpo.py",
        "rewards_*_mean",
        "data.default.anything",  # a section that takes any key
        "--config",
        "(B, S)",
    ],
)
def test_a_name_that_is_there_is_known(text):
    assert list(NAMES.problems(text)) == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (
            "python -m nemo_rl_ref.run_dpo --config configs/dpo.yaml --los x.py:X",
            "--los: no such option",
        ),
        ("python -m nemo_rl_ref.run_dpo --config configs/dpos.yaml", "no such file"),
        (
            "python -m nemo_rl_ref.run_dpoo --config configs/dpo.yaml",
            "no module nemo_rl_ref.run_dpoo",
        ),
        ("python -m nemo_rl_ref.run_dpo dpo.seed=1", "required: --config"),
        ("python -m nemo_rl_ref.tune dpo … --pruner halving", "invalid choice: 'halving'"),
        ("python -m nemo_rl_ref.tune dpo … –jobs 4", "–jobs: an option begins with hyphens"),
        ("python -m nemo_rl_ref.run_dpo --config dpo.yaml dpo.sed=1", "did you mean dpo.seed?"),
        ("python -m nemo_rl_ref.run_dpo --config dpo.yaml dpo.seed=one", "takes int, got str"),
        ("python -m nemo_rl_ref.run_dpo --config dpo.yaml 'dpo.seed=[1'", "Hydra's grammar"),
        (
            "accelerate launch --num_process 4 -m nemo_rl_ref.run_dpo --config dpo.yaml",
            "num_process",
        ),
        ("make htlm", "no such target; did you mean 'html'?"),
        ("make html SPHINXOPT=-n", "no such variable"),
        ("pip install '.[tunes]'", "no extra 'tunes'; did you mean 'tune'?"),
        ("uv run examples/run_dpos.py", "did you mean 'examples/run_dpo.py'?"),
        ("uv run examples/run_dpo.py --config examples/configs/dpoo.yaml", "no such file"),
        ("python notebooks/costum_dpo.py", "no such file"),
        ("nemo-rl train", "no program that is known"),
    ],
)
def test_a_command_that_would_fail_is_refused(command, problem):
    found = list(commands.problems(command))
    assert len(found) == 1 and problem in found[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dpo:\n  sed: 1\n", "dpo.sed is not a key of NeMo RL's; did you mean dpo.seed?"),
        ("dpo:\n  seed: one\n", "dpo.seed takes int, got str"),
        ("dpo:\n  seed: 1\n  seed: 2\n", "the key seed stands twice"),
        ("dpo: [", "not YAML"),
        ("optimizer:\n  nam: torch.optim.AdamW\n", "policy.optimizer.nam"),
    ],
)
def test_yaml_that_nemo_rl_would_not_take_is_refused(text, problem):
    (found,) = commands.yaml_problems(text)
    assert problem in found


def blocks_of(text):
    signatures = page_blocks.our_signatures(TOP)
    return [page_blocks.treat(block, signatures) for block in sources.markdown_blocks("x.md", text)]


def test_a_block_that_nothing_checks_is_refused_unless_it_is_marked():
    (bare,) = blocks_of("text\n\n```text\nloss 0.3\n```\n")
    assert "checked by nothing" in bare.problems[0] and bare.block.line == 3
    for mark in ("% output: what a run printed once", "<!-- output: what a run printed once -->"):
        (marked,) = blocks_of(f"{mark}\n```text\nloss 0.3\n```\n")
        assert (marked.treatment, marked.problems) == ("output", ())
    (without_reason,) = blocks_of("% output: \n```text\nloss 0.3\n```\n")
    assert without_reason.treatment == "escaped"


def test_python_with_a_wrong_argument_is_refused():
    (checked,) = blocks_of("```python\nwrite_yaml(best, file='x')\n```\n")
    assert checked.problems == ("write_yaml() has no parameter 'file'",)


PYTHON = [
    checked
    for checked in BLOCKS
    if checked.treatment == page_blocks.PYTHON and checked.block.kind == "python"
]


@pytest.mark.parametrize("checked", PYTHON, ids=lambda checked: checked.block.file)
def test_python_on_a_page_runs(checked):
    done = subprocess.run(
        [sys.executable, "-c", checked.block.text], cwd=TOP, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_raw_address_and_a_bare_option_name_their_line(tmp_path):
    address = "https://github.com/NVIDIA-NeMo/RL/blob/main/nemo_rl/algorithms/dpo.py"
    for name in ("docs/a.md", "README.md", "CONTRIBUTING.md"):
        path = Path(tmp_path / name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("# A\n")
    (tmp_path / "docs/a.md").write_text(f"# A\n\n[x]({address})\nuse --config or `--loss`\n")
    (found,) = source_checks.address_findings(tmp_path)
    assert str(found).startswith("docs/a.md:3: the address github.com/NVIDIA-NeMo/RL/blob/main")
    (found,) = source_checks.dash_findings(tmp_path)
    assert "the option --config is not in backquotes" in str(found)


def test_a_commands_answer_is_kept_until_the_question_changes(tmp_path):
    store = tmp_path / "commands"
    run = source_checks.ask_once(TOP, store)
    assert run('[["sh", "make htlm"]]') == run('[["sh", "make htlm"]]')
    (kept,) = store.iterdir()
    kept.write_text("[]")
    assert run('[["sh", "make htlm"]]') == "[]"  # nothing ran
    assert "htm" in run('[["sh", "make htm"]]')


def test_findings_are_kept_until_a_source_changes(tmp_path):
    """What is read counts, and the name of every file that may be named."""
    for file in (*source_checks.TOP_FILES, "docs/page.md", "tests/test_a.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("before")
    (tmp_path / source_checks.FACTS).mkdir(parents=True)
    for name in source_checks.FILES:
        (tmp_path / source_checks.FACTS / name).write_text("{}")
    digests = [source_checks.digest_of(tmp_path)]
    assert source_checks.digest_of(tmp_path) == digests[0]
    facts = f"{source_checks.FACTS}/{source_checks.FILES[0]}"
    for file in ("docs/page.md", "tests/test_a.py", "Makefile", facts, "configs/new.csv"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("after")
        digests.append(source_checks.digest_of(tmp_path))
    assert len(set(digests)) == len(digests)
