# SPDX-License-Identifier: Apache-2.0
"""The Makefile and what finds Python and makes `.venv` (.ci/venv.sh, .ci/venv.py).

Each test runs the real `make` in a folder whose name has a space and a quote in it. Where only
the bookkeeping matters, `python -m venv` makes an environment without pip, and pip is a stand-in
that writes down how it was called: see `fake_tools`.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")
PYTHON = shlex.quote(sys.executable)
HERE = f"PY={PYTHON}"  # with -o venv: run the target with this Python, without making .venv
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))

FAKE_VENV = """
if __name__ == "__main__":
    import runpy, sys
    sys.path = [p for p in sys.path if not p.endswith("fakes")]
    sys.argv.insert(1, "--without-pip")
    runpy.run_module("venv", run_name="__main__")
"""
FAKE_PIP = """
import os, pathlib, sys, time
calls = pathlib.Path(os.environ["PIP_CALLS"])
calls.with_name("parent").write_text(str(os.getppid()))
with calls.open("a") as file:
    print(*sys.argv[1:], file=file)
behavior = calls.with_name("behavior")
while behavior.read_text() == "hang":
    time.sleep(0.02)
if behavior.read_text() == "fail":
    sys.exit("no such package")
"""


class Checkout:
    """A folder with the Makefile, and the environment in which `make` is run there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copytree(ROOT / ".ci", folder / ".ci")
        (folder / "requirements.txt").write_text("first==1\n")
        inherited = ("MAKE", "MFLAGS", "PYTHON", "PIP_", "REQUIREMENTS", "VIRTUAL_ENV")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(inherited)}

    def start(self, *arguments: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [MAKE, *arguments],
            cwd=self.folder,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def make(self, *arguments: str, **env: str) -> tuple[int, str]:
        """The exit status and everything that was printed."""
        process = self.start(*arguments, **env)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    def succeed(self, *arguments: str, **env: str) -> str:
        status, output = self.make(*arguments, **env)
        assert status == 0, output
        return output

    def fail(self, *arguments: str, **env: str) -> str:
        """The one line of the output that is an error."""
        status, output = self.make(*arguments, **env)
        assert status != 0, output
        assert "Traceback" not in output, output
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        return line

    def pip_behaves(self, how: str) -> None:
        (self.folder / "behavior").write_text(how)

    def pip_calls(self) -> list[str]:
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def wait_for_pip(self, calls: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.pip_calls()) < calls:
            assert time.monotonic() < deadline, "pip was not started"
            time.sleep(0.02)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def disguised(path: Path, setup: str) -> Path:
    """A Python that runs `setup` before what it is given with -c; it cannot run files."""
    return program(path, f"""exec {PYTHON} -c "{setup}; exec(sys.argv[1])" "$2"\n""")


def version(number: str) -> str:
    return f"import sys; sys.version_info = ({number.replace('.', ', ')}, 'final', 0)"


def bare_path(checkout: Checkout) -> Path:
    """A folder with the programs that the scripts use, and no Python."""
    path = checkout.folder / "path"
    path.mkdir()
    for tool in ("sh", "sed", "env"):
        (path / tool).symlink_to(shutil.which(tool))
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "it's a checkout")


@pytest.fixture
def fake_tools(checkout: Checkout) -> Checkout:
    """`checkout` with a PYTHON whose `-m venv` and `-m pip` are fast and need no network."""
    fakes = checkout.folder / "fakes"
    fakes.mkdir()
    (fakes / "venv.py").write_text(FAKE_VENV)
    (fakes / "pip.py").write_text(FAKE_PIP)
    checkout.env["PIP_CALLS"] = str(checkout.folder / "calls")
    checkout.env["FAKES"] = str(fakes)
    python = program(
        checkout.folder / "bin" / "python",
        f"""env > "$FAKES/env"; PYTHONPATH="$FAKES" exec {PYTHON} "$@"\n""",
    )
    checkout.env["PYTHON"] = str(python)
    checkout.pip_behaves("succeed")
    return checkout


def test_plain_make_prints_every_target(checkout):
    output = checkout.succeed()
    listed = set(re.findall(r"^  ([a-z]+)  ", output, re.M))
    assert listed == TARGETS
    assert {"html", "test", "serve", "notebooks", "bench", "clean", "help"} <= listed
    assert output == checkout.succeed("help")


