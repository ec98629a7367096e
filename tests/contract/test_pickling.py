# SPDX-License-Identifier: Apache-2.0
"""The promise that needs a second interpreter: the loss travels and behaves the same there."""

import importlib
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from nemo_rl_ref.algorithms.loss import NLLLossFn
from nemo_rl_ref.algorithms.loss.interfaces import LossInputType, LossType
from nemo_rl_ref.contract import PROMISES, check_loss, check_losses
from nemo_rl_ref.contract._pickling import FreshInterpreter

ROOT = Path(__file__).parents[2]

# A module that a worker can import. SCALE is set in this process only.
MODULE = """
from nemo_rl_ref.algorithms.loss import NLLLossFn

SCALE = 1.0


class ReadsGlobal(NLLLossFn):
    def __call__(self, *args, **kwargs):
        loss, metrics = super().__call__(*args, **kwargs)
        print("a loss may print")
        return loss * SCALE, metrics
"""


def pickling(loss_fn):
    return check_loss(loss_fn, only=["pickling"])["pickling"]


class Local:
    """Sent by reference: the other interpreter has the same path."""

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGPROB

    def __init__(self, weigh=None):
        self.weigh = weigh or (lambda loss: 2 * loss)

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = (data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)).bool()
        logprobs = next_token_logprobs.masked_fill(~mask, 0)
        loss = self.weigh(-logprobs.sum() / (global_valid_toks + 1e-8))
        return loss, {"loss": loss.item()}


def test_all_nine():
    report = check_loss(Local())
    assert report.ok, str(report)
    assert [entry.name for entry in report.entries] == list(PROMISES)
    measured = report["pickling"].measured
    assert f"by reference: a worker must be able to import {__name__}" in measured
    assert "largest difference 0.0e+00" in measured


def test_global_state_stays_behind(tmp_path, monkeypatch):
    (tmp_path / "travelling_loss.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    travelling_loss = importlib.import_module("travelling_loss")
    travelling_loss.SCALE = 3.0
    entry = pickling(travelling_loss.ReadsGlobal())
    assert entry.status == "failed"
    (failure,) = entry.failures
    assert failure.problem.startswith("in a fresh interpreter: ")
    assert failure.batch.rows == 1  # one sequence is enough to see it


def test_what_cannot_be_pickled():
    """A closure over a lock. No answer is waited for."""
    lock = threading.Lock()

    def weigh(loss):
        with lock:
            return 2 * loss

    (failure,) = pickling(Local(weigh)).failures
    assert "cloudpickle cannot pickle it: TypeError" in failure.problem
    assert "lock" in failure.problem
    assert failure.batch is None


def test_what_cannot_be_unpickled(monkeypatch):
    """A module that exists in this process only, as one typed into an interpreter does."""
    module = types.ModuleType("only_here")
    monkeypatch.setitem(sys.modules, "only_here", module)
    monkeypatch.setattr(Local, "__module__", "only_here")
    module.Local = Local
    loss_fn = Local()
    loss_fn.weigh = torch.neg
    (failure,) = pickling(loss_fn).failures
    assert "No module named 'only_here'" in failure.problem


def test_the_other_interpreter_reports_its_end():
    with FreshInterpreter() as fresh:
        answers = fresh.ask(b"no pickle", 2)
    assert [status for status, _ in answers] == ["error", "error"]
    assert answers[0][1].startswith("exit status 1: ")


def test_many_losses_share_one_interpreter(monkeypatch):
    """Each gets the report that it gets alone, under the name it was given."""
    started = []
    start = FreshInterpreter.__init__
    monkeypatch.setattr(
        FreshInterpreter, "__init__", lambda self: (started.append(1), start(self))[1]
    )
    locked = NLLLossFn()
    locked.lock = threading.Lock()
    losses = {"good": NLLLossFn(), "bad": locked, "also good": NLLLossFn()}
    reports = check_losses(losses)
    assert list(reports) == list(losses) and len(started) == 1
    assert [report["pickling"].status for report in reports.values()] == ["ok", "failed", "ok"]
    assert [report.loss for report in reports.values()] == list(losses)
    assert [entry.name for entry in reports["good"].entries] == list(PROMISES)
    with pytest.raises(TypeError, match="loss_fn is the class NLLLossFn, expected a loss"):
        check_losses({"a class": NLLLossFn})


def test_no_interpreter_is_left_behind():
    with pytest.raises(ZeroDivisionError), FreshInterpreter() as fresh:
        raise ZeroDivisionError
    assert fresh._process.returncode is not None


def test_by_value():
    """A class of a script has no module to import: its code travels."""
    code = """
import torch
from nemo_rl_ref.algorithms.loss import NLLLossFn
from nemo_rl_ref.contract import check_loss


class Mine(NLLLossFn):
    pass


if __name__ == "__main__":
    entry = check_loss(Mine(), only=["pickling"])["pickling"]
    assert entry.status == "ok", entry
    print(entry.measured)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "by value" in done.stdout
