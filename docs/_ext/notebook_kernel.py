# SPDX-License-Identifier: Apache-2.0
"""One notebook, executed in a kernel: its outputs, the values it stores, what is said if it fails.

A notebook is a jupytext py:percent file. Its executed copy is the text of an `.ipynb` file that is
the same in every run, without addresses in memory and paths of this machine.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notebook_cells import VALUES_MIME, Num, cell_starts, parse_options

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


def execute(notebook: Notebook, log: Log) -> bytes:
    """Execute a notebook and return its executed copy, as the text of an `.ipynb` file.

    Raises:
        NotebookFailure: it cannot be read, a cell raised, or a value cannot be evaluated.
    """
    import nbformat

    content, nums = read_notebook(notebook)
    run_cells(notebook, content, nums, log)
    nbformat.validate(content)
    text = json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True)
    return f"{text}\n".encode()


def read_notebook(notebook: Notebook) -> tuple[Any, dict[int, list[Num]]]:
    """Read a notebook; take the option lines off its cells.

    Returns:
        The notebook (an `nbformat` object), and the values to store by the index of their cell. A
        code cell's metadata has its other options and how many lines stood above its code; the
        notebook's has the line above each cell.

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
    nums = {}
    for index, cell in enumerate(content.cells):
        cell["id"] = f"cell-{index + 1}"
        if cell.cell_type != "code":
            continue
        try:
            options, nums[index], above = parse_options(cell.source)
            if nums[index] and EXPECTED in cell.metadata.get("tags", []):
                line = nums[index][0].line
                raise ValueError(f"a cell tagged {EXPECTED!r} stores no values", line)
        except ValueError as error:
            message, line = error.args
            raise NotebookFailure(
                f"{notebook.shown}:{starts[index] + 1 + line}: {message}"
            ) from None
        cell.metadata |= {"options": options, "lines_above": above}
        cell.source = "\n".join(cell.source.split("\n")[above:])
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
    return content, nums


# ---- the kernel -------------------------------------------------------------------------------


#: Figures are sharp at any width, and their ground is the page's.
FIGURES = """
c.InlineBackend.figure_formats = {"svg"}
c.InlineBackend.print_figure_kwargs = {"bbox_inches": "tight", "facecolor": "none"}
c.InlineBackend.rc = {"svg.hashsalt": "nemo_rl_ref"}
"""


def kernel_environment(root: Path, scratch: Path) -> dict[str, str]:
    """Return the environment variables of a kernel.

    The package is found without being installed, no file of the user's own configuration is
    read, nothing is asked of the network, and progress bars stay quiet.
    """
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    profile = scratch / "ipython/profile_default"
    profile.mkdir(parents=True)
    (profile / "ipython_kernel_config.py").write_text(FIGURES, "utf-8")
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


def run_cells(
    notebook: Notebook,
    content: Any,
    nums: dict[int, list[Num]],
    log: Log,
    progress: Log | None = None,
) -> None:
    """Execute all cells of a notebook, in place; long ones are logged as they end.

    Args:
        notebook: the notebook.
        content: what `read_notebook` read, with the values to store.
        nums: those values.
        log: told of long cells and of what cells wrote to stderr.
        progress: told of every cell, before and after; long ones are not logged then.

    Raises:
        NotebookFailure: a cell raised, ran too long, or was expected to raise and did not; or a
            value cannot be evaluated.
    """
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    with tempfile.TemporaryDirectory(prefix="notebook-") as scratch:
        client = make_client(content, notebook.root, Path(scratch))
        environment = kernel_environment(notebook.root, Path(scratch))
        folder = str(notebook.root)
        with client.setup_kernel(env=environment, cwd=folder, cleanup_kc=True):
            for index, cell in enumerate(content.cells):
                if cell.cell_type != "code":
                    continue
                place = cell_place(notebook, content, index)
                if progress:
                    progress(f"[{index + 1}/{len(content.cells)}] {place}")
                began = time.perf_counter()
                try:
                    client.execute_cell(cell, index)
                except CellExecutionError as error:
                    raise NotebookFailure(failure_text(notebook, content, index, error)) from None
                except CellTimeoutError:
                    raise NotebookFailure(f"{place} ran longer than {CELL_TIMEOUT} s") from None
                except DeadKernelError as error:
                    raise NotebookFailure(f"{place} ended the kernel: {error}") from None
                raised = any(output.output_type == "error" for output in cell.outputs)
                if EXPECTED in cell.metadata.get("tags", []) and not raised:
                    raise NotebookFailure(f"{place} is tagged {EXPECTED!r} but raised nothing")
                drop_artist(client, cell)
                clean_outputs(notebook.root, place, cell, log)
                store_values(notebook, content, index, client, nums[index])
                seconds = time.perf_counter() - began
                if progress:
                    progress(f"    {seconds:.1f} s")
                elif seconds >= LONG_CELL:
                    log(f"  {place}: {seconds:.1f} s")


def evaluate(client: Any, expressions: dict[str, str]) -> dict[str, Any]:
    """Evaluate expressions in a notebook's kernel; the answers by name, as Jupyter gives them."""
    from nbclient.util import run_sync

    async def ask() -> Any:
        return await client.kc.execute(
            "", silent=True, user_expressions=expressions, reply=True, timeout=CELL_TIMEOUT
        )

    return run_sync(ask)()["content"]["user_expressions"]


