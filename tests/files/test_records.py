# SPDX-License-Identifier: Apache-2.0
"""The same records from every kind of place that NeMo RL reads data from, without a network."""

import json

import datasets
import pytest
from trainer_runs import run

from nemo_rl_ref.data.datasets.preference_datasets import (
    BinaryPreferenceDataset,
    PreferenceDataset,
    load_preference_dataset,
)
from nemo_rl_ref.data.datasets.response_datasets import ResponseDataset

PAIRS = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": str(n)} for n in range(12)]


@pytest.fixture(autouse=True)
def _no_cache_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()


def written(folder, kind, rows):
    """The rows in a place of one kind."""
    table = datasets.Dataset.from_list(rows)
    splits = datasets.DatasetDict({"train": table, "test": table.select([0, 1])})
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind in ("parquet", "csv"):
        getattr(table, f"to_{kind}")(str(path))
    elif kind == "arrow":
        table.save_to_disk(str(folder / "whole"))
        (path,) = (folder / "whole").glob("*.arrow")
    elif kind == "save_to_disk":
        table.save_to_disk(str(path := folder / "saved"))
    elif kind == "save_to_disk with splits":
        splits.save_to_disk(str(path := folder / "saved-splits"))
    else:
        (path := folder / "folder").mkdir()
        for name, part in splits.items():
            part.to_parquet(str(path / f"{name}.parquet"))
    return str(path)


KINDS = ["parquet", "csv", "arrow", "save_to_disk", "save_to_disk with splits", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs(tmp_path, kind):
    expected = BinaryPreferenceDataset(written(tmp_path, "jsonl", PAIRS))
    rows = [{key: f"'{value}'" for key, value in row.items()} for row in PAIRS]
    if kind == "csv":  # a column of numbers would be read as numbers
        expected = BinaryPreferenceDataset(written(tmp_path, "jsonl", rows))
    found = BinaryPreferenceDataset(written(tmp_path, kind, rows if kind == "csv" else PAIRS))
    strip = [{k: v for k, v in row.items() if k != "task_name"} for row in found.dataset]
    assert strip == [{k: v for k, v in r.items() if k != "task_name"} for r in expected.dataset]
    assert found.places[3].endswith("[3]")


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk", "folder"])
def test_nested_records(tmp_path, kind):
    pairs = BinaryPreferenceDataset(written(tmp_path, "jsonl", PAIRS)).dataset
    found = PreferenceDataset(written(tmp_path, kind, pairs)).dataset
    assert [r["completions"] for r in found] == [r["completions"] for r in pairs]
    talks = [{"messages": r["context"] + r["completions"][0]["completion"]} for r in pairs]
    (tmp_path / "talks").mkdir()
    found = ResponseDataset(written(tmp_path / "talks", kind, talks), split_validation_size=2)
    assert len(found.dataset) == 10 and len(found.val_dataset) == 2
    assert all(row["messages"] in [talk["messages"] for talk in talks] for row in found.dataset)


@pytest.mark.parametrize("kind", ["save_to_disk with splits", "folder"])
def test_splits(tmp_path, kind):
    path = written(tmp_path, kind, PAIRS)
    assert len(BinaryPreferenceDataset(path)) == 12
    test = BinaryPreferenceDataset(path, split="test")
    assert len(test) == 2 and test.places[0] == f"{path}[test][0]"
    with pytest.raises(ValueError, match=r"split: got 'dev', but .* has train, test"):
        BinaryPreferenceDataset(path, split="dev")


def test_what_is_refused(tmp_path):
    saved = written(tmp_path, "save_to_disk", PAIRS)
    with pytest.raises(ValueError, match=r"split: got 'test', but .*saved has no splits; set it"):
        BinaryPreferenceDataset(saved, split="test")
    parquet = written(tmp_path, "parquet", PAIRS)
    with pytest.raises(ValueError, match=r"subset: got 'x' with the local file .*rows\.parquet"):
        BinaryPreferenceDataset(parquet, subset="x")
    for path in (str(tmp_path / "nothing"), "./nothing.parquet"):
        with pytest.raises(FileNotFoundError, match="data_path: nothing at .*nothing"):
            BinaryPreferenceDataset(path)
    entry = {"dataset_name": "BinaryPreferenceDataset", "data_path": parquet, "split": "test"}
    with pytest.warns(UserWarning, match="split: got 'test' for the local file"):
        load_preference_dataset(entry)
    wrong = written(tmp_path, "folder", [{"prompt": "1+1=", "chosen": "2"}] * 2)
    with pytest.raises(ValueError, match=r"folder\[train\]\[0\]: no field 'rejected'"):
        BinaryPreferenceDataset(wrong)


def test_a_run_trains_on_them(tmp_path):
    """The same losses from a Parquet file and from JSON lines."""
    losses = []
    for kind in ("jsonl", "folder"):
        entry = {"dataset_name": "BinaryPreferenceDataset"}
        entry["data_path"] = written(tmp_path, kind, PAIRS)
        changes = {"data__train": entry, "dpo__val_at_start": False, "dpo__max_num_steps": 3}
        changes |= {"dpo__val_period": 0, "checkpointing__metric_name": None}
        result, metrics = run("dpo", tmp_path, name=kind, **changes)
        losses.append([values["train/loss"] for values in metrics.values()])
    assert losses[0] == losses[1] and len(losses[0]) == 3
