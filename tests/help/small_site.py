# SPDX-License-Identifier: Apache-2.0
"""A small site of our own, built with the project's conf.py and extensions."""

import base64
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup

TOP = Path(__file__).parents[2]
PNG = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c63f8"
        "cfc0f01f0005000201e221bc330000000049454e44ae426082"
    )
).decode()


@dataclass
class Built:
    """What a run of Sphinx left."""

    code: int
    text: str
    site: "Site"

    def page(self, path: str) -> BeautifulSoup:
        """Parse a built page."""
        return BeautifulSoup(self.site.html.joinpath(path).read_text("utf-8"), "html.parser")


@dataclass
class Site:
    """A project's folder: conf.py, docs/, notebooks/, nemo_rl_ref/."""

    top: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def html(self) -> Path:
        """The folder of built pages."""
        return self.top / "_build" / "html"

    def write(self, path: str, text: str) -> None:
        """Write a file of the project, making its folder."""
        file = self.top / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")

    def notebook(self, name: str, *cells: str) -> None:
        """Write a py:percent notebook; each cell is given without its `# %%` unless it has one."""
        blocks = [textwrap.dedent(cell).strip("\n") for cell in cells]
        marked = [block if block.startswith("# %%") else f"# %%\n{block}" for block in blocks]
        self.write(f"notebooks/{name}.py", "\n\n".join(marked) + "\n")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a Python command in the project's folder."""
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.top,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def build(self, *options: str, builder: str = "html") -> Built:
        """Run Sphinx as `make html` does, in a process of its own that has it loaded already."""
        arguments = ["-b", builder, "-W", "--keep-going", "-d", "_build/doctrees"]
        arguments += [*options, ".", f"_build/{builder}"]
        with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
            process = PROCESSES.Process(
                target=run_sphinx,
                args=(str(self.top), os.environ | self.environment, output.name, arguments),
            )
            process.start()
            process.join(timeout=120)
            if process.is_alive():
                process.kill()
                process.join()
            return Built(process.exitcode, output.read(), self)

    def equations(
        self,
        checked: dict[str, dict[str, Any]],
        unchecked: dict[str, str] | None = None,
        runtime: str = "",
    ) -> None:
        """Set what the checks of the site's equations are to find."""
        self.write("nemo_rl_ref/equations/__init__.py", "")
        self.write("nemo_rl_ref/equations/__main__.py", EQUATIONS)
        found = {"runtime": runtime, "checked": checked, "unchecked": unchecked or {}}
        self.write("nemo_rl_ref/equations/found.json", json.dumps(found))

    def executions(self) -> list[str]:
        """List the notebooks that ran, one entry for each time; they note it themselves."""
        file = self.top / "runs.txt"
        return file.read_text().split() if file.is_file() else []


#: Children of a process that has loaded what every build loads, three seconds of work.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "sphinx.cmd.build",
        "sphinx.builders.html",
        "sphinx.ext.autodoc",
        "myst_nb.sphinx_ext",
        "sphinxcontrib.bibtex",
        "sphinx_design",
        "pydata_sphinx_theme",
        "jupytext",
        "nbclient",
    ]
)


def run_sphinx(folder: str, environment: dict[str, str], output: str, arguments: list[str]) -> None:
    """Be a process that builds a site in a folder and writes what Sphinx says into a file."""
    from sphinx.cmd.build import main

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


#: What `python -m nemo_rl_ref.equations --json` is in a small site: it prints a file beside it.
EQUATIONS = """
from pathlib import Path
folder = Path(__file__).parent
error = folder / "error.txt"
if error.is_file():
    raise SystemExit(error.read_text())
print((folder / "found.json").read_text())
"""

NOTE_RUN = """
import os
with open("runs.txt", "a") as runs:
    runs.write("{name}\\n")
"""


