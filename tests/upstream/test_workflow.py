# SPDX-License-Identifier: Apache-2.0
"""The weekly job that reports what changed in NeMo RL."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

TEXT = (Path(__file__).parents[2] / ".github/workflows/upstream.yml").read_text(encoding="utf-8")
WORKFLOW = yaml.load(TEXT, yaml.BaseLoader)
DRIFT, ISSUE = WORKFLOW["jobs"]["drift"], WORKFLOW["jobs"]["issue"]


def run_step(script, folder, programs, **variables):
    """Run a step's script as GitHub does, with stand-ins for programs; returns the process."""
    for name, text in programs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    env = {"PATH": path, "GITHUB_OUTPUT": "out", "GITHUB_STEP_SUMMARY": "summary", **variables}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_only_the_job_that_runs_no_code_may_write():
    assert set(WORKFLOW["on"]) == {"schedule", "workflow_dispatch"}  # never for a pull request
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in DRIFT and ISSUE["permissions"] == {"issues": "write"}
    uses = [step["uses"] for job in (DRIFT, ISSUE) for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in uses)
    assert not any("checkout" in step.get("uses", "") for step in ISSUE["steps"])
    checkouts = [step for step in DRIFT["steps"] if "checkout" in step.get("uses", "")]
    assert all(step["with"]["persist-credentials"] == "false" for step in checkouts)
    assert (
        checkouts[1]["with"] | {"repository": "NVIDIA-NeMo/RL", "fetch-depth": "0"}
        == (checkouts[1]["with"])
    )


@pytest.mark.parametrize(("status", "returncode"), [(0, 0), (1, 0), (2, 1)])
def test_a_report_is_no_failure_and_an_error_is_one(tmp_path, status, returncode):
    (step,) = [step for step in DRIFT["steps"] if step.get("id") == "drift"]
    assert "-m nemo_rl_ref.upstream drift _build/RL" in step["run"]
    program = f'echo "report of $*"; exit {status}'
    done = run_step(step["run"], tmp_path, {".venv/bin/python": program})
    assert done.returncode == returncode, done.stderr
    assert (tmp_path / "out").read_text() == f"status={status}\n"
    assert "report of -m" in (tmp_path / "drift.md").read_text()
    assert (tmp_path / "summary").read_text() == (tmp_path / "drift.md").read_text()
    assert ISSUE["if"] == "needs.drift.outputs.status == '1'"


@pytest.mark.parametrize(("number", "asked"), [("", "create --title"), ("7", "edit 7")])
def test_there_is_one_issue_at_a_time(tmp_path, number, asked):
    script = ISSUE["steps"][-1]["run"]
    (tmp_path / "drift.md").write_text("x" * 100_000)
    program = f'echo "$*" >> asked; if [ "$2" = list ]; then echo "{number}"; fi'
    done = run_step(script, tmp_path, {"bin/gh": program}, TITLE=ISSUE["env"]["TITLE"])
    assert done.returncode == 0, done.stderr
    listed, written = (tmp_path / "asked").read_text().splitlines()
    assert ISSUE["env"]["TITLE"] in listed and "--state open" in listed
    assert written.startswith(f"issue {asked}") and "--body-file body.md" in written
    assert len((tmp_path / "body.md").read_text()) == 60_000