def test_targets_are_phony(checkout):
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(phony[1].split()) == TARGETS


def test_run_and_lab_start_what_they_say(checkout):
    """Not executed: the script of the one has tests of its own, the other opens a server."""
    (checkout.folder / "notebooks").mkdir()
    assert 'docs/_ext/run_notebook.py "one"' in checkout.succeed(
        "-n", "-o", "venv", "run", "NB=one"
    )
    output = checkout.succeed("-n", "-o", "venv", "lab", "LABOPTS=--no-browser")
    assert "pip install -r requirements.txt -r requirements-lab.txt" in output
    assert f'PYTHONPATH="{checkout.folder}"' in output and "--no-browser" in output


def test_second_run_installs_nothing(fake_tools):
    assert "Installing requirements.txt" in fake_tools.succeed("venv")
    assert fake_tools.pip_calls() == ["install --no-input --no-user --target= -r requirements.txt"]
    os.utime(fake_tools.folder / "requirements.txt", (1, 1))
    assert fake_tools.succeed("venv") == ""
    del fake_tools.env["PYTHON"]  # without it, the Python of .venv is kept
    assert fake_tools.succeed("venv", PATH=str(bare_path(fake_tools))) == ""
    assert len(fake_tools.pip_calls()) == 1


def test_changed_requirements_are_installed_afresh(fake_tools):
    fake_tools.succeed("venv")
    stale = fake_tools.folder / ".venv" / "stale"
    stale.touch()
    (fake_tools.folder / "requirements.txt").write_text("first==2\n")
    assert "changed: requirements" in fake_tools.succeed("venv")
    assert len(fake_tools.pip_calls()) == 2
    assert not stale.exists()
    assert fake_tools.succeed("venv") == ""


@pytest.mark.parametrize("name", ["python", "folder"])
def test_another_python_or_folder_makes_it_afresh(fake_tools, name):
    fake_tools.succeed("venv")
    key_file = fake_tools.folder / ".venv" / "made-by-make.json"
    key = json.loads(key_file.read_text())
    assert key["python"] == ".".join(map(str, sys.version_info[:3]))
    assert key["folder"] == str(fake_tools.folder)
    key_file.write_text(json.dumps(key | {name: "another"}))
    assert f"changed: {name}" in fake_tools.succeed("venv")
    assert len(fake_tools.pip_calls()) == 2


def test_a_python_that_was_removed_makes_it_afresh(fake_tools):
    fake_tools.succeed("venv")
    python = fake_tools.folder / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python")
    assert "broken" in fake_tools.succeed("venv")
    assert fake_tools.succeed("venv") == ""


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"text"', b"{}"])
def test_a_damaged_marker_makes_it_afresh(fake_tools, content):
    """A full disk or a power cut leaves an empty file; whatever is in it, make made it."""
    fake_tools.succeed("venv")
    (fake_tools.folder / ".venv" / "made-by-make.json").write_bytes(content)
    assert "Removing .venv" in fake_tools.succeed("venv")
    assert len(fake_tools.pip_calls()) == 2
    assert fake_tools.succeed("venv") == ""


@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_an_empty_python_makes_it_afresh(fake_tools, mode):
    """The shell runs an empty file without an error, and so does nothing."""
    fake_tools.succeed("venv")
    path = bare_path(fake_tools)
    (path / "python3").symlink_to(fake_tools.env.pop("PYTHON"))
    fake_tools.env["PATH"] = str(path)
    python = fake_tools.folder / ".venv" / "bin" / "python"
    python.unlink()
    python.touch()
    python.chmod(mode)
    assert "broken" in fake_tools.succeed("venv")
    assert fake_tools.succeed("venv") == ""


def test_failed_installation_is_an_error_and_is_redone(fake_tools):
    fake_tools.pip_behaves("fail")
    assert fake_tools.fail("test").startswith("error: pip failed, see above")
    stale = fake_tools.folder / ".venv" / "stale"
    stale.touch()
    fake_tools.pip_behaves("succeed")
    assert "unfinished" in fake_tools.succeed("venv")
    assert len(fake_tools.pip_calls()) == 2
    assert not stale.exists()


