# SPDX-License-Identifier: Apache-2.0
"""Where time goes, as NeMo RL's timer tells it."""

import logging
import time

import pytest

from nemo_rl_ref.utils.timer import Timer


def test_measurements_are_kept_by_label_and_reduced():
    timer = Timer()
    for elapsed in (1.0, 2.0, 6.0):
        timer.record("a", elapsed)
    assert [timer.reduce("a", how) for how in ("sum", "mean", "median", "min", "max", "count")] == [
        9.0, 3.0, 2.0, 1.0, 6.0, 3,
    ]  # fmt: skip
    assert timer.reduce("a", "std") == pytest.approx((14 / 3) ** 0.5)
    assert timer.get_timing_metrics("sum") == {"a": 9.0} and timer.get_latest_elapsed("a") == 6.0
    assert timer.get_timing_metrics({}) == {"a": [1.0, 2.0, 6.0]}
    timer.reset("a")
    assert timer.get_timing_metrics() == {}


def test_a_block_is_measured_also_if_it_raises(monkeypatch):
    timer, clock = Timer(), iter((1.0, 3.5))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with pytest.raises(KeyError), timer.time("a"):
        raise KeyError
    assert timer.get_elapsed("a") == [2.5]


def test_a_clock_that_runs_or_does_not_is_refused_with_its_label():
    timer = Timer()
    timer.start("a")
    with pytest.raises(ValueError, match="'a' is running already"):
        timer.start("a")
    with pytest.raises(ValueError, match="'b' is not running; running: a"):
        timer.stop("b")
    with pytest.raises(KeyError, match="nothing was measured for 'b'"):
        timer.reduce("b")
    with pytest.raises(ValueError, match="operation: got 'total', expected one of mean"):
        timer.reduce("a", "total")


def test_events_are_marked_and_everything_is_logged_with_its_context(caplog):
    timer = Timer(context={"rank": 2})
    with caplog.at_level(logging.DEBUG, logger="nemo_rl_ref.utils.timer"):
        now = timer.mark("crash", {"worker": 3})
        timer.record("a", 1.0)
    assert timer.get_markers() == {"crash": [(now, {"worker": 3})]}
    assert "rank=2] crash mark meta={'worker': 3} ts=" in caplog.text
    assert "a record elapsed=1.0000s ts=" in caplog.text
