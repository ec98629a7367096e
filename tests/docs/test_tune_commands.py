# SPDX-License-Identifier: Apache-2.0
"""The search commands that the page and the shipped spaces show are commands of this package."""

import re
import shlex
from pathlib import Path

import pytest

from nemo_rl_ref.tune.__main__ import make_parser
from nemo_rl_ref.tune.spec import make_spec

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/advanced/algorithm-development/hyperparameter-optimization.md"
SPACES = sorted((ROOT / "configs/spaces").glob("*.yaml"))
PROGRAM = "python -m nemo_rl_ref.tune "


def commands_in(text):
    """Commands of the search, continued lines joined; an ellipsis stands for what all have."""
    joined = re.sub(r" *\\\n[ #]*", " ", text)
    found = [line.lstrip("# ") for line in joined.splitlines() if PROGRAM in line]
    required = "--config configs/dpo.yaml --space configs/spaces/dpo.yaml --objective val:a_loss"
    return [line.split(PROGRAM)[1].replace("…", required) for line in found]


def parse(command):
    return make_parser().parse_known_args(shlex.split(command))


@pytest.mark.parametrize("command", commands_in(PAGE.read_text(encoding="utf-8")))
def test_a_command_of_the_page(command):
    options, overrides = parse(command)
    assert not [text for text in overrides if text.startswith("-")]
    assert (ROOT / options.config).exists() and (ROOT / options.space).exists()


def test_the_page_has_commands():
    assert len(commands_in(PAGE.read_text(encoding="utf-8"))) >= 4


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_shipped_space_goes_with_the_command_in_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = commands_in(path.read_text(encoding="utf-8"))
    options, overrides = parse(command)
    assert options.space == path.relative_to(ROOT).as_posix()
    spec = make_spec(options.algorithm, options.config, path, options.objective, overrides)
    assert len(spec.space.distributions()) > 1
