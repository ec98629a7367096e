# SPDX-License-Identifier: Apache-2.0
"""Sites to test: an empty one, a small full one, and the project's own.

The last two are built once in a test run, also where several processes share it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from small_site import TOP, Built, Site, fill, make_site


@contextmanager
def once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """Let one process of the run make something.

    Yields:
        The folder for it, which all processes share, and whether it is still to be made.
    """
    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent
    done = top / f"{name} done"
    with FileLock(top / f"{name} lock"):
        yield top / name, not done.exists()
        done.touch()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty project."""
    return make_site(tmp_path)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The full small site, built in parallel; do not change it."""
    with once(tmp_path_factory, "site with a space") as (folder, to_do):
        if not to_do:
            return Built(0, "", Site(folder))
        folder.mkdir()
        site = make_site(folder)
        fill(site)
        result = site.build("-j", "2")
        assert result.code == 0, result.text
        return result


@pytest.fixture(scope="session")
def project_html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own site, brought up to date as `make html` does; do not change it."""
    with once(tmp_path_factory, "project") as (_, to_do):
        if to_do:
            command = ("-m", "sphinx", "-W", "--keep-going", "-j", "auto", ".", "_build/html")
            done = subprocess.run(
                [sys.executable, *command], cwd=TOP, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr}"
    return TOP / "_build" / "html"
