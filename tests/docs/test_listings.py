# SPDX-License-Identifier: Apache-2.0
"""The listings of all pages as a reader copies them: they run elsewhere, and say the same.

Those in `slow_listings.txt`, which took more than five seconds, run with `LISTINGS=all` only. `make
listings` sets it, starts Python anew for each, and names those that take as long.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from execution import find_notebooks
from installed import build_wheel, install
from listings import listings_of
from notebook_cells import VALUES_MIME
from notebook_kernel import read_notebook
from small_site import TOP

from nemo_rl_ref.export.slice import statements

ALL = os.environ.get("LISTINGS") == "all"
EMBED = re.compile(r"\{embed\} #(\S+)\n((?:(?:# )?:[a-z-]+:.*\n)*)")
SLOW = {
    line.strip()
    for line in Path(__file__).with_name("slow_listings.txt").read_text("utf-8").splitlines()
}


def listed(path):
    """The labels of the cells that a page shows with their code, in order."""
    found = EMBED.findall(path.read_text(encoding="utf-8"))
    return [label for label, options in found if "remove-input" not in options]


PAGES = {
    path: listed(path) for path in [*(TOP / "docs").rglob("*.md"), *TOP.glob("notebooks/*.py")]
}
SHOWN = sorted({label for labels in PAGES.values() for label in labels})
LISTINGS, SOURCES, NUMS, NOTEBOOK = {}, {}, {}, {}
for notebook in find_notebooks(TOP):
    content, nums = read_notebook(notebook)
    LISTINGS |= listings_of(content.cells)
    for index, cell in enumerate(content.cells):
        if label := cell.metadata.get("options", {}).get("label"):
            SOURCES[label], NUMS[label] = cell.source, nums[index]
            NOTEBOOK[label] = notebook.name


def undefined(folder, texts):
    """Ruff's F821 over texts, as lines."""
    for name, text in texts.items():
        Path(folder, f"{name}.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,E9"]
    done = subprocess.run(
        [*command, "--output-format", "concise", str(folder)], capture_output=True, text=True
    )
    return [line for line in done.stdout.splitlines() if ".py:" in line]


def test_no_listing_has_an_undefined_name(tmp_path):
    """Shown once on a listing that lacks what it needs."""
    assert len(SHOWN) > 100
    assert undefined(tmp_path, {"bare": "print(BETA)\n"})
    (tmp_path / "bare.py").unlink()
    assert undefined(tmp_path, {label: LISTINGS[label].text for label in SHOWN}) == []
    assert {label: LISTINGS[label].missing for label in SHOWN if LISTINGS[label].missing} == {}


@pytest.mark.parametrize("page", [p for p in PAGES if PAGES[p]], ids=lambda page: page.stem)
def test_a_page_imports_what_its_listings_use(page):
    """In its first listing, or in the one that uses it first."""
    shown, lacking = set(), {}
    for label in PAGES[page]:
        own = statements(SOURCES[label])
        shown |= {one.bound for s in own for one in s.imports}
        used = {name for s in own for name in s.flow.uses | s.flow.later}
        whole = {one.bound for s in statements(LISTINGS[label].text) for one in s.imports}
        if names := (used & whole) - shown:
            lacking[label] = names
    assert lacking == {}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The package installed, and nothing of the repository in reach."""
    folder = tmp_path_factory.mktemp("installed")
    at = install(build_wheel(folder), folder / "env")
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "MPLBACKEND": "agg"}
    same = {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    threads = {"GOMP_SPINCOUNT": "3000", "OMP_NUM_THREADS": "1"}
    return os.environ | quiet | same | threads | {"PYTHONPATH": str(at)}


@pytest.fixture(scope="module")
def run(environment):
    """Runs the `listing.py` in a folder; returns the exit status."""
    if ALL:

        def start(folder):
            with open(folder / "output.txt", "w") as output:
                command = [sys.executable, "listing.py"]
                return subprocess.run(
                    command, cwd=folder, env=environment, stdout=output, stderr=output
                ).returncode

        yield start
        return
    command = [sys.executable, str(TOP / "tests" / "help" / "listing_runner.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as runner:

        def fork(folder):
            runner.stdin.write(f"{folder}\n")
            runner.stdin.flush()
            return int(runner.stdout.readline())

        yield fork
        runner.stdin.close()


@pytest.fixture(scope="module")
def stored(project_html):
    """What the build stored for each label: what the cell printed, and its values."""
    found = {}
    for notebook in sorted(set(NOTEBOOK.values())):
        content = json.loads((project_html / "notebooks" / f"{notebook}.ipynb").read_text("utf-8"))
        for cell in content["cells"]:
            if label := cell["metadata"].get("options", {}).get("label"):
                streams = [o["text"] for o in cell["outputs"] if o["output_type"] == "stream"]
                values = [o.get("data", {}).get(VALUES_MIME, {}) for o in cell["outputs"]]
                found[label] = "".join(streams), {k: v for one in values for k, v in one.items()}
    return found


@pytest.mark.parametrize("label", [label for label in SHOWN if ALL or label not in SLOW])
def test_a_copied_listing_runs_and_gives_what_the_page_shows(label, run, stored, tmp_path):
    """In a fresh process and folder; its values are evaluated where it has their names."""
    asked = [
        f"try:\n    VALUES[{num.name!r}] = {num.expression}\nexcept NameError:\n    pass\n"
        for num in NUMS[label]
    ]
    end = "open('values.json', 'w').write(__import__('json').dumps(VALUES))\n"
    text = "\n".join([LISTINGS[label].text, "VALUES = {}\n", *asked, end])
    (tmp_path / "listing.py").write_text(text, encoding="utf-8")
    status = run(tmp_path)
    output = (tmp_path / "output.txt").read_text("utf-8")
    assert status == 0, output
    printed, values = stored[label]
    assert output.strip().endswith(printed.strip())
    found = json.loads((tmp_path / "values.json").read_text("utf-8"))
    assert found == {name: values[name] for name in found}
