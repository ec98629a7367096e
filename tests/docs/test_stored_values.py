# SPDX-License-Identifier: Apache-2.0
"""Numbers in prose: the cell option `num` in a notebook, the role `{num}` in a page."""

import pytest
from notebook_cells import parse_options
from notebook_kernel import Notebook, NotebookFailure, execute


def test_a_page_prints_what_the_notebook_stored(built):
    home = built.page("index.html")
    links = [(a.get_text(), a["href"]) for a in home.select("article a.stored-value")]
    assert links == [
        ("17", "notebooks/first.html#stored"),
        ("5.67 of  it", "notebooks/first.html#stored"),
    ]


def test_the_notebook_lists_what_it_stored_without_the_options(built):
    text = built.page("notebooks/first.html").get_text()
    assert "the-number  17\nratio       5.67 of  it" in text
    assert "#| num" not in text


def test_a_page_that_embeds_the_cell_does_not_repeat_the_values(built):
    stored = built.page("deep/down/losses.html").select(".embedded-cell")[-1]
    assert "stored = NUMBER" in stored.get_text()
    assert "the-number" not in stored.get_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("num: gap", "a name is lower-case words"),
        ("num: the_gap = {1}", "a name is lower-case words"),
        ("num: gap = 0.1", "it computes nothing"),
        ("num: gap = {1", "expecting '}'"),
        ("num: gap = {1 +}", "should be 'num: some-name = {expression:format}'"),
        ("num: gap = {1}\n#| num: gap = {2}", "value 'gap' is stored twice"),
    ],
)
def test_a_malformed_option_is_refused_with_its_line(option, message):
    with pytest.raises(ValueError, match="gap") as error:
        parse_options(f"#| label: x\n#| {option}\nx = 1")
    text, line = error.value.args
    assert message in text
    assert line == option.count("\n") + 1


@pytest.mark.parametrize(
    ("text", "value"),
    [('{len("ab"):,} "of"', '2 "of"'), ("{f'{1}'} 'of'", "1 'of'"), (r"{1}\u00a0%", "1\u00a0%")],
)
def test_a_text_may_have_quotes_of_either_kind_and_escapes(text, value):
    (num,) = parse_options(f"#| num: n = {text}\n1")[1]
    assert eval(num.expression) == value


@pytest.fixture
def failures(tmp_path):
    """Executes a notebook that is given as cells, and returns the message of its failure."""

    def execute_cells(text):
        path = tmp_path / "notebooks" / "bad.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        with pytest.raises(NotebookFailure) as failure:
            execute(Notebook(path, tmp_path), print)
        return str(failure.value)

    return execute_cells


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("{losss:.2f}", "NameError: name 'losss' is not defined"),
        ("{loss:.2q}", "ValueError: Unknown format code 'q'"),
        ("{loss / 0:.2f}", "ZeroDivisionError: "),
        ("{loss}", "a number should be formatted, like {loss:.3g}, got '0.3333333333333333'"),
        ("{'':s}", "it should be one line of text, got ''"),
        ("{chr(10)}", r"it should be one line of text, got '\n'"),
    ],
)
def test_a_value_that_cannot_be_computed_names_notebook_cell_and_line(failures, option, why):
    message = failures(
        f"# %%\n#| label: losses\n#| num: fine = {{1}}\n#| num: loss = {option}\nloss = 1 / 3\n"
    )
    start = f"notebooks/bad.py:4: cell 1 (label losses): value 'loss' = {option!r}: "
    assert message.startswith(start + why)


def test_a_cell_that_is_to_raise_stores_no_values(failures):
    message = failures('# %% tags=["raises-exception"]\n#| num: gap = {1}\n1 / 0\n')
    assert message == "notebooks/bad.py:2: a cell tagged 'raises-exception' stores no values"
