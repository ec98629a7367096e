# SPDX-License-Identifier: Apache-2.0
"""Sites to test: an empty one, a small full one, and the project's own."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_site import TOP, Built, Site, fill, make_site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty project."""
    return make_site(tmp_path)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The full small site, built in parallel; do not change it."""
    site = make_site(tmp_path_factory.mktemp("site with a space"))
    fill(site)
    result = site.build("-j", "2")
    assert result.code == 0, result.text
    return result


@pytest.fixture(scope="session")
def project_html() -> Path:
    """The project's own site, brought up to date as `make html` does."""
    done = subprocess.run(
        [sys.executable, *("-m", "sphinx", "-W", "--keep-going", "-j", "auto", ".", "_build/html")],
        cwd=TOP,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr}"
    return TOP / "_build" / "html"
