# SPDX-License-Identifier: Apache-2.0
"""Where a study is kept: a SQLite file by default, or any database that Optuna can use."""

from __future__ import annotations

import fcntl
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

#: The file of a study in its folder.
FILE = "study.db"
#: Seconds that a transaction waits for the others before it fails.
PATIENCE = 120


def open_storage(
    url: str | None, folder: str | Path, *, heartbeat: int = 5, grace: int = 60
) -> RDBStorage:
    """Open the storage of a study, or make it.

    SQLite is set up so that several processes can use one file, and any of them can be killed:
    a write-ahead log, and transactions that are exclusive from their first statement on. Optuna's
    steps such as "take this trial if nobody has" read before they write; without it, two processes
    can both take it.

    Args:
        url: A database in SQLAlchemy's form; None for ``study.db`` in the folder.
        folder: The folder of the study. It is made.
        heartbeat: Seconds between two signs of life of a running trial.
        grace: Seconds without one after which a trial counts as abandoned.

    Returns:
        The storage.

    Raises:
        ValueError: If the database cannot be used; the message has its address, without password.
    """
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    url = url or f"sqlite:///{(folder / FILE).resolve()}"
    is_file = url.startswith("sqlite:")
    options = {"connect_args": {"timeout": PATIENCE}} if is_file else {}
    with warnings.catch_warnings(), _alone(folder / ".open"):
        # Optuna has called its heartbeat experimental since 2021.
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            storage = RDBStorage(
                url, engine_kwargs=options, heartbeat_interval=heartbeat, grace_period=grace
            )
        except SQLAlchemyError as error:
            why = str(error).splitlines()[0]
            raise ValueError(
                f"storage: got {address(url)}, expected a database as sqlite:///study.db or "
                f"postgresql://user@host/name: {why}"
            ) from error
        if is_file:
            _prepare_sqlite(storage.engine)
    return storage


def address(url: str) -> str:
    """A database's address without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def _prepare_sqlite(engine: Any) -> None:
    """Make SQLite's transactions exclusive from the start, as SQLAlchemy's documentation does it."""
    from sqlalchemy import event

    engine.dispose()  # connections made so far have other settings

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # sqlite3 starts no transaction by itself
        connection.execute("PRAGMA journal_mode=WAL")
        # Safe against killed processes. A power cut can take the last transactions, never the file.
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process at a time is inside; the tables are made by one."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system gives it back if the process dies
        yield
