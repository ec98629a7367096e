# SPDX-License-Identifier: Apache-2.0
"""The executed notebooks of the site: each one run once, and kept until something changes.

A notebook is `notebooks/NAME.py`. Its executed copy is `_build/notebooks/NAME/KEY/NAME.ipynb`,
where KEY is a hash of all that the outputs may stand on: the notebook, the other files beside it,
the package and its data, the pins and what is installed of them, the Python version, and whether
there is a CUDA device. A copy that is there is used as it is; nothing that it was made from has
changed.

All notebooks are executed before Sphinx reads the first page (`notebook_pages.py`). The same
can be had from the command line:

    python docs/_ext/execution.py                       execute what changed
    python docs/_ext/execution.py --copy-to notebooks   and put the .ipynb copies there
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from filelock import FileLock, Timeout
from notebook_kernel import AT_ONCE, Log, Notebook, NotebookFailure, execute

# What notebooks read: the package, the example configurations, the recorded results.
STOOD_ON = ("nemo_rl_ref", "configs", "benchmarks/results")
EXECUTORS = ("execution.py", "notebook_cells.py", "notebook_kernel.py")
PINS = "requirements.txt"
KEPT = 3  # executed copies of one notebook that stay in the store


def find_notebooks(root: Path) -> list[Notebook]:
    """List the notebooks of the project whose top folder is `root`."""
    paths = sorted((root / "notebooks").glob("*.py"))
    return [Notebook(path, root) for path in paths if not path.name.startswith("_")]


# ---- the key ----------------------------------------------------------------------------------


def files_stood_on(root: Path) -> list[Path]:
    """List the files that notebooks read, data included, and nothing that Python leaves there.

    Of the notebooks' own folder that is all but the notebooks and their `.ipynb` copies.
    """
    found = []
    for top in (*STOOD_ON, "notebooks"):
        for folder, subfolders, files in os.walk(root / top):
            subfolders[:] = [n for n in subfolders if n != "__pycache__" and not n.startswith(".")]
            found += [Path(folder, n) for n in files if not n.startswith(".") and n[-4:] != ".pyc"]
    notebooks = [notebook.path for notebook in find_notebooks(root)]
    copies = [path.with_suffix(".ipynb") for path in notebooks]
    return sorted(set(found) - {*notebooks, *copies})


def pinned_names(pins: str) -> list[str]:
    """List the distributions that a requirements file names."""
    lines = (line.split("#")[0].strip() for line in pins.splitlines())
    return [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in lines if line and line[0] != "-"]


def installed_version(name: str) -> str:
    """Return the version of an installed distribution, or 'absent'."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def has_cuda() -> bool:
    """Say whether notebooks will find a CUDA device, without loading torch to ask."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def environment_key(root: Path) -> str:
    """Hash all that every notebook stands on."""
    state = hashlib.sha256()

    def add(name: str, content: bytes) -> None:
        state.update(f"{name}\0{len(content)}\0".encode())
        state.update(content)

    for name in EXECUTORS:
        add(name, Path(__file__).with_name(name).read_bytes())
    for path in files_stood_on(root):
        add(path.relative_to(root).as_posix(), path.read_bytes())
    pins = root / PINS
    if pins.is_file():
        add(PINS, pins.read_bytes())
        for name in pinned_names(pins.read_text(encoding="utf-8")):
            add(name, installed_version(name).encode())
    add("python", f"{sys.version} {sys.platform} {platform.machine()}".encode())
    add("cuda", str(has_cuda()).encode())
    return state.hexdigest()


def notebook_key(notebook: Notebook, environment: str) -> str:
    """Hash a notebook together with what it stands on.

    Args:
        notebook: the notebook.
        environment: the result of `environment_key`.
    """
    return hashlib.sha256(f"{environment}\0{notebook.source}".encode()).hexdigest()


# ---- the store --------------------------------------------------------------------------------


def stored_path(store: Path, notebook: Notebook, key: str) -> Path:
    """Return where the executed copy of a notebook is kept."""
    return store / notebook.name / key[:16] / f"{notebook.name}.ipynb"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_old(folder: Path, keep: Path) -> None:
    """Remove all but the newest executed copies of a notebook."""
    copies = sorted(folder.glob("*/*.ipynb"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in copies[KEPT:]:
        if path != keep:
            shutil.rmtree(path.parent, ignore_errors=True)


#: The locks that this process holds, by file; one that nothing refers to would be released.
HELD: dict[Path, FileLock] = {}


def hold(store: Path, log: Log) -> None:
    """Wait until no other process builds with a store, and keep others out until this one ends.

    Args:
        store: the folder that keeps executed copies.
        log: told if there is something to wait for.
    """
    path = store.resolve() / ".lock"
    if path in HELD:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log(f"waiting for another build in {store.parent} to end ...")
        lock.acquire()
    HELD[path] = lock


# ---- all notebooks ----------------------------------------------------------------------------


def ensure_executed(root: Path, store: Path, log: Log = print) -> dict[str, Path]:
    """Execute the notebooks that changed, or stand on something that did.

    No other process may do the same at the same time, see `hold`.

    Args:
        root: the project's top folder.
        store: the folder that keeps executed copies.
        log: called with each line of progress.

    Returns:
        The executed copy of each notebook, by the notebook's name.

    Raises:
        NotebookFailure: a notebook cannot be read, or a cell raised.
    """
    root = root.resolve()
    notebooks = find_notebooks(root)
    environment = environment_key(root) if notebooks else ""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        copies = {
            nb.name: pool.submit(executed_copy, nb, environment, store, log) for nb in notebooks
        }
        wait(copies.values(), return_when=FIRST_EXCEPTION)
        for copy in copies.values():
            copy.cancel()  # after a failure: those that have not begun; the others come to an end
        done = [copy for copy in copies.values() if copy.done() and not copy.cancelled()]
        for copy in done:
            copy.result()  # raises what a notebook raised
        return {name: copy.result() for name, copy in copies.items()}


def executed_copy(notebook: Notebook, environment: str, store: Path, log: Log) -> Path:
    """Return the executed copy of one notebook, executing it if there is none.

    Where something it stands on was edited while it ran, nobody can say which state its outputs
    belong to. This build uses them, under a key that no later build asks for.
    """
    key = notebook_key(notebook, environment)
    path = stored_path(store, notebook, key)
    if path.is_file():
        return path
    log(f"executing {notebook.shown} ...")
    began = time.perf_counter()
    content = execute(notebook, log)
    log(f"executed {notebook.shown} in {time.perf_counter() - began:.1f} s")
    after = notebook_key(notebook, environment_key(notebook.root))
    if after != key:
        log(f"{notebook.shown} or the package was edited meanwhile; build once more")
        mixed = hashlib.sha256(f"{key}\0{after}".encode()).hexdigest()
        path = stored_path(store, notebook, mixed)
    write_atomically(path, content)
    remove_old(store / notebook.name, keep=path)
    return path


def main() -> int:
    """Execute the project's notebooks from the command line."""
    parser = argparse.ArgumentParser(description="Execute the notebooks that changed.")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--store", type=Path, help="default: _build/notebooks under the root")
    parser.add_argument("--copy-to", type=Path, help="a folder for .ipynb copies")
    arguments = parser.parse_args()
    store = arguments.store or arguments.root / "_build" / "notebooks"

    def log(line: str) -> None:
        print(line, flush=True)

    try:
        hold(store, log)
        executed = ensure_executed(arguments.root, store, log)
    except NotebookFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    for name, path in executed.items():
        if arguments.copy_to is not None:
            path = shutil.copyfile(path, arguments.copy_to / f"{name}.ipynb")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
