# SPDX-License-Identifier: Apache-2.0
"""Where metrics go, and under which names."""

import json
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch

from nemo_rl_ref.files.metrics import JsonlLogger, read_metrics
from nemo_rl_ref.utils.logger import Logger, flatten_dict, get_next_experiment_dir
from nemo_rl_ref.utils.timer import TimeoutChecker, convert_to_seconds


def test_a_line_is_a_call(tmp_path):
    logger = Logger({"log_dir": str(tmp_path)})
    logger.log_metrics({"loss": 0.5, "lr": torch.tensor(1e-3)}, 1, prefix="train")
    logger.log_metrics(
        {"val_loss": numpy.float64(0.25), "bad": float("nan")}, 1, prefix="validation"
    )
    logger.log_metrics({"total": float("-inf")}, 2)
    logger.finish()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "train/loss": 0.5, "train/lr": pytest.approx(1e-3)},
        {"step": 1, "validation/val_loss": 0.25, "validation/bad": "nan"},
        {"step": 2, "total": "-inf"},
    ]


def test_numbers_come_back_with_all_their_bits(tmp_path):
    logger = Logger({"log_dir": str(tmp_path)})
    value = torch.rand(1, dtype=torch.float64).item() / 3
    logger.log_metrics({"loss": value}, 1, prefix="train")
    assert read_metrics(tmp_path)[1]["train/loss"] == value


def test_tensorboard_has_the_same_names(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = Logger({"log_dir": str(tmp_path), "tensorboard_enabled": True, "tensorboard": {}})
    logger.log_hyperparams({"sft": {"seed": 1, "betas": [0.9, 0.98], "none": None}})
    for step in (1, 2):
        logger.log_metrics({"loss": 1 / step, "text": [1, 2]}, step, prefix="train")
    logger.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_without_tensorboard_there_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="logger.tensorboard_enabled is true and the package"):
        logger = Logger({"log_dir": str(tmp_path), "tensorboard_enabled": True})
    assert len(logger.loggers) == 1


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="logger.log_dir: not set"):
        Logger({"log_dir": None})


def test_each_run_has_its_own_folder_and_the_later_counts(tmp_path):
    for name, losses in (("exp_001", {1: 1.0, 2: 0.9}), ("exp_002", {2: 0.8, 3: 0.7})):
        folder = get_next_experiment_dir(str(tmp_path))
        assert folder == str(tmp_path / name)
        logger = Logger({"log_dir": folder})
        for step, loss in losses.items():
            logger.log_metrics({"loss": loss}, step, prefix="train")
        logger.finish()
    with (tmp_path / "exp_002" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # what a full disk leaves
    merged = {step: values["train/loss"] for step, values in read_metrics(tmp_path).items()}
    assert merged == {1: 1.0, 2: 0.8, 3: 0.7}


def test_folders_are_counted_and_not_spelt(tmp_path):
    """Kind: order by the text of a name. Other names, and marks of a pattern, are no numbers."""
    base = tmp_path / "runs[lr=1] *"
    for name in ("exp_999", "exp_1000", "exp_5000_copy", "exp_x"):
        (base / name).mkdir(parents=True)
        Logger({"log_dir": str(base / name)}).log_metrics({"loss": len(name)}, 1)
    assert read_metrics(base) == {1: {"loss": 8}}
    assert get_next_experiment_dir(str(base)) == str(base / "exp_1001")


def test_two_runs_that_start_at_once_have_two_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(get_next_experiment_dir, [str(tmp_path)] * 40))
    assert len(set(folders)) == 40


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    """Kind: a write that is short and no error. What is logged later is whole again."""
    log, path = JsonlLogger(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl"
    log.log_metrics({"loss": 1.0}, 1)
    before = path.read_text()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
    try:
        with pytest.raises(OSError):
            log.log_metrics({"loss": 0.5}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == before
    log.log_metrics({"loss": 0.25}, 3)
    assert {step: line["loss"] for step, line in read_metrics(tmp_path).items()} == {
        1: 1.0,
        3: 0.25,
    }


def test_a_line_that_is_none_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of metrics: "):
        read_metrics(tmp_path)


def test_batches_and_strings(tmp_path):
    logger = Logger({"log_dir": str(tmp_path)})
    logger.log_batched_dict_as_jsonl(
        {"ids": torch.tensor([[1, 2], [3, 4]]), "text": ["a", "b"]}, "x/b.jsonl"
    )
    logger.log_string_list_as_jsonl(['{"a": 1}'], "s.jsonl")
    logger.log_string_list_as_jsonl(['{"a": 2}'], "s.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "x/b.jsonl").read_text().splitlines()]
    assert rows == [
        {"ids": [[1, 2]], "text": ["a"], "idx": 0},
        {"ids": [[3, 4]], "text": ["b"], "idx": 1},
    ]
    assert (tmp_path / "s.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'


def test_flatten_dict():
    nested = {"a": [1, {"b": 2}], "c": {"d": None}}
    assert flatten_dict(nested) == {"a.0": 1, "a.1.b": 2, "c.d": None}
    assert flatten_dict(nested, sep="/", expand_lists=False) == {"a": [1, {"b": 2}], "c/d": None}


def test_timeout():
    assert convert_to_seconds("01:02:03:04") == 93784
    with pytest.raises(ValueError, match="got '4h', expected DD:HH:MM:SS"):
        convert_to_seconds("4h")
    assert not TimeoutChecker(None).check_save()
    over = TimeoutChecker("00:00:00:00")
    assert [over.check_save(), over.check_save()] == [True, False]
    tight = TimeoutChecker("00:00:01:00", fit_last_save_time=True)
    assert not tight.check_save()
    tight.iteration_times = [100.0]
    assert tight.check_save()


@pytest.mark.parametrize("name", ["runs[lr=1]", "a*b", "what?", "{x}", "[!a]"])
def test_each_run_has_its_own_folder_whatever_the_name_holds(tmp_path, name):
    """A name is no pattern; two runs would append to one log."""
    folders = [get_next_experiment_dir(str(tmp_path / name)) for _ in range(3)]
    assert [Path(folder).name for folder in folders] == ["exp_001", "exp_002", "exp_003"]