def make_site(top: Path) -> Site:
    """Make an empty project with our configuration and extensions."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copy(TOP / "conf.py", top)
    for folder in ("docs/_ext", "docs/_static", "docs/_templates"):
        shutil.copytree(TOP / folder, top / folder, ignore=ignored)
    site = Site(top)
    site.write("nemo_rl_ref/__init__.py", "")
    for file in ("export/__init__.py", "export/slice.py"):
        site.write(f"nemo_rl_ref/{file}", (TOP / "nemo_rl_ref" / file).read_text("utf-8"))
    site.write("nemo_rl_ref/number.py", "NUMBER = 17\n")
    site.write("requirements.txt", "sphinx==0  # not read by these tests\n")
    site.write("docs/references.bib", "")
    site.write("docs/index.md", "# Home\n")
    return site


def fill(site: Site) -> None:
    """Write pages and notebooks that use everything."""
    site.equations({}, unchecked={"long": "it only has to be long"})
    site.notebook(
        "first",
        "# %% [markdown]\n# # First notebook\n#\n# See [losses](../docs/deep/down/losses.md).",
        NOTE_RUN.format(name="first"),
        """
        #| label: code-and-text
        import sys
        from nemo_rl_ref.number import NUMBER
        print("printed", NUMBER)
        print("on the way to the log", file=sys.stderr)
        NUMBER + 1
        """,
        f"""
        #| label: picture
        #| alt: A square,
        #|   one pixel wide: red.
        from IPython.display import Image
        import base64
        Image(base64.b64decode("{PNG}"))
        """,
        """
        #| label: table-and-formula
        from IPython.display import HTML, Latex, Markdown, display
        display(HTML("<table><tr><td>cell of a table</td></tr></table>"))
        display(Markdown("| loss |\\n| --- |\\n| *of* $\\\\beta$ |"))
        display(Latex(r"$\\frac{a}{b}$"))
        """,
        """
        # %% tags=["raises-exception"]
        #| label: error
        def refuse(value):
            raise ValueError(f"{value} is not allowed")
        refuse(3)
        """,
        """
        #| label: stored
        #| num: the-number = {NUMBER}
        #| num: ratio = {NUMBER / 3:.2f} of
        #|   {"it":>3}
        stored = NUMBER
        """,
    )
    site.notebook(
        "second",
        "# %% [markdown]\n# # Second notebook",
        NOTE_RUN.format(name="second"),
        """
        #| label: other
        print("of the second notebook")
        """,
    )
    site.write(
        "docs/index.md",
        """
        ---
        description: A "test" site & more
        ---
        # Home

        [Down](deep/down/losses.md), [notebook](../notebooks/first.py), [cell](#picture),
        {num}`the-number` of {num}`ratio`. $x^2$

        ```{toctree}
        deep/index
        deep/down/losses
        wide
        prompts
        notebooks/first
        notebooks/second
        notebooks/broad
        ```
        """,
    )
    for beside in (".venv/docs/index.md", "venv/pkg/readme.md", "README.md"):
        site.write(beside, "no title, which would be a warning\n")
    site.write("docs/deep/index.md", "# Deep\n\nBack [home](../index.md).\n")
    site.write(
        "docs/deep/down/losses.md",
        """
        # Losses

        The word wombat is here only. {doc}`Deep <../index>` {doc}`/notebooks/second`

        ```{literalinclude} /nemo_rl_ref/number.py
        ```
        ```{literalinclude} listing.txt
        ```
        ![a dot](dot.png)

        ```{embed} #code-and-text
        ```
        ```{embed} #picture
        :remove-input:
        ```
        ```{embed} #picture
        ```
        ```{embed} #table-and-formula
        ```
        ```{embed} #error
        ```
        :::{embed} #other
        :remove-output: true
        :::
        ```{embed} #stored
        ```
        """,
    )
    site.notebook(
        "broad",
        "# %% [markdown]\n# # Broad notebook",
        """
        #| label: broad
        from IPython.display import HTML
        row = "".join(f"<td>column {number}</td>" for number in range(40))  # a line too long here
        print("x" * 300)
        HTML(f"<table><tr>{row}</tr></table>")
        """,
    )
    site.write(
        "docs/wide.md",
        r"""
        # Wide things

        `nemo_rl_ref.algorithms.loss.interfaces.LossFunction.__call__(logprobs,data,seqs,toks)`

        ```{embed} #broad
        ```

        | first | second | third | fourth | fifth | sixth | seventh | eighth |
        | --- | --- | --- | --- | --- | --- | --- | --- |
        | aaaaaaaaaa | bbbbbbbbbb | cccccccccc | dddddddddd | eeeeeeeeee | f | g | h |

        $$
        a + b + c + d + e + f + g + h + i + j + k + l + m + n + o + p + q + r + s + t + u + v + w
        = \frac{1}{\text{a long denominator in words}}
        $$ (long)
        """,
    )
    site.write(
        "docs/prompts.md",
        """
        # Prompts

        ```console
        $ make html
        some output
        $ make test
        ```

        ```pycon
        >>> print("x")
        x
        >>> for i in y:
        ...     pass
        ```
        """,
    )
    site.write("docs/deep/down/listing.txt", "a listing beside the page\n")
    (site.top / "docs/deep/down/dot.png").write_bytes(base64.b64decode(PNG))
