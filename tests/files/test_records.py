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
from nemo_rl_ref.files.records import MAX_LINE, DataError, Records

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


# JSON, text and CSV as people write them


def test_a_json_array_is_a_list_of_records(tmp_path):
    """Whatever the suffix and the white space, also behind a byte order mark."""
    for number, kind in enumerate(("json", "jsonl")):
        path = tmp_path / f"{number}.{kind}"
        path.write_text("\ufeff \n" + json.dumps(PAIRS, indent=1), encoding="utf-8")
        found = Records(str(path))
        assert found.dataset == PAIRS and found.places[3] == f"{path}[3]"


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = "".join(json.dumps(row) + "\r\n" for row in PAIRS)
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert Records(str(path)).dataset == PAIRS


def test_a_text_has_a_record_a_line(tmp_path):
    (tmp_path / "rows.txt").write_text("1+2=\n2+3=\n")
    found = ResponseDataset(str(tmp_path / "rows.txt"), input_key="text", output_key="text")
    assert [row["messages"][0]["content"] for row in found.dataset] == ["1+2=", "2+3="]


def test_a_csv_of_numbers_is_text(tmp_path):
    (tmp_path / "rows.csv").write_text("input,output\n12,1.5\n13,2\n")
    found = ResponseDataset(str(tmp_path / "rows.csv"))
    assert [m["content"] for m in found.dataset[0]["messages"]] == ["12", "1.5"]


def test_an_empty_cell_of_a_csv_is_no_text(tmp_path):
    (tmp_path / "rows.csv").write_text("input,output\n12,3\n13,\n")
    with pytest.raises(DataError, match=r"rows\.csv\[1\]: field 'output' is NoneType"):
        ResponseDataset(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.JSONL", "rows.xml", "rows"])
def test_a_file_of_another_kind_is_refused_by_its_suffix(tmp_path, name, monkeypatch):
    """Not looked for on the hub, whether the path is relative or not."""
    (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for path in (name, str(tmp_path / name)):
        with pytest.raises(ValueError, match=rf"data_path: got .*{name}, expected a file with the"):
            Records(path)


@pytest.mark.parametrize(("name", "raw", "message"), [
    ("a.jsonl", b'{"a": "\\ud83d"}', r"a\.jsonl:1: '\\ud83d' is half a character"),
    ("a.jsonl", b'{"\\udc00": 1}', r"a\.jsonl:1: '\\udc00' is half a character"),
    ("a.jsonl", b'{}\n{"a": ' + b"[" * 200_000, r"a\.jsonl:2: nested too deeply"),
    ("a.json", b"[" * 200_000, r"a\.json: nested too deeply"),
    ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: not JSON \(Exceeds the limit"),
    ("a.jsonl", b"{}\n\xff\n", r"a\.jsonl:2: not UTF-8 at byte 0"),
    ("a.json", b'[{}, {"a": }]', r"a\.json: not JSON \(Expecting value, column 12\)"),
    ("a.json", b"[{}, 3]", r"a\.json\[1\]: got a JSON int; expected an object"),
    ("a.json", b"[]", r"a\.json: no records"),
    ("a.csv", b"a,b\n1,2\n1,2,3,4\n", r"a\.csv: cannot be read: Error tokenizing data.* line 3"),
    ("a.csv", b"", r"a\.csv: cannot be read: "),
    ("a.csv", b"a,b\n\xff,1\n", r"a\.csv: cannot be read: 'utf-8' codec"),
    ("a.parquet", b"PAR1", r"a\.parquet: cannot be read: "),
    ("a.arrow", b"x", r"a\.arrow: cannot be read: "),
])  # fmt: skip
def test_a_damaged_file_is_one_line_with_its_place(tmp_path, name, raw, message):
    """Whatever library reads it: half a surrogate pair, depth, digits, encodings, columns."""
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        Records(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1


def test_both_halves_of_a_surrogate_pair_are_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert Records(str(tmp_path / "a.jsonl"))[0] == {"a": "\N{GRINNING FACE}"}


def test_a_line_without_end_is_not_read_whole(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"a": "')
        file.truncate(10 * MAX_LINE)  # a hole: zeros
    with pytest.raises(DataError, match=r"a\.jsonl:1: got more than 33554432 bytes, expected one"):
        Records(str(tmp_path / "a.jsonl"))
