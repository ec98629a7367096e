# SPDX-License-Identifier: Apache-2.0
"""One run to a folder."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from pathlib import Path


class FolderInUse(OSError):
    """Another run writes to the folder. The message says which."""


class FolderLock:
    """A folder that nobody else gets until it is released, or until this process ends.

    The system holds the lock and drops it when the process dies, however that happens. The file
    ``.lock`` says who holds it.

    Args:
        folder: Made if there is none.

    Raises:
        FolderInUse: If another run has it.
        OSError: If the folder cannot be written to.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / ".lock"
        made = [path for path in self.path.parents if not path.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._made = made
        while True:
            self._file = self.path.open("a+")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                holder = self._file.read().strip() or "which did not say more"
                self._file.close()
                raise FolderInUse(
                    f"another run ({holder}) writes to {folder}; wait for its end, or give this one"
                    " a folder of its own"
                ) from None
            except OSError as error:
                warnings.warn(
                    f"{folder}: cannot be locked on this file system ({error.strerror}); start "
                    "one run at a time in it",
                    stacklevel=2,
                )
            if self._is_there():
                break
            self._file.close()  # released by another run just now
        self._file.truncate(0)
        self._file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        self._file.flush()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others have the folder. It goes if it was made for this and nothing is in it."""
        if self._file.closed:
            return
        self.path.unlink(missing_ok=True)
        self._file.close()
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # something is in it
                break
