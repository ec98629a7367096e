# SPDX-License-Identifier: Apache-2.0
"""What a second build does: nothing where nothing changed, everything that a change reaches."""

import pytest
from small_site import fill, make_site

NUMBERED = ("index.html", "deep/down/losses.html", "notebooks/first.html")


SPHINX = ("-m", "sphinx", "-W", "--keep-going", ".", "_build/html")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The full small site, built once; each test below builds it again."""
    site = make_site(tmp_path_factory.mktemp("incremental"))
    fill(site)
    result = site.build("-j", "2")
    assert result.code == 0, result.text
    return site


def test_an_unchanged_site_is_left_alone(project):
    before = len(project.executions())
    result = project.build()
    assert result.code == 0
    assert "0 added, 0 changed, 0 removed" in result.text
    assert "executing" not in result.text
    assert len(project.executions()) == before


def test_after_an_edit_in_the_package_no_page_keeps_an_old_number(project):
    for page in NUMBERED:
        assert "17" in project.html.joinpath(page).read_text("utf-8")
    project.write("nemo_rl_ref/number.py", "NUMBER = 23\n")
    result = project.build("-j", "2")
    assert result.code == 0, result.text
    for page in NUMBERED:
        text = project.html.joinpath(page).read_text("utf-8")
        assert "23" in text
        assert "printed 17" not in text
        assert ">17<" not in text
    assert "printed 17" not in project.html.joinpath("notebooks/first.ipynb").read_text("utf-8")


def test_only_pages_that_a_changed_cell_reaches_are_read_again(project):
    path = project.top / "notebooks/second.py"
    path.write_text(path.read_text().replace("of the second notebook", "changed"))
    result = project.build()
    assert result.code == 0, result.text
    assert "0 added, 2 changed, 0 removed" in result.text
    assert "changed" in project.html.joinpath("deep/down/losses.html").read_text("utf-8")


def test_a_page_is_read_again_when_its_cell_is_gone(project):
    path = project.top / "notebooks/second.py"
    text = path.read_text()
    path.write_text(text.replace("label: other", "label: renamed"))
    result = project.build()
    assert result.code != 0
    assert "losses.md:22: WARNING: no cell is labeled 'other'" in result.text
    path.write_text(text)
    assert project.build().code == 0


def test_nothing_of_a_page_or_notebook_that_is_gone_stays(site):
    """Also after a build that failed, when Sphinx does not remember what was there."""
    for name in ("one", "two"):
        site.notebook(name, f"# %% [markdown]\n# # {name}", "1 + 1")
        site.write(f"docs/deep/{name}.md", f"# Page {name}\n")
    index = "# Home\n\n```{{toctree}}\n:glob:\nnotebooks/*\ndeep/*\n```\n{}"
    site.write("docs/index.md", index.format(""))
    assert site.build().code == 0
    for path in ("notebooks/two.py", "docs/deep/two.md"):
        (site.top / path).unlink()
    site.write("docs/index.md", index.format("\n{nonsense}`x`\n"))
    assert site.run(*SPHINX).returncode == 1
    site.write("docs/index.md", index.format(""))
    done = site.run(*SPHINX)
    assert done.returncode == 0, done.stderr
    left = {path.relative_to(site.html).as_posix() for path in site.html.rglob("*.*")}
    assert {path for path in left if "two" in path} == set()
    assert {"notebooks/one.html", "notebooks/one.ipynb", "notebooks/one.py"} <= left
    assert {"deep/one.html", "index.html", "search.html", "genindex.html"} <= left


def test_a_warning_is_told_again_by_the_next_build(site):
    """Sphinx remembers the pages of a failed build, and not their warnings."""
    site.write("docs/index.md", "# Home\n\n{nonsense}`x`\n")
    for _ in range(2):
        done = site.run(*SPHINX)
        assert done.returncode == 1
        assert "nonsense" in done.stderr
