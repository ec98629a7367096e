# SPDX-License-Identifier: Apache-2.0
"""When a notebook is executed, what its outputs become, and what is said when it fails."""

import json
import os
import subprocess
import sys
import time

import execution
import pytest
from execution import ensure_executed, environment_key, find_notebooks
from notebook_kernel import NotebookFailure, execute, read_notebook
from small_site import make_site

SCRIPT = "docs/_ext/execution.py"


@pytest.fixture
def project(site):
    """A project with two notebooks and data in the package."""
    site.notebook("one", "x = 1")
    site.notebook("two", "y = 2")
    site.write("nemo_rl_ref/data/pairs.jsonl", "{}\n")
    site.write("nemo_rl_ref/kernels/add.cu", "// a kernel\n")
    (site.top / "nemo_rl_ref/data/weights.safetensors").write_bytes(b"\x00\x01")
    return site


@pytest.fixture
def counted(monkeypatch):
    """Execution that only notes which notebook it was asked for."""
    names = []

    def note(notebook, log):
        names.append(notebook.name)
        return b"{}"

    monkeypatch.setattr(execution, "execute", note)
    return names


def ensure(project):
    return ensure_executed(project.top, project.top / "_build" / "notebooks", lambda line: None)


def test_nothing_is_executed_twice(project, counted):
    first = ensure(project)
    assert sorted(counted) == ["one", "two"]
    assert ensure(project) == first
    assert sorted(counted) == ["one", "two"]
    assert first["one"].name == "one.ipynb"


@pytest.mark.parametrize(
    "path",
    [
        "nemo_rl_ref/number.py",
        "nemo_rl_ref/data/pairs.jsonl",
        "nemo_rl_ref/data/weights.safetensors",
        "nemo_rl_ref/kernels/add.cu",
        "nemo_rl_ref/data/new_file.json",
        "requirements.txt",
        "notebooks/_helper.py",
        "notebooks/pairs.jsonl",
        "notebooks/helpers/draw.py",
    ],
)
def test_a_change_in_what_notebooks_stand_on_executes_all(project, counted, path):
    ensure(project)
    (project.top / path).parent.mkdir(exist_ok=True)
    with open(project.top / path, "ab") as file:
        file.write(b" ")
    ensure(project)
    assert sorted(counted) == ["one", "one", "two", "two"]


def test_copies_beside_the_notebooks_and_notes_of_editors_execute_nothing(project, counted):
    """A `.ipynb` beside its notebook is made of it; `--copy-to notebooks` puts it there."""
    ensure(project)
    for path in ("one.ipynb", ".one.py.swp", ".ipynb_checkpoints/one.ipynb", "__pycache__/a.pyc"):
        project.write(f"notebooks/{path}", "x")
    ensure(project)
    assert sorted(counted) == ["one", "two"]


def test_a_change_in_one_notebook_executes_only_that_one(project, counted):
    ensure(project)
    project.notebook("two", "y = 3")
    ensure(project)
    assert sorted(counted) == ["one", "two", "two"]


def test_a_file_that_moved_or_went_away_executes_all(project, counted):
    ensure(project)
    os.rename(project.top / "nemo_rl_ref/number.py", project.top / "nemo_rl_ref/numbers.py")
    ensure(project)
    os.unlink(project.top / "nemo_rl_ref/numbers.py")
    ensure(project)
    assert len(counted) == 6


def test_an_edit_that_is_undone_executes_nothing(project, counted):
    ensure(project)
    project.notebook("two", "y = 3")
    ensure(project)
    project.notebook("two", "y = 2")
    ensure(project)
    assert sorted(counted) == ["one", "two", "two"]


def test_what_python_leaves_in_the_package_changes_nothing(project, counted):
    ensure(project)
    project.write("nemo_rl_ref/__pycache__/number.cpython-311.pyc", "x")
    project.write("nemo_rl_ref/.number.py.swp", "x")
    ensure(project)
    assert sorted(counted) == ["one", "two"]