#: Whether the result of an execution is one of Matplotlib's objects, or a list or tuple of them,
#: or of lists or arrays of them. A class of the reader's whose repr looks like theirs is none.
IS_ARTIST = """(lambda value, module: module is not None and (
    lambda parts: bool(parts) and all(isinstance(part, module.Artist) for part in parts)
)([
    part
    for item in (value if isinstance(value, (list, tuple)) else [value])
    for part in (item if isinstance(item, (list, tuple)) else getattr(item, "flat", [item]))
]))(
    __import__("IPython").get_ipython().user_ns["_oh"].get({count}),
    __import__("sys").modules.get("matplotlib.artist"),
)"""


def drop_artist(client: Any, cell: Any) -> None:
    """Drop a cell's result beside a figure where it is only what Matplotlib's last call returned."""
    if not any("image/svg+xml" in output.get("data", {}) for output in cell.outputs):
        return
    for output in [o for o in cell.outputs if o.output_type == "execute_result"]:
        asked = IS_ARTIST.replace("{count}", str(output.execution_count)).replace("\n", " ")
        answer = evaluate(client, {"artist": asked})["artist"]
        if answer["status"] == "ok" and answer["data"]["text/plain"] == "True":
            cell.outputs.remove(output)


def store_values(
    notebook: Notebook, content: Any, index: int, client: Any, nums: list[Num]
) -> None:
    """Evaluate a cell's values in its kernel and add them to its outputs.

    Raises:
        NotebookFailure: an expression raises, a format does not fit, the text is empty or has
            several lines, or it is a number that was not formatted.
    """
    from nbformat.v4 import new_output

    if not nums:
        return
    answers = evaluate(client, {num.name: num.expression for num in nums})
    texts = {}
    for num in nums:
        found = answers[num.name]
        why = None
        if found["status"] == "error":
            why = f"{found['ename']}: {found['evalue']}"
        else:
            text = texts[num.name] = ast.literal_eval(found["data"]["text/plain"])
            if not text.strip() or "\n" in text:
                why = f"it should be one line of text, got {text!r}"
            elif re.search(r"\d\.\d{9}", text):
                why = f"a number should be formatted, like {{loss:.3g}}, got {text!r}"
        if why:
            place = cell_place(notebook, content, index, num.line)
            raise NotebookFailure(f"{place}: value {num.name!r} = {num.text!r}: {why}")
    width = max(map(len, texts))
    lines = "\n".join(f"{name:<{width}}  {text}" for name, text in texts.items())
    cell = content.cells[index]
    cell.outputs.append(new_output("display_data", {VALUES_MIME: texts, "text/plain": lines}))


# ---- messages ---------------------------------------------------------------------------------


def cell_place(notebook: Notebook, content: Any, index: int, line: int = 0) -> str:
    """Name a cell, or a line in it, in a message: file and line, number of the cell, label."""
    label = content.cells[index].metadata["options"].get("label")
    name = f"cell {index + 1}" + (f" (label {label})" if label else "")
    return f"{notebook.shown}:{content.metadata['source_map'][index] + 1 + line}: {name}"


def failure_text(notebook: Notebook, content: Any, index: int, error: Any) -> str:
    """Describe a cell that raised: where, what, the lines around, the traceback."""
    cell = content.cells[index]
    above = content.metadata["source_map"][index] + cell.metadata["lines_above"]
    tracebacks = [o.traceback for o in cell.outputs if o.output_type == "error"]
    trace = plain_traceback(tracebacks[-1], notebook.root) if tracebacks else ""
    frames = re.findall(r"Cell In\s?\[\d+\], line (\d+)", trace)
    bad = int(frames[0]) if frames else None
    text = [f"{cell_place(notebook, content, index)} raised {error.ename}: {error.evalue}"]
    if bad is not None:
        text.append(f"at {notebook.shown}:{above + bad}")
    text.append("")
    for number, line in enumerate(cell.source.split("\n"), start=1):
        if bad is None or abs(number - bad) <= 4:
            text.append(f"{'>' if number == bad else ' '} {above + number:5d} | {line}")
    return "\n".join([*text, "", textwrap.indent(trace, "    ")])


def plain_traceback(lines: list[str], root: Path) -> str:
    """Return a traceback without colors and without the paths of this machine."""
    return shorten_paths(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines)), root)


def shorten_paths(text: str, root: Path) -> str:
    """Write paths relative to the project or to the installed packages."""
    text = text.replace(f"{root}{os.sep}", "")
    return re.sub(r"(?:~|/)[^\s'\"]*?/(?:site-packages|lib/python3\.\d+)/", "", text)


# ---- outputs ----------------------------------------------------------------------------------


def clean_outputs(root: Path, place: str, cell: Any, log: Log) -> None:
    """Make a cell's outputs fit to print, in place.

    Error output that is no error (warnings, progress bars) goes to the log and not on the page,
    unless the cell is tagged 'show-stderr'. Addresses in memory and paths of this machine, which
    differ in every run, are taken out. Of an expected error only the frames of the cell stay.
    """
    kept = []
    for output in cell.outputs:
        is_stderr = output.output_type == "stream" and output.name == "stderr"
        if is_stderr and SHOW_STDERR not in cell.metadata.get("tags", []):
            text = textwrap.indent(output.text.rstrip(), "    ")
            log(f"{place} wrote to stderr:\n{text}")
        else:
            kept.append(clean_output(output, root))
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
