# SPDX-License-Identifier: Apache-2.0
"""Numbers in prose: `values` in a notebook, `{num}` in a page."""

import pytest

from nemo_rl_ref.show.values import values


def test_a_page_prints_what_the_notebook_stored(built):
    paragraph = built.page("index.html").find("article").find_all("p")[-1].get_text()
    home = built.page("index.html")
    links = [(a.get_text(), a["href"]) for a in home.select("article a.stored-value")]
    assert links == [("17", "notebooks/first.html#stored"), ("5.67", "notebooks/first.html#stored")]
    assert paragraph is not None


def test_the_notebook_shows_what_it_stored(built):
    page = built.page("notebooks/first.html")
    assert "the-number  17\nratio       5.67" in page.get_text()


def test_a_page_that_embeds_the_cell_does_not_repeat_the_values(built):
    stored = built.page("deep/down/losses.html").select(".embedded-cell")[-1]
    assert "values(the_number=NUMBER" in stored.get_text()
    assert "the-number  17" not in stored.get_text()


def test_a_name_stored_twice_is_refused(site):
    cell = "from nemo_rl_ref.show.values import values\nvalues(gap=1)"
    site.notebook("one", cell)
    site.notebook("two", cell)
    site.write("docs/index.md", "# Home\n\n```{toctree}\nnotebooks/one\nnotebooks/two\n```\n")
    result = site.build(builder="dummy")
    assert result.code != 0
    message = "notebooks/two.py:2: WARNING: duplicate value 'gap', which stands at notebooks/one"
    assert message in result.text


def test_values_are_printed_in_a_script(capsys):
    values(dpo_max_diff=f"{3e-6:.1e}", pairs=12)
    assert capsys.readouterr().out == "dpo-max-diff  3.0e-06\npairs         12\n"


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({}, ValueError, "at least one value"),
        ({"loss": 0.1}, TypeError, "loss should be a string or an integer, got float 0.1"),
        ({"loss": True}, TypeError, "got bool True"),
        ({"loss": " "}, ValueError, "one line of text"),
        ({"loss": "a\nb"}, ValueError, "one line of text"),
        ({"Loss": "1"}, ValueError, "like dpo_max_diff"),
        ({"loss__x": "1"}, ValueError, "like dpo_max_diff"),
    ],
)
def test_bad_values_are_refused(named, error, message):
    with pytest.raises(error, match=message):
        values(**named)