def test_killed_installation_is_redone(fake_tools):
    fake_tools.pip_behaves("hang")
    process = fake_tools.start("venv")
    fake_tools.wait_for_pip(1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    fake_tools.pip_behaves("succeed")
    assert "unfinished" in fake_tools.succeed("venv")
    assert len(fake_tools.pip_calls()) == 2
    assert fake_tools.succeed("venv") == ""


def test_removal_cut_short_is_finished(fake_tools):
    fake_tools.succeed("venv")
    shutil.move(fake_tools.folder / ".venv", fake_tools.folder / ".venv.old")
    (fake_tools.folder / "requirements.txt").write_text("first==2\n")
    fake_tools.succeed("venv")
    (fake_tools.folder / "requirements.txt").write_text("first==3\n")
    fake_tools.succeed("venv")
    assert not (fake_tools.folder / ".venv.old").exists()


def test_two_makes_at_once_install_once(fake_tools):
    fake_tools.pip_behaves("hang")
    first = fake_tools.start("venv")
    fake_tools.wait_for_pip(1)
    second = fake_tools.start("venv")
    assert "Waiting for another make" in second.stdout.readline()
    fake_tools.pip_behaves("succeed")
    for process in first, second:
        output = process.communicate(timeout=30)[0]
        assert process.returncode == 0, output
    assert len(fake_tools.pip_calls()) == 1


def test_pip_outliving_its_make_is_waited_for(fake_tools):
    fake_tools.pip_behaves("hang")
    first = fake_tools.start("venv")
    fake_tools.wait_for_pip(1)
    os.kill(int((fake_tools.folder / "parent").read_text()), signal.SIGKILL)
    second = fake_tools.start("venv")
    assert "Waiting for another make" in second.stdout.readline()
    fake_tools.pip_behaves("succeed")
    assert second.communicate(timeout=30)[0].startswith("Removing .venv (it is unfinished")
    first.communicate(timeout=30)
    assert (first.returncode, second.returncode) == (2, 0)
    assert len(fake_tools.pip_calls()) == 2


def test_a_foreign_venv_is_left_alone(fake_tools):
    kept = fake_tools.folder / ".venv" / "mine"
    kept.parent.mkdir()
    kept.touch()
    assert "make did not make it" in fake_tools.fail("html")
    assert kept.exists()
    assert fake_tools.pip_calls() == []


def test_missing_requirements_file(fake_tools):
    assert (
        fake_tools.fail("venv", "REQUIREMENTS=x.txt") == "error: REQUIREMENTS=x.txt is not a file"
    )


def test_another_active_environment_does_not_reach_python(fake_tools):
    active = ["PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "JUPYTER_PATH"]
    fake_tools.succeed("venv", **dict.fromkeys(active, "/elsewhere"))
    seen = (fake_tools.folder / "fakes" / "env").read_text()
    assert "/elsewhere" not in seen
    assert f"IPYTHONDIR={fake_tools.folder}/_build/ipython\n" in seen


def test_real_pip_installs_here_whatever_the_users_settings(checkout):
    wheel = checkout.folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "value = 7\n")
        archive.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    (checkout.folder / "requirements.txt").write_text("--no-index\n./tiny-1.0-py3-none-any.whl\n")
    (checkout.folder / "nemo_rl_ref.py").touch()
    elsewhere = str(checkout.folder / "elsewhere")
    hostile = dict.fromkeys(["PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"], elsewhere)
    hostile |= {"PIP_USER": "1", "PIP_DRY_RUN": "1", "PIP_PYTHON": "/nowhere/python"}
    config = checkout.folder / "pip.conf"
    config.write_text(f"[global]\nuser = true\n[install]\ntarget = {elsewhere}\n")
    output = checkout.succeed("venv", PYTHON=sys.executable, PIP_CONFIG_FILE=str(config), **hostile)
    assert "WARNING" not in output
    code = "import nemo_rl_ref, tiny; print(tiny.value, tiny.__file__, nemo_rl_ref.__file__)"
    python = checkout.folder / ".venv" / "bin" / "python"
    answer = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True).stdout
    assert answer.startswith(f"7 {checkout.folder}/.venv/lib/")
    assert answer.endswith(f"{checkout.folder}/nemo_rl_ref.py\n")
    assert not Path(elsewhere).exists()


NEEDS = "this project needs Python 3.11, 3.12 or 3.13"


@pytest.mark.parametrize("number", ["2.7.18", "3.10.13", "3.14.0"])
def test_a_named_python_of_the_wrong_version_is_refused(checkout, number):
    python = disguised(checkout.folder / "bin" / "python", version(number))
    error = checkout.fail("html", f"PYTHON={python}")
    assert error == f"error: PYTHON={python} is Python {number}; {NEEDS}"
    assert not (checkout.folder / ".venv").exists()


