# SPDX-License-Identifier: Apache-2.0
"""A folder has one writer at a time, and nothing is left of one that is gone."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from nemo_rl_ref.files.lock import FolderInUse, FolderLock


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "a" / "b"
    first = FolderLock(folder)
    with pytest.raises(FolderInUse) as caught:
        FolderLock(folder)
    holder = f"host {socket.gethostname()}, pid {os.getpid()}"
    assert str(caught.value).startswith(f"another run ({holder}) writes to {folder}")
    first.release()
    first.release()
    assert not (tmp_path / "a").exists()  # nothing was written, and it was not there before
    FolderLock(folder).release()


def test_what_is_in_the_folder_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    lock = FolderLock(tmp_path / "mine")
    lock.release()
    lock = FolderLock(tmp_path / "new")
    (tmp_path / "new" / "file").touch()
    lock.release()
    assert (tmp_path / "mine").exists() and os.listdir(tmp_path / "new") == ["file"]


def test_the_lock_dies_with_its_process(tmp_path):
    script = (
        "import sys, time\nfrom nemo_rl_ref.files.lock import FolderLock\n"
        "lock = FolderLock(sys.argv[1])\nprint('locked', flush=True)\ntime.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(FolderInUse, match=f"pid {child.pid}"):
        FolderLock(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    FolderLock(tmp_path).release()


def test_of_many_at_once_one_gets_it(tmp_path):
    """Taken and given back all the time: a file that was just removed is no lock."""
    script = (
        "import sys, time, pathlib\nfrom nemo_rl_ref.files.lock import FolderInUse, FolderLock\n"
        "mark, end = pathlib.Path(sys.argv[1] + '/mark'), time.monotonic() + 1.5\n"
        "while time.monotonic() < end:\n"
        "    try:\n        lock = FolderLock(sys.argv[1])\n"
        "    except FolderInUse:\n        continue\n"
        "    mark.open('x').close()\n    mark.unlink()\n    lock.release()\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", script, tmp_path]) for _ in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    assert os.listdir(tmp_path) == []
