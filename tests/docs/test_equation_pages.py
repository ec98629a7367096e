# SPDX-License-Identifier: Apache-2.0
"""The directive `{equation}`, the tables, the glossary's links."""

import json
import os
import re
import time

import pytest
from small_site import make_site

LOSS = {
    "title": "A loss",
    "latex": r"L = -\log \sigma(m) \mid x",
    "implementations": ["nemo_rl_ref.number.double"],
    "source": "someone2020",
    "at": "Eq. 7",
    "note": "Of one pair.",
    "symbols": [{"latex": r"m |x\|", "meaning": "a margin, in nats"}],
    "inputs": 1200,
    "difference": 3e-16,
    "play": {"sliders": []},
}
BIBLIOGRAPHY = """
@misc{someone2020, title = {A paper}, author = {Some One}, year = {2020}}
"""


def fill(site):
    """Write pages that show an equation, repeat it, list it, and use words of the glossary."""
    site.equations({"loss": LOSS})
    site.write("docs/references.bib", BIBLIOGRAPHY)
    site.write(
        "nemo_rl_ref/number.py",
        '''
        """A module."""
        def double(x):
            """Double a number."""
            return 2 * x
        ''',
    )
    site.write(
        "docs/index.md",
        """
        # Home

        ```{equation} loss
        ```

        As {eq}`eq-loss` and {ref}`equation-loss` say.

        ```{toctree}
        other
        table
        reference/glossary
        ```

        ```{bibliography}
        ```
        """,
    )
    site.write("docs/other.md", "# Other\n\n```{equation} loss\n:repeat:\n```\n")
    site.write(
        "docs/table.md",
        """
        # Table

        ```{equation-table}
        ```

        ```{notation-table}
        ```

        ```{eval-rst}
        .. automodule:: nemo_rl_ref.number
        ```
        """,
    )
    site.write(
        "docs/reference/glossary.md",
        "# Glossary\n\n```{glossary}\nmargin\n  A margin.\n\nlog-ratio\n  A log-ratio.\n```\n",
    )


@pytest.fixture
def site(site):
    fill(site)
    return site


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The site above and a page more for each thing below, built once; do not change it."""
    site = make_site(tmp_path_factory.mktemp("equations"))
    fill(site)
    site.equations(
        {"loss": LOSS, "margin": LOSS | {"title": "A margin"}},
        unchecked={"eq-own": "a name for a thing"},
    )
    formula = "#| label: f\nfrom IPython.display import Latex\nLatex('$$a$$')"
    site.notebook("one", "# %% [markdown]\n# # Notebook", formula)
    index = site.top / "docs/index.md"
    index.write_text(
        index.read_text().replace("other\n", "other\nchapter\nterms\nunchecked\nnotebooks/one\n")
    )
    conf = site.top / "conf.py"
    conf.write_text(conf.read_text() + '\nequation_chapters = {"chapter": "3"}\n')
    site.write(
        "docs/chapter.md", "# Chapter\n\n```{equation} margin\n```\n\nAs {eq}`eq-margin` says.\n"
    )
    site.write(
        "docs/unchecked.md",
        "# Unchecked\n\nOf {eq}`eq-margin`.\n\n$$\na\n$$ (eq-own)\n\n```{embed} #f\n```\n",
    )
    site.write(
        "docs/terms.md",
        """
        # The margin

        `margin`, [a margin](index.md), $margin$. Margins of log-ratios, and a margin again.

        The log-ratio; marginal.
        """,
    )
    result = site.build()
    assert result.code == 0, result.text
    return result.page


def test_an_equation_is_numbered_and_says_how_it_was_checked(pages):
    page = pages("index.html")
    math = page.select_one("div.math")
    assert math["id"] == "equation-eq-loss"
    assert r"L = -\log \sigma(m) \mid x" in math.get_text()
    assert page.select_one("span.eqno").get_text().startswith("(1)")
    note = page.select_one(".equation-note").get_text()
    assert "Checked against double: 1,200 random inputs, largest difference 3e-16." in note
    assert "Of one pair. Source: One [2020], Eq. 7." in note
    links = [a["href"] for a in page.select(".equation-note a")]
    assert any("nemo_rl_ref.number.double" in link for link in links)
    symbol, meaning = page.select(".equation-note td")
    assert symbol.select_one("annotation").get_text() == r"m \vert x\Vert"
    assert meaning.get_text() == "a margin, in nats"
    text = page.select_one("article").get_text()
    assert "As (1) and A loss say." in text


def test_repeated_it_has_no_number_and_links_to_the_numbered_one(pages):
    page = pages("other.html")
    assert page.select("span.eqno") == []
    note = page.select_one(".equation-note")
    assert note.get_text().strip() == "Checked, with its symbols, as (1)."
    assert note.a["href"] == "index.html#equation-eq-loss"


def test_a_page_with_a_chapter_numbers_its_equations_by_it(pages):
    page = pages("chapter.html")
    assert page.select_one("span.eqno").get_text().startswith("(3.1)")
    assert "As (3.1) says." in page.get_text()
    assert "Of (3.1)." in pages("unchecked.html").get_text()


def test_the_tables_list_equations_and_symbols_and_the_api_links_back(pages):
    page = pages("table.html")
    assert "2 displayed equations are checked." in page.get_text()
    cells = [td.get_text() for td in page.find_all("table")[0].select("td")]
    assert cells[:6] == ["(1)", "A loss", "double", "1,200", "3e-16", "One [2020], Eq. 7"]
    back = page.select_one("dd").find("a", string="A loss")
    assert back["href"] == "index.html#equation-eq-loss"


def test_a_reason_allows_an_unchecked_equation_and_is_shown(pages):
    """And a formula that a cell prints is no displayed equation: the page embeds one."""
    text = pages("table.html").get_text()
    assert "1 are not" in text
    assert "a name for a thing" in text


def test_a_term_is_linked_where_a_page_uses_it_first(pages):
    linked = [(a.get_text(), a["href"]) for a in pages("terms.html").select("article a.term")]
    assert linked == [
        ("Margins", "reference/glossary.html#term-margin"),
        ("log-ratios", "reference/glossary.html#term-log-ratio"),
    ]
    (margins, _) = pages("terms.html").select("article a.term")
    assert margins["title"] == "A margin."


def test_everyday_words_are_no_terms(site):
    """As in "`setup` returns NeMo RL's loss", "the answer is taken from one run", "a bad score"."""
    words = ["return", "answer", "score", "group", "bias"]
    terms = "\n\n".join(f"{word}\n  A word." for word in [*words, "margin"])
    site.write("docs/reference/glossary.md", f"# Glossary\n\n```{{glossary}}\n{terms}\n```\n")
    site.write(
        "docs/other.md",
        "# Other\n\nIt returns a loss. The answer is a score of a group without bias: a margin.\n",
    )
    built = site.build()
    assert built.code == 0, built.text
    assert [a.get_text() for a in built.page("other.html").select("a.term")] == ["margin"]


def test_a_failed_check_ends_the_build_with_its_message(site):
    site.write("nemo_rl_ref/equations/error.txt", "equation 'loss' is not what double computes")
    result = site.build(builder="dummy")
    assert result.code != 0
    assert "Equation error: equation 'loss' is not what double computes" in result.text


def test_the_checks_end_when_a_notebook_fails(site):
    """Nobody waits for them then, and they would go on for minutes."""
    site.write(
        "nemo_rl_ref/equations/__main__.py",
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(100)\n",
    )
    site.notebook(
        "one", "import os, time\nwhile not os.path.exists('pid'): time.sleep(0.05)\n1 / 0"
    )
    done = site.run("-m", "sphinx", ".", "_build/html")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    number = int((site.top / "pid").read_text())
    deadline = time.monotonic() + 30
    while alive(number):
        assert time.monotonic() < deadline, "the checks go on"
        time.sleep(0.05)


def alive(number):
    """Whether there is a process of that number."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_new_result_rewrites_the_pages_that_show_it(site):
    site.build()
    site.equations({"loss": LOSS | {"difference": 5e-16}})
    result = site.build()
    assert "largest difference 5e-16" in result.page("index.html").get_text()
    assert "5e-16" in result.page("table.html").get_text()
    again = site.build()
    assert "checking the equations" not in again.text
    assert re.search(r"0 added, 0 changed, 0 removed", again.text)


