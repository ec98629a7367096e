# SPDX-License-Identifier: Apache-2.0
"""Execute the notebooks of the site, each one once, and keep the results.

A notebook is a jupytext py:percent file, `notebooks/NAME.py`. Its executed copy is
`_build/notebooks/NAME/KEY/NAME.ipynb`, where KEY is a hash of all that the outputs may stand
on: the notebook, the package and its data, the pins and what is installed of them, the Python
version, and whether there is a CUDA device. A copy that is there is used as it is; nothing that
it was made from has changed.

All notebooks are executed before Sphinx reads the first page (`notebook_pages.py`). The same
can be had from the command line:

    python docs/_ext/execution.py                       execute what changed
    python docs/_ext/execution.py --copy-to notebooks   and put the .ipynb copies there
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notebook_cells import cell_starts, split_options

# What notebooks read: the package, the example configurations, the comparisons with TRL, the
# recorded benchmarks.
STOOD_ON = ("nemo_rl_ref", "configs", "tests/help", "benchmarks/results")
PINS = "requirements.txt"
KEPT = 3  # executed copies of one notebook that stay in the store
AT_ONCE = 2  # notebooks that are executed at the same time
CELL_TIMEOUT = 900  # seconds
LONG_CELL = 2.0  # seconds
EXPECTED = "raises-exception"
SHOW_STDERR = "show-stderr"

Log = Callable[[str], None]


class NotebookFailure(Exception):
    """A notebook that cannot be read, or a cell that raised."""


@dataclass(frozen=True)
class Notebook:
    """A notebook's source file."""

    path: Path
    root: Path

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    @property
    def shown(self) -> str:
        """The file as messages name it, relative to the project."""
        return self.path.relative_to(self.root).as_posix()

    @property
    def source(self) -> str:
        """The file's text."""
        return self.path.read_text(encoding="utf-8")


def find_notebooks(root: Path) -> list[Notebook]:
    """List the notebooks of the project whose top folder is `root`."""
    paths = sorted((root / "notebooks").glob("*.py"))
    return [Notebook(path, root) for path in paths if not path.name.startswith("_")]


# ---- the key ------------------------------------------------------------------------------


def files_stood_on(root: Path) -> list[Path]:
    """List the files that notebooks read, data included, and nothing that Python leaves there."""
    found = []
    walks = (os.walk(root / top) for top in STOOD_ON)
    for folder, subfolders, files in itertools.chain.from_iterable(walks):
        subfolders[:] = [n for n in subfolders if n != "__pycache__" and not n.startswith(".")]
        found += [
            Path(folder) / n for n in files if not n.startswith(".") and not n.endswith(".pyc")
        ]
    return sorted(found)


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

    add("executor", Path(__file__).read_bytes())
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


# ---- the store ----------------------------------------------------------------------------


