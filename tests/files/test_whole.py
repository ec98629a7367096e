# SPDX-License-Identifier: Apache-2.0
"""A file is there whole or as it was before."""

import os
import signal
import stat

import pytest

from nemo_rl_ref.files.whole import replacing, write_text


def test_a_file_is_written_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "größer\n")
    assert path.read_text(encoding="utf-8") == "größer\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    write_text(path, "again")
    assert path.read_text() == "again" and list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_killed_program_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    child = os.fork()
    if not child:
        with replacing(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_text() == "before"