def test_what_nobody_checked_is_refused(site):
    refused = {
        "lost": ("```{equation} lost\n```", "no equation is labeled 'lost'; did you mean 'loss'?"),
        "bare": ("$$\na\n$$", "docs/bare.md:3: WARNING: a displayed equation without a label"),
        "own": ("$$\na\n$$ (eq-own)", "the equation 'eq-own' is not checked"),
        "math": ("```{math}\na\n```", "docs/math.md:3: WARNING: a displayed equation without a"),
        "twice": ("```{equation} loss\n```", "duplicate label of equation eq-loss"),
    }
    index = site.top / "docs/index.md"
    index.write_text(index.read_text().replace("other\n", "\n".join(["other", *refused, ""])))
    for name, (content, _) in refused.items():
        site.write(f"docs/{name}.md", f"# Page\n\n{content}\n")
    result = site.build(builder="dummy")
    assert result.code != 0
    for _, message in refused.values():
        assert message in result.text


def test_an_equation_that_no_page_shows_is_refused(site):
    site.equations({"loss": LOSS, "other": LOSS | {"title": "Another"}})
    result = site.build(builder="dummy")
    assert result.code != 0
    assert "eq-other" in result.text


def test_an_equation_has_sliders_and_its_page_alone_the_script(site):
    slider = {"name": "beta", "places": [], "latex": r"\beta", "meaning": r"strength, $\beta$"}
    slider |= {"low": 0.0, "high": 1.0, "step": 0.01, "sums_to_one": False}
    play = {"body": "return v.beta;", "values": {"beta": 0.5}, "sliders": [slider]}
    site.equations({"loss": LOSS | {"play": play}}, runtime="const equationRuntime = {};")
    built = site.build()
    assert built.code == 0, built.text
    page = built.page("index.html")
    (box,) = page.select("details.equation-play")
    assert box.has_attr("hidden")  # until the script shows it
    data = json.loads(box["data-play"])
    assert (data["body"], data["sliders"]) == ("return v.beta;", [["beta", []]])
    (range_input,) = box.select("input[type=range]")
    assert range_input["aria-label"] == "strength, beta"
    for name, moves in (("index.html", True), ("other.html", False)):
        for script in ("equation-play.js", "const equationRuntime"):
            assert (script in str(built.page(name))) is moves
