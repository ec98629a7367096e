# SPDX-License-Identifier: Apache-2.0
"""What docstrings say twice: defaults of the code, citations of the bibliography and equations."""

import ast
import re

import pytest
from small_site import TOP
from sources import docstrings

TEXTS = [(file, line, " ".join(text.split())) for file, line, text in docstrings(TOP)]
#: Papers that docstrings cite and no page does, so the bibliography has no entry.
UNLISTED = {"2211.17192", "2406.11704", "2505.22312", "2506.02864"}
#: ``key``, 0.5 if not given — also ``key``, "a" (which is b) if not given.
GIVEN = re.compile(
    r"``(?P<key>\w+)``(?:(?!``|\. )[^`])*?(?P<value>\"[^\"]*\"|(?<![\w.])-?\d[\d.]*)"
    r"(?: \([^)]*\))?,? \(?(?:if|where) not given"
)
CITATION = re.compile(
    r"(?P<surname>[A-Z][\w'’-]+)(?: et al\.| and [A-Z]\w+)? \((?P<year>\d{4})\), "
    r"https://arxiv\.org/abs/(?P<number>[\d.]+\d)(?:[^;.]*?Eqs?\. (?P<at>[\d.]+\d|\d))?"
)


def read_defaults(tree):
    """Defaults by class and key, where a class reads a key of its configuration."""
    found = {}
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        for node in ast.walk(owner):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("getattr", "positive_setting") and len(node.args) == 3:
                    key, default = node.args[1:]
                    if isinstance(key, ast.Constant) and isinstance(default, ast.Constant):
                        found[owner.name, key.value] = default.value
    return found


def stated_defaults():
    """Place, class, key, value in the docstring, value in the code."""
    for path in sorted((TOP / "nemo_rl_ref/custom").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        read = read_defaults(tree)
        for owner in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
            text = " ".join((ast.get_docstring(owner) or "").split())
            for match in GIVEN.finditer(text):
                if (owner.name, match["key"]) in read:
                    stated = ast.literal_eval(match["value"].rstrip("."))
                    yield (
                        f"{path.name}:{owner.name}",
                        match["key"],
                        stated,
                        read[owner.name, match["key"]],
                    )


def bibliography():
    """First author's surname and the year by arXiv number."""
    text = (TOP / "docs/references.bib").read_text(encoding="utf-8")
    found = {}
    for entry in re.split(r"(?m)^@", text):
        for number in re.findall(r"arxiv\.org/abs/([\d.]+\d)|eprint = \{([\d.]+)\}", entry):
            author, year = (re.search(rf"{k} = \{{(.*)\}}", entry)[1] for k in ("author", "year"))
            plain = re.sub(r"[{}\\'\"`^~]", "", author.split(",")[0])
            key = re.match(r"\w+\{([\w-]+)", entry)[1]
            found[number[0] or number[1]] = (plain, year, key)
    return found


def equation_numbers():
    """Numbers of a paper's equations that the site's equations cite, by its key."""
    found = {}
    for path in sorted((TOP / "nemo_rl_ref/equations").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                named = {
                    k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
                }
                if "source" in named:
                    numbers = re.findall(r"Eqs?\. ([\d.]+)", named.get("at") or "")
                    found.setdefault(named["source"], set()).update(numbers)
    return found


BIBLIOGRAPHY = bibliography()
CITED = [
    (f"{file}:{line}", match) for file, line, text in TEXTS for match in CITATION.finditer(text)
]


def test_a_default_in_a_docstring_is_the_codes():
    stated = list(stated_defaults())
    assert [found for found in stated if found[2] != found[3]] == []
    assert len(stated) >= 15


def test_a_citation_is_in_the_bibliography_with_its_author_and_year():
    wrong = []
    for place, match in CITED:
        if match["number"] in UNLISTED:
            continue
        author, year, _ = BIBLIOGRAPHY.get(match["number"], ("no entry", "", ""))
        years = {year, f"20{match['number'][:2]}"}  # of the conference, or of the preprint
        if author.split()[-1] != match["surname"].replace("'", "") or match["year"] not in years:
            wrong.append((place, match[0], author, year))
    assert wrong == []
    assert len(CITED) >= 35


def test_an_arxiv_number_of_a_docstring_is_in_the_bibliography():
    numbers = [
        (f"{file}:{line}", number)
        for file, line, text in TEXTS
        for number in re.findall(r"(?:arxiv\.org/abs/|arXiv:)([\d.]+\d)", text)
    ]
    known = {*BIBLIOGRAPHY, *UNLISTED}
    assert [found for found in numbers if found[1] not in known] == []
    assert set(BIBLIOGRAPHY) & UNLISTED == set()


def test_a_papers_equation_has_one_number_in_docstrings_and_on_pages():
    on_pages, wrong, compared = equation_numbers(), [], 0
    for place, match in CITED:
        key = BIBLIOGRAPHY.get(match["number"], ("", "", ""))[2]
        if match["at"] and on_pages.get(key):
            compared += 1
            if match["at"] not in on_pages[key]:
                wrong.append((place, match[0], sorted(on_pages[key])))
    assert wrong == []
    assert compared >= 7


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("``a_key``, 0.5 if not given.", [("a_key", "0.5")]),
        ('``a`` chooses: "tokens" (if not given) is', [("a", '"tokens"')]),
        ("``a``; ``b``, 80 if not given", [("b", "80")]),
    ],
)
def test_a_default_is_found_in_text(text, found):
    assert [(match["key"], match["value"]) for match in GIVEN.finditer(text)] == found
