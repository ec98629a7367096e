# SPDX-License-Identifier: Apache-2.0
"""Token tables: what is drawn, escaped, marked and refused."""

from html.parser import HTMLParser

import pytest
import torch

from nemo_rl_ref.show.tokens import TokenTable, after_first


class Cells(HTMLParser):
    """Rows of (text, style), and the tags that were opened."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.tags = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(["", dict(attrs)["style"]])

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][-1][0] += data


def table():
    return TokenTable(
        "One & only",
        {"token": ["<s>", "7"], "a_mask": torch.tensor([0, 1]), "log π": [None, -0.126]},
        marked=torch.tensor([0, 1]),
    )


def test_texts_and_numbers_in_html():
    cells = Cells(table()._repr_html_())
    texts = [[text for text, _ in row] for row in cells.rows]
    assert texts == [["token", "<s>", "7"], ["a_mask", "0", "1"], ["log π", "–", "−0.13"]]
    assert set(cells.tags) == {"table", "caption", "tbody", "tr", "th", "td", "wbr"}
    assert "One &amp; only" in table()._repr_html_()


def test_marked_positions_are_bold_in_every_row():
    for row in Cells(table()._repr_html_()).rows:
        assert ["bold" in style for _, style in row] == [False, False, True]


def test_text():
    assert repr(table()).split("\n") == [
        "One & only",
        "token   <s>     7",
        "a_mask    0     1",
        "log π     – −0.13",
    ]


def test_no_negative_zero():
    assert repr(TokenTable("", {"x": [-0.001]})).endswith("  0.00")


@pytest.mark.parametrize("changes", [{"rows": {"a": [1, 2], "b": [1]}}, {"marked": [True]}])
def test_rows_of_another_length_are_named(changes):
    arguments = {"caption": "", "rows": {"a": [1, 2]}, **changes}
    with pytest.raises(ValueError, match="(b|marked): got 1 positions, expected 2"):
        TokenTable(**arguments)


def test_next_token_values_lie_under_their_token():
    assert after_first(torch.tensor([1, 2])) == [None, 1, 2]
