# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are kept, which is best, and what a manager refuses."""

import json

import pytest

from nemo_rl_ref.files.sealed import CheckpointError, check_checkpoint, clear_leftovers
from nemo_rl_ref.utils.checkpoint import CheckpointManager


def manager(folder, **changes):
    config = {
        "enabled": True, "checkpoint_dir": str(folder), "metric_name": "val:loss",
        "higher_is_better": False, "keep_top_k": None, "save_period": 2, "save_optimizer": True,
    }  # fmt: skip
    return CheckpointManager({**config, **changes})


def save(target, step, **info):
    folder = target.init_tmp_checkpoint(step, info, {"step": step})
    (folder / "weights").write_text(str(step))
    target.finalize_checkpoint(folder)


def steps(folder):
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())


LOSSES = {2: 0.5, 3: 0.1, 4: 0.3, 6: 0.3, 8: 0.9}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, [2, 3, 4, 6, 8]),
        ({"keep_top_k": 1}, [6, 8]),  # of equals the newer; 3 is not periodic; the last stays
        ({"keep_top_k": 2}, [4, 6, 8]),
        ({"keep_top_k": 1, "higher_is_better": True}, [8]),
        ({"keep_top_k": 2, "metric_name": None}, [6, 8]),
        ({"ft_keep_latest_k": 1}, [2, 4, 6, 8]),  # all periodic ones, and the newest
        ({"keep_top_k": 1, "ft_keep_latest_k": 3}, [4, 6, 8]),
        ({"keep_top_k": 0}, [8]),
    ],
)
def test_what_is_kept(changes, kept, tmp_path):
    target = manager(tmp_path)
    for step, loss in LOSSES.items():
        save(target, step, **{"val:loss": loss})
    manager(tmp_path, **changes).remove_old_checkpoints()
    assert steps(tmp_path) == kept


def test_best_and_latest(tmp_path):
    target = manager(tmp_path)
    assert target.get_best_checkpoint_path() is None
    assert target.get_latest_checkpoint_path() is None
    for step, loss in LOSSES.items():
        save(target, step, **{"val:loss": loss})
    (tmp_path / "step_10_copy").mkdir()
    assert target.get_latest_checkpoint_path() == str(tmp_path / "step_8")
    assert target.get_best_checkpoint_path() == str(tmp_path / "step_3")
    largest = manager(tmp_path, higher_is_better=True)
    assert largest.get_best_checkpoint_path() == str(tmp_path / "step_8")


def test_a_checkpoint_without_the_metric_is_never_best(tmp_path):
    target = manager(tmp_path)
    save(target, 2)
    with pytest.warns(UserWarning, match=r"steps \[2\] have no 'val:loss'"):
        assert target.get_best_checkpoint_path() == str(tmp_path / "step_2")  # the latest
    save(target, 4, **{"val:loss": 9.0})
    save(target, 6)
    with pytest.warns(UserWarning, match=r"steps \[2, 6\] have no 'val:loss'"):
        assert target.get_best_checkpoint_path() == str(tmp_path / "step_4")
    manager(tmp_path, keep_top_k=1, higher_is_better=True).remove_old_checkpoints()
    assert steps(tmp_path) == [4, 6]


def test_a_nan_is_never_best(tmp_path):
    target = manager(tmp_path, keep_top_k=1, higher_is_better=True)
    for step, value in {2: 0.5, 4: float("nan"), 6: 0.1}.items():
        save(target, step, **{"val:loss": value})
    assert steps(tmp_path) == [2, 6]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    target = manager(tmp_path)
    save(target, 2, note="old")
    save(target, 2, note="new")
    assert target.load_training_info(tmp_path / "step_2") == {"note": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]
    check_checkpoint(tmp_path / "step_2")


def test_a_swap_that_was_cut_short_is_undone(tmp_path):
    target = manager(tmp_path)
    save(target, 2, note="old")
    (tmp_path / "step_2").rename(tmp_path / "old_step_2")
    (tmp_path / "tmp_step_2").mkdir()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]
    check_checkpoint(tmp_path / "step_2")


def test_nothing_is_read_before_it_is_whole(tmp_path):
    target = manager(tmp_path)
    folder = target.init_tmp_checkpoint(2, {"val:loss": 1.0}, None)
    assert target.get_latest_checkpoint_path() is None
    assert not (folder / "config.yaml").exists()
    assert json.loads((folder / "training_info.json").read_text()) == {"val:loss": 1.0}
    save(target, 4)
    (tmp_path / "step_4" / "training_info.json").write_text('{"val:loss":')
    with pytest.raises(CheckpointError, match=r"step_4/training_info\.json: cannot be read"):
        target.get_best_checkpoint_path()


def test_resume_paths(tmp_path):
    assert CheckpointManager.get_resume_paths(None) == (None, None)
    (tmp_path / "value" / "optimizer").mkdir(parents=True)
    weights, optimizer = CheckpointManager.get_resume_paths(tmp_path, model_component="value")
    assert (weights, optimizer) == (tmp_path / "value/weights", tmp_path / "value/optimizer")
    with pytest.warns(UserWarning, match="the optimizer starts afresh"):
        assert CheckpointManager.get_resume_paths(tmp_path)[1] is None


def test_only_names_of_our_own_are_put_away(tmp_path):
    """Kind: cleaning by a pattern that other names fit, too."""
    theirs = [".important.tmp", ".notes.txt.ab12cd34.tmp", "old_step_mine", "tmp_step_5.txt",
              "removed_step_", "step_7.bak", "tmp_step_final_1_2"]  # fmt: skip
    folders = ["tmp_step_dir", "old_step_by_me", "tmp_step_", "removed_step_3x"]
    for name in theirs:
        (tmp_path / name).touch()
    for name in folders:
        (tmp_path / name).mkdir()
    ours = ["tmp_step_5", "tmp_step_5_host-1.local_17", "removed_step_3"]
    for name in ours:
        (tmp_path / name).mkdir()
    (tmp_path / ".reference_logprobs.safetensors.abc_12xy.tmp").touch()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs + folders)


def test_checkpoints_of_others_are_not_removed(tmp_path):
    """NeMo RL's own have the same names, and no list of files."""
    target = manager(tmp_path, keep_top_k=1)
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "training_info.json").write_text("{}")
    for step in (2, 4):
        save(target, step, **{"val:loss": 1.0 / step})
    assert steps(tmp_path) == [1, 4]


@pytest.mark.parametrize("content", ["[]", '{"weights": 3}', "{", "null"])
def test_a_list_of_files_that_is_none_is_refused(tmp_path, content):
    save(manager(tmp_path), 2)
    (tmp_path / "step_2" / "files.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"step_2/files\.json: "):
        check_checkpoint(tmp_path / "step_2")


def test_a_file_that_was_put_to_a_model_later_is_refused(tmp_path):
    """from_pretrained would read an adapter or an index; notes beside the model are nobody's."""
    target = manager(tmp_path)
    folder = target.init_tmp_checkpoint(2, {}, {})
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").touch()
    target.finalize_checkpoint(folder)
    (tmp_path / "step_2" / "notes.txt").touch()
    check_checkpoint(tmp_path / "step_2")
    (tmp_path / "step_2" / "policy" / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: was put there later"):
        check_checkpoint(tmp_path / "step_2")