def test_key_changes_with_python_pins_and_device(project, monkeypatch):
    before = environment_key(project.top)
    assert environment_key(project.top) == before
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version", "3.99.0")
        assert environment_key(project.top) != before
    with monkeypatch.context() as patch:
        patch.setattr(execution, "installed_version", lambda name: "99")
        assert environment_key(project.top) != before
    with monkeypatch.context() as patch:
        patch.setattr(execution, "has_cuda", lambda: not had)
        had = False
        one = environment_key(project.top)
        had = True
        assert environment_key(project.top) != one


@pytest.mark.parametrize("file", ["configs/dpo.yaml", "benchmarks/results/cpu.json"])
def test_key_changes_with_what_notebooks_read_outside_the_package(project, file):
    before = environment_key(project.top)
    project.write("tests/test_other.py", "1")
    assert environment_key(project.top) == before  # no notebook reads this
    project.write(file, "1")
    one = environment_key(project.top)
    project.write(file, "2")
    assert len({before, one, environment_key(project.top)}) == 3


def test_hidden_devices_are_no_devices(monkeypatch):
    monkeypatch.setattr(execution.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert execution.has_cuda()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not execution.has_cuda()


def test_an_edit_during_execution_is_not_lost(project, monkeypatch):
    seen = []

    def edit_once(notebook, log):
        seen.append((project.top / "nemo_rl_ref/number.py").read_text())
        project.write("nemo_rl_ref/number.py", "NUMBER = 18\n")
        return json.dumps(seen[-1]).encode()

    monkeypatch.setattr(execution, "execute", edit_once)
    os.unlink(project.top / "notebooks/two.py")
    copies = [ensure(project)["one"] for _ in range(3)]
    assert seen == ["NUMBER = 17\n", "NUMBER = 18\n"]
    assert copies[0] != copies[1] == copies[2]
    project.write("nemo_rl_ref/number.py", "NUMBER = 17\n")
    ensure(project)
    assert len(seen) == 3  # what ran during the edit is not taken for what runs without it


def test_a_crash_leaves_no_copy_behind(project, monkeypatch):
    def crash(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "execute", lambda notebook, log: b"half a file")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", crash)
        ensure(project)
    left = [path.name for path in (project.top / "_build").rglob("*") if path.is_file()]
    assert left == []
    assert ensure(project)["one"].read_bytes() == b"half a file"


def test_old_copies_are_removed(project, counted):
    for number in range(6):
        project.notebook("one", f"x = {number}")
        copy = ensure(project)["one"]
    copies = list((project.top / "_build/notebooks/one").glob("*/*.ipynb"))
    assert len(copies) == execution.KEPT
    assert copy in copies


def wait_for(true):
    """Wait until something is true."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


BUILDS = {
    "notebooks": [SCRIPT, "--root", "."],
    "site": ["-m", "sphinx", "-W", "-j", "2", ".", "_build/html"],
}


@pytest.mark.parametrize(
    "both", [("notebooks", "notebooks"), ("site", "site"), ("notebooks", "site")]
)
def test_a_second_build_waits_says_so_and_executes_nothing_again(project, both):
    """Whether it is a site or only notebooks that is built; else both write the same files."""
    cell = "open('runs.txt', 'a').write('one\\n')\nimport os, time\nbegan = time.time()\n"
    cell += "while not os.path.exists('go') and time.time() < began + 30: time.sleep(0.05)"
    project.notebook("one", "# %% [markdown]\n# # One", cell)
    project.write("docs/index.md", "# Home\n\n```{toctree}\nnotebooks/one\n```\n")
    os.unlink(project.top / "notebooks/two.py")
    outputs = [project.top / f"output-{number}" for number in range(2)]
    started = []
    for name, path in zip(both, outputs, strict=True):
        with path.open("w") as file:
            command = [sys.executable, *BUILDS[name]]
            started.append(subprocess.Popen(command, cwd=project.top, stdout=file))
        wait_for(project.executions)
    wait_for(lambda: "waiting for another build in" in outputs[1].read_text())
    project.write("go", "")
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert project.executions() == ["one"]
    (copy,) = (project.top / "_build/notebooks/one").glob("*/*.ipynb")
    assert json.loads(copy.read_bytes())["nbformat"] == 4


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Run a notebook twice; give both copies and the log."""
    site = make_site(tmp_path_factory.mktemp("outputs"))
    site.notebook(
        "one",
        """
        #| label: streams
        import sys
        print("one")
        print("progress", file=sys.stderr)
        print("two\\rthree")
        object()
        """,
        """
        # %% tags=["show-stderr"]
        print("meant to be seen", file=sys.stderr)
        """,
        """
        # %% tags=["raises-exception"]
        #| label: error
        import json
        json.loads("{")
        """,
        "import os, nemo_rl_ref.number\nprint(nemo_rl_ref.__file__, os.getcwd())\nsys.path[0]",
    )
    runs = []
    for name in ("first", "second"):
        done = site.run(SCRIPT, "--root", ".", "--store", name)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads((site.top / done.stdout.split()[-1]).read_bytes()))
    return runs, done.stdout