def stored_path(store: Path, notebook: Notebook, key: str) -> Path:
    """Return where the executed copy of a notebook is kept."""
    return store / notebook.name / key[:16] / f"{notebook.name}.ipynb"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a notebook; a second one waits and finds the result."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such locks on Windows: two builds at once then both execute
        yield
        return
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_old(folder: Path, keep: Path) -> None:
    """Remove all but the newest executed copies of a notebook."""
    copies = sorted(folder.glob("*/*.ipynb"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in copies[KEPT:]:
        if path != keep:
            shutil.rmtree(path.parent, ignore_errors=True)


# ---- one notebook -------------------------------------------------------------------------


def read_notebook(notebook: Notebook) -> Any:
    """Read a notebook and check its cells' option lines.

    Returns:
        The notebook (an `nbformat` object), with the line above each cell in its metadata.

    Raises:
        NotebookFailure: an option line is malformed.
    """
    import jupytext
    import nbformat

    content = jupytext.reads(notebook.source, fmt="py:percent")
    starts = cell_starts(notebook.source, len(content.cells))
    if starts is None:
        raise NotebookFailure(
            f"{notebook.shown}: the '# %%' marks do not match the {len(content.cells)} cells that "
            "jupytext finds; is there a mark inside a string?"
        )
    for index, cell in enumerate(content.cells):
        cell["id"] = f"cell-{index + 1}"
        if cell.cell_type == "code":
            try:
                split_options(cell.source)
            except ValueError as error:
                raise NotebookFailure(f"{notebook.shown}:{starts[index] + 1}: {error}") from None
    content.metadata = nbformat.from_dict(
        {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {
                "name": "python",
                "version": platform.python_version(),
                "file_extension": ".py",
                "mimetype": "text/x-python",
                "pygments_lexer": "ipython3",
            },
            "source_map": starts,
        }
    )
    return content


def kernel_environment(root: Path, scratch: Path) -> dict[str, str]:
    """Return the environment variables of a kernel.

    The package is found without being installed, no file of the user's own configuration is
    read, nothing is asked of the network, and progress bars stay quiet.
    """
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    # How long a thread of GNU OpenMP waits for its siblings by spinning. Its own choice, 100 times
    # longer, makes a training step ten times slower on a busy machine. No spinning at all makes it
    # three times slower on a quiet one.
    threads = max(1, (os.cpu_count() or 1) // AT_ONCE)
    return (
        {"GOMP_SPINCOUNT": "3000", "OMP_NUM_THREADS": str(threads)}
        | os.environ
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONHASHSEED": "0",
            "IPYTHONDIR": str(scratch / "ipython"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "SOURCE_DATE_EPOCH": "0",
        }
    )


def make_client(content: Any, root: Path, scratch: Path) -> Any:
    """Make the client that executes a notebook with the Python that runs this.

    It talks to its kernel through sockets in the scratch folder, which nobody else can open and
    which two builds at once do not fight for, as they do for ports. A socket's path must be
    short: where it is not, and on Windows, ports are used.
    """
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisPython(KernelSpecManager):
        """Offers one kernel, whatever is registered on the machine."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="Python 3", language="python")

    connection = str(scratch / "kernel.json")
    sockets = os.name == "posix" and len(connection.encode()) < 90
    manager = AsyncKernelManager(
        kernel_name="python3",
        kernel_spec_manager=ThisPython(),
        connection_file=connection,
        transport="ipc" if sockets else "tcp",
    )
    return NotebookClient(
        content,
        km=manager,
        timeout=CELL_TIMEOUT,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(root)}},
    )


def run_cells(notebook: Notebook, content: Any, log: Log) -> None:
    """Execute all cells of a notebook, in place; long ones are logged as they end.

    Raises:
        NotebookFailure: a cell raised, ran too long, or was expected to raise and did not.
    """
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    with tempfile.TemporaryDirectory(prefix="notebook-") as scratch:
        client = make_client(content, notebook.root, Path(scratch))
        environment = kernel_environment(notebook.root, Path(scratch))
        folder = str(notebook.root)
        with client.setup_kernel(env=environment, cwd=folder, cleanup_kc=True):
            for index, cell in enumerate(content.cells):
                began = time.perf_counter()
                try:
                    with without_options(cell):
                        client.execute_cell(cell, index)
                except CellExecutionError as error:
                    raise NotebookFailure(failure_text(notebook, content, index, error)) from None
                except CellTimeoutError:
                    place = cell_place(notebook, content, index)
                    raise NotebookFailure(f"{place} ran longer than {CELL_TIMEOUT} s") from None
                except DeadKernelError as error:
                    place = cell_place(notebook, content, index)
                    raise NotebookFailure(f"{place} ended the kernel: {error}") from None
                check_expected_error(notebook, content, index)
                seconds = time.perf_counter() - began
                if seconds >= LONG_CELL:
                    log(f"  {cell_place(notebook, content, index)}: {seconds:.1f} s")


@contextlib.contextmanager
def without_options(cell: Any) -> Iterator[None]:
    """Hide a cell's option lines from the kernel, so that tracebacks count lines as pages do."""
    source = cell.source
    if cell.cell_type == "code":
        cell.source = split_options(source)[1]
    try:
        yield
    finally:
        cell.source = source


def check_expected_error(notebook: Notebook, content: Any, index: int) -> None:
    """Fail where a cell says that it raises and it does not."""
    cell = content.cells[index]
    if cell.cell_type != "code" or EXPECTED not in cell.metadata.get("tags", []):
        return
    if not any(output.output_type == "error" for output in cell.outputs):
        place = cell_place(notebook, content, index)
        raise NotebookFailure(f"{place} is tagged {EXPECTED!r} but raised nothing")


def cell_place(notebook: Notebook, content: Any, index: int) -> str:
    """Name a cell in a message: file and line, number among all cells, label."""
    label = split_options(content.cells[index].source)[0].get("label")
    name = f"cell {index + 1}" + (f" (label {label})" if label else "")
    line = content.metadata["source_map"][index] + 1
    return f"{notebook.shown}:{line}: {name}"


def failure_text(notebook: Notebook, content: Any, index: int, error: Any) -> str:
    """Describe a cell that raised: where, what, the lines around, the traceback."""
    cell = content.cells[index]
    code = split_options(cell.source)[1].split("\n")
    above = content.metadata["source_map"][index] + cell.source.count("\n") + 1 - len(code)
    tracebacks = [o.traceback for o in cell.outputs if o.output_type == "error"]
    trace = plain_traceback(tracebacks[-1], notebook.root) if tracebacks else ""
    frames = re.findall(r"Cell In\s?\[\d+\], line (\d+)", trace)
    bad = int(frames[0]) if frames else None
    text = [f"{cell_place(notebook, content, index)} raised {error.ename}: {error.evalue}"]
    if bad is not None:
        text.append(f"at {notebook.shown}:{above + bad}")
    text.append("")
    for number, line in enumerate(code, start=1):
        if bad is None or abs(number - bad) <= 4:
            text.append(f"{'>' if number == bad else ' '} {above + number:5d} | {line}")
    return "\n".join([*text, "", textwrap.indent(trace, "    ")])


def plain_traceback(lines: list[str], root: Path) -> str:
    """Return a traceback without colours and without the paths of this machine."""
    return shorten_paths(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines)), root)


def shorten_paths(text: str, root: Path) -> str:
    """Write paths relative to the project or to the installed packages."""
    text = text.replace(f"{root}{os.sep}", "")
    return re.sub(r"(?:~|/)[^\s'\"]*?/(?:site-packages|lib/python3\.\d+)/", "", text)


# ---- outputs ------------------------------------------------------------------------------


#: How Matplotlib shows its objects, or a list or tuple of them: a legend, a title, lines.
ARTIST = re.compile(r"[\[(\s]*(<matplotlib\.|<Figure |<Axes|Text\()")


def clean_outputs(notebook: Notebook, content: Any, log: Log) -> None:
    """Make outputs fit to print, in place.

    Error output that is no error (warnings, progress bars) goes to the log and not on the page,
    unless the cell is tagged 'show-stderr'. What Matplotlib's last call returned is no result
    beside a figure. Addresses in memory and paths of this machine, which differ in every run, are
    taken out. Of an expected error only the frames of the cell stay.
    """
    for index, cell in enumerate(content.cells):
        if cell.cell_type != "code":
            continue
        kept = []
        has_figure = any("image/png" in output.get("data", {}) for output in cell.outputs)
        for output in cell.outputs:
            data = output.get("data", {})
            if has_figure and "image/png" not in data and ARTIST.match(data.get("text/plain", "")):
                continue
            if output.output_type == "stream" and output.name == "stderr":
                if SHOW_STDERR not in cell.metadata.get("tags", []):
                    place = cell_place(notebook, content, index)
                    text = textwrap.indent(output.text.rstrip(), "    ")
                    log(f"{place} wrote to stderr:\n{text}")
                    continue
            kept.append(clean_output(output, notebook.root))
        cell.outputs = kept


def clean_output(output: Any, root: Path) -> Any:
    """Return one output without what differs from run to run."""
    if output.output_type == "stream":
        output.text = shorten_paths(output.text, root)
    elif output.output_type == "error":
        frames = [plain_traceback([frame], root) for frame in output.traceback]
        inner = [frame for frame in frames[2:-1] if frame.lstrip().startswith("Cell In")]
        output.traceback = [*frames[:2], *inner, frames[-1]] if len(frames) > 2 else frames
        output.evalue = shorten_paths(output.evalue, root)
    elif "text/plain" in output.data:
        text = re.sub(r" at 0x[0-9a-f]{6,}", "", output.data["text/plain"])
        output.data["text/plain"] = shorten_paths(text, root)
    return output


def to_bytes(content: Any) -> bytes:
    """Write a notebook as JSON that is the same in every run."""
    import nbformat

    nbformat.validate(content)
    text = json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True)
    return f"{text}\n".encode()


def execute(notebook: Notebook, log: Log) -> bytes:
    """Execute a notebook and return its executed copy, as the text of an `.ipynb` file.

    Raises:
        NotebookFailure: it cannot be read, or a cell raised.
    """
    content = read_notebook(notebook)
    run_cells(notebook, content, log)
    clean_outputs(notebook, content, log)
    return to_bytes(content)


# ---- all notebooks ------------------------------------------------------------------------


def ensure_executed(root: Path, store: Path, log: Log = print) -> dict[str, Path]:
    """Execute the notebooks that changed, or stand on something that did.

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
    with locked(store / notebook.name):
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
    try:
        executed = ensure_executed(arguments.root, store, lambda line: print(line, flush=True))
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