def test_a_named_python_that_does_not_run(checkout):
    shim = program(checkout.folder / "shim", "echo 'shim: not installed' >&2; exit 127\n")
    error = checkout.fail("test", f"PYTHON={shim}")
    assert error == f"error: PYTHON={shim} does not run (shim: not installed); {NEEDS}"
    assert "PYTHON=no-such-python does not run" in checkout.fail("test", "PYTHON=no-such-python")


def test_a_python_without_ensurepip(checkout):
    setup = "import sys; sys.modules['ensurepip'] = None; " + version("3.12.4")
    python = disguised(checkout.folder / "bin" / "python", setup)
    error = checkout.fail("html", f"PYTHON={python}")
    assert f"PYTHON={python} (Python 3.12.4) has no ensurepip module" in error
    assert "apt install python3-venv (or python3.12-venv)" in error


def test_the_first_python_that_fits_is_taken(fake_tools):
    path = bare_path(fake_tools)
    python = fake_tools.env.pop("PYTHON")
    fake_tools.env["PATH"] = str(path)
    assert (
        fake_tools.fail("venv") == f"error: no Python found; {NEEDS}: install one, or name it "
        "with PYTHON=/path/to/python"
    )
    disguised(path / "python3", version("3.9.6"))
    disguised(path / "python", version("2.7.18"))
    assert "error: python3 is Python 3.9.6; python is Python 2.7.18; this" in fake_tools.fail(
        "venv"
    )
    (path / "python3.12").symlink_to(python)
    assert "Making .venv" in fake_tools.succeed("venv")


def test_html_test_and_serve_run_in_the_environment(fake_tools):
    for module in ("sphinx", "sphinx_autobuild", "pytest"):
        report = f"import sys; print('{module}', sys.prefix, *sys.argv[1:], sep='|')\n"
        (fake_tools.folder / f"{module}.py").write_text(report)
    fake_tools.succeed("venv")
    page = fake_tools.folder / "_build" / "html" / "index.html"
    prefix = fake_tools.folder / ".venv"
    assert fake_tools.succeed("html", "SPHINXOPTS=-v -n").splitlines() == [
        f"sphinx|{prefix}|-W|--keep-going|-j|auto|-v|-n|.|_build/html",
        f"The site: {page}",
        f"          {page.as_uri()}",
    ]
    output = fake_tools.succeed("test", "PYTESTARGS=-k 'a or b'")
    assert output == f"pytest|{prefix}|-n|auto|--dist|loadfile|-k|a or b\n"
    output = fake_tools.succeed("serve", "PORT=8123")
    assert output.startswith(f"sphinx_autobuild|{prefix}|--port|8123|--ignore|_build|")
    assert output.endswith("|-j|auto|.|_build/html\n")
    for module in ("sphinx", "pytest"):
        (fake_tools.folder / f"{module}.py").write_text("raise SystemExit(3)\n")
    status, output = fake_tools.make("html")
    assert status != 0 and "The site" not in output
    assert fake_tools.make("test")[0] != 0


def test_notebooks_are_written_without_outputs(checkout):
    source = checkout.folder / "notebooks" / "two words.py"
    source.parent.mkdir()
    source.write_text("# %% [markdown]\n# Text\n\n# %%\n#| label: one\n1 + 1\n")
    output = checkout.succeed("notebooks", "-o", "venv", HERE)
    assert output == "_build/ipynb/two words.ipynb\n"
    cells = json.loads((checkout.folder / "_build" / "ipynb" / "two words.ipynb").read_text())[
        "cells"
    ]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code"]
    assert "".join(cells[1]["source"]) == "#| label: one\n1 + 1"
    assert cells[1]["outputs"] == []
    source.with_name("broken.py").write_bytes(b"# \xff\n")
    status, output = checkout.make("notebooks", "-o", "venv", HERE)
    assert status != 0, output


def test_bench_runs_each_script_and_stops_at_a_failure(checkout):
    bench = "bench", "-o", "venv", HERE
    assert checkout.fail(*bench) == "error: no script in benchmarks"
    folder = checkout.folder / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "bench_a.py").write_text("print('ran a')\n")
    assert checkout.succeed(*bench) == "benchmarks/bench_a.py\nran a\n"
    (folder / "bench_0.py").write_text("raise SystemExit(3)\n")
    status, output = checkout.make(*bench)
    assert status != 0
    assert "ran a" not in output