def test_two_executions_give_the_same_file(outputs):
    (first, second), _ = outputs
    assert first == second


def test_streams_are_joined_and_addresses_removed(outputs):
    (notebook, _), _ = outputs
    stream, result = notebook["cells"][0]["outputs"]
    assert (stream["name"], stream["text"]) == ("stdout", "one\nthree\n")
    assert result["data"]["text/plain"] == "<object>"


def test_stderr_goes_to_the_log_unless_asked_for(outputs):
    (notebook, _), log = outputs
    assert "notebooks/one.py:2: cell 1 (label streams) wrote to stderr:\n    progress" in log
    (shown,) = notebook["cells"][1]["outputs"]
    assert shown["text"] == "meant to be seen\n"


def test_an_expected_error_keeps_only_the_frames_of_its_cell(outputs):
    (notebook, _), _ = outputs
    (error,) = notebook["cells"][2]["outputs"]
    trace = "\n".join(error["traceback"])
    assert "----> 2 json.loads" in trace
    assert "JSONDecodeError: Expecting property name" in trace
    assert "decoder.py" not in trace
    assert "#|" not in trace


def test_cells_find_the_package_and_show_no_path_of_this_machine(outputs):
    (notebook, _), _ = outputs
    stream, _ = notebook["cells"][3]["outputs"]
    assert stream["text"].startswith("nemo_rl_ref/__init__.py ")


def test_a_kernel_ends_with_its_notebook(site):
    site.notebook("a", "import os\nopen('pid', 'w').write(str(os.getpid()))")
    assert site.run(SCRIPT, "--root", ".").returncode == 0
    site.notebook(
        "b", '# %% tags=["raises-exception"]\nimport os\nos.kill(int(open("pid").read()), 0)'
    )
    done = site.run(SCRIPT, "--root", ".")
    assert done.returncode == 0, done.stderr
    copy = site.top / done.stdout.split()[-1]
    assert "ProcessLookupError" in copy.read_text("utf-8")


def test_what_matplotlib_returns_is_not_a_result(site):
    calls = ["title('a')", "plot([2, 1])", "legend(['a'])", "subplots()"]
    cell = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt."
    site.notebook("one", *(cell + call for call in calls))
    (notebook,) = find_notebooks(site.top)
    for cell in json.loads(execute(notebook, print))["cells"]:
        outputs = cell["outputs"]
        assert outputs and all("image/svg+xml" in output["data"] for output in outputs)


