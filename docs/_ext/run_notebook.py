# SPDX-License-Identifier: Apache-2.0
"""Runs one notebook and keeps what it shows, `make run NB=custom_dpo`.

    python docs/_ext/run_notebook.py custom_dpo

Says which cell runs and how long each took, and writes `_build/run/custom_dpo.ipynb` and `.html`, also
where a cell raises: then with the outputs up to there.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from execution import find_notebooks, write_atomically
from notebook_kernel import Notebook, NotebookFailure, read_notebook, run_cells
from portable import link_elsewhere

TOP = Path(__file__).parents[2]


def run(notebook: Notebook, folder: Path) -> list[Path]:
    """Run a notebook; return the files with its outputs.

    Raises:
        NotebookFailure: it cannot be read, or a cell raised; the files are written all the same.
    """
    content, nums = read_notebook(notebook)
    files = [folder / f"{notebook.name}{suffix}" for suffix in (".ipynb", ".html")]
    try:
        run_cells(notebook, content, nums, say, progress=say)
    finally:
        text = json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True)
        write_atomically(files[0], f"{text}\n".encode())
        write_atomically(files[1], html_of(content, notebook.name).encode())
    return files


def html_of(content: dict[str, Any], name: str) -> str:
    """Return an executed notebook as one HTML file, its images inside, as MyST-NB draws it."""
    from docutils.core import publish_string
    from myst_nb.docutils_ import Parser

    content = json.loads(json.dumps(content))
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = link_elsewhere(cell["source"], "", None, None)
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "nb_execution_mode": "off",
            "nb_output_folder": scratch,
            "myst_enable_extensions": ["amsmath", "dollarmath"],
            "output_encoding": "unicode",
            "math_output": "MathML",
            "report_level": 5,
            "embed_stylesheet": True,
        }
        page = publish_string(
            json.dumps(content),
            source_path=f"{name}.ipynb",
            parser=Parser(),
            writer="html5",
            settings_overrides=settings,
        )

        def inside(found: re.Match[str]) -> str:
            data = base64.b64encode(Path(scratch, Path(found[1]).name).read_bytes()).decode()
            kind = "svg+xml" if found[1].endswith(".svg") else found[1].rpartition(".")[2]
            return f'src="data:image/{kind};base64,{data}"'

        return re.sub(r'src="([^":]*\.(?:png|svg|jpe?g))"', inside, page)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main() -> int:
    """Run the notebook that the command line names."""
    notebooks = {notebook.name: notebook for notebook in find_notebooks(TOP)}
    parser = argparse.ArgumentParser(description="Run one notebook and keep what it shows.")
    parser.add_argument("notebook", help=f"one of {', '.join(notebooks)}")
    parser.add_argument("--to", type=Path, default=TOP / "_build" / "run", help="the folder")
    arguments = parser.parse_args()
    name = Path(arguments.notebook).stem
    if name not in notebooks:
        parser.error(f"there is no notebook {name!r}; there are {', '.join(notebooks)}")
    try:
        files = run(notebooks[name], arguments.to)
    except NotebookFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    for file in files:
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