def test_studies_run_in_the_order_that_they_need(checkout):
    studies = "studies", "-o", "venv", HERE
    folder = checkout.folder / "benchmarks"
    folder.mkdir(parents=True)
    for name in ("batch", "modelled", "pool", "samplers"):
        (folder / f"search_{name}.py").write_text(f"print('ran {name}')\n")
    names = [
        f"benchmarks/search_{name}.py\nran {name}\n"
        for name in ("pool", "samplers", "batch", "modelled")
    ]
    assert checkout.succeed(*studies) == "".join(names)
    (folder / "search_samplers.py").write_text("raise SystemExit(3)\n")
    status, output = checkout.make(*studies)
    assert status != 0
    assert "ran pool" in output and "ran batch" not in output


@pytest.fixture
def gpu_checkout(checkout: Checkout) -> Checkout:
    """A checkout in which PyTorch and the kernels' loader are stand-ins that report a GPU."""
    files = {
        "torch.py": "import types\n__version__ = '9.9'\ndevice = str\n"
        "version = types.SimpleNamespace(cuda='13.0')\n"
        "cuda = types.SimpleNamespace(is_available=lambda: True)\n",
        "nemo_rl_ref/__init__.py": "",
        "nemo_rl_ref/kernels/__init__.py": "",
        "nemo_rl_ref/kernels/loader.py": "def unavailable(device): return None\n",
        "requirements-gpu.txt": "# peers\nno-such-peer==1.0  # a peer\n",
        "tests/kernels/test_one.py": "def test_one(): pass\n",
        "tests/gpu/sanitized_calls.py": "",
        "tests/gpu/test_two.py": "def test_two(): pass\n",
        "benchmarks/bench_one.py": "import sys; print('bench', *sys.argv[1:])\n",
        "notebooks/one.py": "print('notebook one')\n",
        "notebooks/two.py": "print('notebook two')\n",
    }
    for name, text in files.items():
        path = checkout.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    checkout.path = bare_path(checkout)
    checkout.env["PATH"] = str(checkout.path)
    return checkout


GPU = "gpu", "-o", "venv", HERE


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("torch.py", ("cuda='13.0'", "cuda=None"), "PyTorch 9.9 was built without CUDA"),
        ("torch.py", ("True", "False"), "PyTorch 9.9 sees no GPU; does nvidia-smi list one?"),
        ("nemo_rl_ref/kernels/loader.py", ("None", "'it is too old'"), "it is too old"),
    ],
)
def test_gpu_says_in_one_line_what_is_missing(gpu_checkout, file, text, reason):
    path = gpu_checkout.folder / file
    path.write_text(path.read_text().replace(*text))
    assert gpu_checkout.fail(*GPU) == f"error: no GPU to run on: {reason}"
    assert "notebook" not in gpu_checkout.make(*GPU)[1]


def test_gpu_runs_all_steps_and_names_what_failed(gpu_checkout):
    output = gpu_checkout.succeed(*GPU)
    assert "2 passed" in output
    assert "left out: compute-sanitizer is not on the path" in output
    assert "absent peers: no-such-peer 1.0: pip install -r requirements-gpu.txt" in output
    assert "notebook one\n" in output
    assert "bench --write\n" in output
    report = 'echo "sanitizer $*"; case $* in *racecheck*) exit 1;; esac'
    program(gpu_checkout.path / "compute-sanitizer", report)
    (gpu_checkout.folder / "notebooks" / "one.py").write_text("raise SystemExit(3)\n")
    status, output = gpu_checkout.make(*GPU)
    assert status != 0
    assert "sanitizer --error-exitcode 1 --tool memcheck" in output
    assert "notebook two\n" in output
    summary = [line.split("s  ")[-1] for line in output.splitlines() if line.startswith("failed")]
    assert summary == ["compute-sanitizer racecheck", "notebooks/one.py"]


def test_gpu_runs_the_steps_that_are_named(gpu_checkout):
    output = gpu_checkout.succeed(*GPU, "GPUSTEPS=notebooks")
    assert "notebook one\n" in output
    assert "bench" not in output
    status, output = gpu_checkout.make(*GPU, "GPUSTEPS=nonsense")
    assert status != 0
    assert "nonsense: no such step; there are tests, sanitizers, notebooks, benchmarks" in output