def test_a_result_that_looks_like_matplotlibs_stays_beside_a_figure(site):
    """Only the type says whose it is: a repr may be anything, an empty list is nobody's."""
    setup = "import matplotlib.pyplot as plt\nclass Text:\n"
    own = setup + "    def __repr__(self): return 'Text(0, 0, \\'mine\\')'\nplt.plot([1]); "
    plot = "import matplotlib.pyplot as plt\n"
    kept = [own + "Text()", own + "[Text(), Text()]", plot + "a = plt.plot([1]); []"]
    dropped = [plot + "plt.bar([1], [2])", plot + "plt.subplots(2, 2)", plot + "[plt.plot([1])]"]
    site.notebook("one", *kept, *dropped)
    (notebook,) = find_notebooks(site.top)
    cells = json.loads(execute(notebook, print))["cells"]
    results = [
        [o for o in cell["outputs"] if o["output_type"] == "execute_result"] for cell in cells
    ]
    assert [len(found) for found in results] == [1, 1, 1, 0, 0, 0]
    assert results[0][0]["data"]["text/plain"] == "Text(0, 0, 'mine')"


def refused(site):
    """Execute the site's notebook, which fails; return the message."""
    (notebook,) = find_notebooks(site.top)
    with pytest.raises(NotebookFailure) as failure:
        execute(notebook, print)
    return str(failure.value)


def test_a_failing_cell_is_named_and_leaves_no_copy(site):
    site.notebook(
        "bad",
        "x = 1",
        """
        #| label: ratio
        #| alt: none

        y = 0
        x / y
        """,
    )
    done = site.run(SCRIPT, "--root", ".")
    assert done.returncode == 1
    assert not list((site.top / "_build").rglob("*.ipynb"))
    message = done.stderr
    assert "notebooks/bad.py:5: cell 2 (label ratio) raised ZeroDivisionError: " in message
    assert "at notebooks/bad.py:9" in message
    assert ">     9 | x / y" in message
    assert "Traceback (most recent call last)" in message
    assert str(site.top) not in message


def test_an_error_that_does_not_come_is_named(site):
    site.notebook("bad", '# %% tags=["raises-exception"]\nx = 1')
    message = refused(site)
    assert "notebooks/bad.py:2: cell 1 is tagged 'raises-exception' but raised nothing" in message


def test_a_dead_kernel_is_named(site):
    site.notebook("bad", "import os\nos._exit(3)")
    message = refused(site)
    assert "notebooks/bad.py:2: cell 1 ended the kernel" in message


def test_a_malformed_option_is_named_before_anything_runs(project):
    project.notebook("two", "#| label: fine\nx = 1", "#| lable: typo\nx = 1")
    (_, two) = find_notebooks(project.top)
    with pytest.raises(NotebookFailure, match=r"notebooks/two.py:6: cell option '#\| lable: typo'"):
        read_notebook(two)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            "#| label: boom\nraise RuntimeError('not today')",
            "2: cell 1 (label boom) raised Runtime",
        ),
        ("#| num: gap = {gapp:.1f}\ngap = 1", "2: cell 1: value 'gap' = '{gapp:.1f}': NameError: "),
    ],
)
def test_a_cell_or_value_that_fails_fails_the_build(site, cell, message):
    site.notebook("bad", cell)
    result = site.build(builder="dummy")
    assert result.code != 0
    assert f"Notebook error: notebooks/bad.py:{message}" in result.text


def test_copies_can_be_put_elsewhere(site):
    site.notebook("one", "6 * 7")
    scratch = site.top / ("a long name " * 9).strip()  # too long for the path of a socket
    scratch.mkdir()
    site.environment["TMPDIR"] = str(scratch)
    done = site.run(SCRIPT, "--root", ".", "--copy-to", "notebooks")
    assert done.returncode == 0, done.stderr
    notebook = json.loads((site.top / "notebooks/one.ipynb").read_text("utf-8"))
    assert notebook["cells"][0]["outputs"][0]["data"]["text/plain"] == "42"