def test_clean_keeps_the_sources_and_the_environment(fake_tools):
    fake_tools.succeed("venv")
    kept = [".venv/lib/x/__pycache__/m.pyc", "notebooks/a.py", "docs/_static/b.css"]
    removed = ["_build/html/index.html", "nemo_rl_ref/x/__pycache__/m.pyc", ".coverage"]
    for name in kept + removed:
        (fake_tools.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (fake_tools.folder / name).touch()
    fake_tools.succeed("clean")
    assert [name for name in kept + removed if (fake_tools.folder / name).exists()] == kept
    fake_tools.succeed("distclean")
    assert sorted(p.name for p in fake_tools.folder.glob(".*")) == [".ci"]


def make_commands(text: str) -> list[str]:
    """The targets of every `make ...` in a shell text."""
    commands = re.findall(r"^\s*(?:\S+=\S+ )*make\b(.*)$", text, re.M)
    words = [word for command in commands for word in command.split("#")[0].split()]
    return [word for word in words if "=" not in word and not word.startswith("-")]


def test_ci_run_uses_the_two_commands():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"html", "test"} <= set(make_commands(script.read_text(encoding="utf-8"))) <= TARGETS
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run(["sh", "-n", ROOT / ".ci" / "venv.sh"], check=True)


def test_workflow():
    text = (ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8")
    workflow = yaml.load(text, yaml.BaseLoader)  # leaves "on" and 3.10 alone
    jobs = workflow["jobs"]
    steps = {name: job["steps"] for name, job in jobs.items()}
    run = {name: [s["run"] for s in job if "run" in s] for name, job in steps.items()}
    targets = {name: make_commands("\n".join(lines)) for name, lines in run.items()}
    assert targets == {"test": ["test"], "html": ["lint", "html"], "publish": []}
    assert set().union(*targets.values()) <= TARGETS
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]

    assert workflow["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"pages": "write", "id-token": "write"}
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    assert set(jobs["publish"]["needs"]) == {"test", "html"}
    assert "github.ref == 'refs/heads/main'" in jobs["publish"]["if"]
    assert "github.event_name != 'pull_request'" in jobs["publish"]["if"]
    assert {"push", "pull_request"} <= set(workflow["on"])
    (upload,) = [s for s in steps["html"] if "upload-pages-artifact" in s.get("uses", "")]
    assert upload["with"]["path"] == "_build/html"
    assert all(
        re.search(r"@v\d+$", s["uses"]) for job in steps.values() for s in job if "uses" in s
    )


def test_gpu_workflow():
    text = (ROOT / ".github" / "workflows" / "gpu.yml").read_text(encoding="utf-8")
    workflow = yaml.load(text, yaml.BaseLoader)
    (job,) = workflow["jobs"].values()
    assert set(workflow["on"]) == {"workflow_dispatch", "schedule"}  # never for a pull request
    assert workflow["permissions"] == {"contents": "read"}
    assert "self-hosted" in job["runs-on"]
    steps = job["steps"]
    assert make_commands("\n".join(s["run"] for s in steps if "run" in s)) == ["venv", "gpu"]
    assert any("requirements-gpu.txt" in s.get("run", "") for s in steps)
    (upload,) = [s for s in steps if "upload-artifact" in s.get("uses", "")]
    assert upload["with"]["path"] == "benchmarks/results"
    assert all(re.search(r"@v\d+$", s["uses"]) for s in steps if "uses" in s)


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_commands_exist():
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
    assert blocks
    text = "\n".join(blocks)
    targets = make_commands(text)
    assert {"html", "test"} <= set(targets) <= TARGETS
    assert targets[:2] == ["html", "test"]
    assert {"run", "lab"} <= set(targets)
    notebooks = re.findall(r"NB=(\w+)", README)
    for name in [*re.findall(r"[\w/]+\.py\b", text), *(f"notebooks/{n}.py" for n in notebooks)]:
        assert (ROOT / name).is_file(), name


def test_readme_names_files_that_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    quoted = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:md|txt|toml|py))`", README)
    made = {name for name in quoted if name.startswith("_build/")}
    for name in set(links) | set(quoted) - made:
        assert (ROOT / name).exists(), name
