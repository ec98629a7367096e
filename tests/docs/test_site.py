# SPDX-License-Identifier: Apache-2.0
"""The project's own site: builds without a warning, loads nothing from elsewhere, documents all."""

import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest
from bs4 import BeautifulSoup
from small_site import TOP
from sphinx.util.inventory import InventoryFile

import nemo_rl_ref

LOADING_RELS = {"stylesheet", "icon", "manifest", "preload", "modulepreload", "prefetch"}
LOADING_RELS |= {"preconnect", "dns-prefetch", "apple-touch-icon"}
OTHER_HOST = re.compile(r"^\s*(https?:|//)", re.IGNORECASE)
CSS_LOAD = re.compile(r"(?:url\(\s*|@import\s+)[\"']?(?:https?:)?//[^\s\"')]+", re.IGNORECASE)
JS_LOAD = re.compile(
    r"(?:import\(|import |fetch\(|importScripts\(|\.src\s*=|\.href\s*=|\.open\(\"GET\",)\s*"
    r"[\"'`](?:https?:)?//[^\"'`]+"
)
#: A command-line option whose two hyphens became a dash: the command fails when it is pasted.
DASHED_OPTION = re.compile(r"(?<![\w)])–[a-z][\w-]*")

SCRIPTS = {"nemo_rl_ref.tiny.make"}  # run with `python -m`, not imported


def loads_elsewhere(name, text):
    """List what a built file makes a browser load from another host."""
    if name.endswith(".css"):
        return CSS_LOAD.findall(text)
    if name.endswith(".js"):
        return JS_LOAD.findall(text)
    found = []
    soup = BeautifulSoup(text, "html.parser")
    for tag in soup.find_all(["script", "img", "iframe", "source", "video", "audio", "embed"]):
        found += [tag.get("src", ""), *tag.get("srcset", "").split(",")]
    for tag in soup.find_all("link"):
        if LOADING_RELS & set(tag.get("rel", [])):
            found.append(tag.get("href", ""))
    found += [tag.get("data", "") for tag in soup.find_all("object")]
    found = [address for address in found if OTHER_HOST.match(address)]
    for tag in soup.find_all("style"):
        found += CSS_LOAD.findall(tag.get_text())
    for tag in soup.find_all(style=True):
        found += CSS_LOAD.findall(tag["style"])
    for tag in soup.find_all("script", src=False):
        found += JS_LOAD.findall(tag.get_text())
    return found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://cdn.example/x.js"></script>'),
        ("a.html", '<link rel="stylesheet" href="//cdn.example/x.css">'),
        ("a.html", '<link rel="shortcut icon" href="https://example/x.ico">'),
        ("a.html", '<img srcset="https://example/x.png 2x">'),
        ("a.html", "<style>@import 'https://fonts.example/css';</style>"),
        ("a.html", '<p style="background: url(https://example/x.png)">x</p>'),
        ("a.html", '<script>import("https://cdn.example/x.js")</script>'),
        ("a.css", "@font-face { src: url('https://fonts.example/x.woff') }"),
        ("a.js", 's=document.createElement("script");s.src="https://cdn.example/x.js"'),
    ],
)
def test_a_load_from_elsewhere_is_seen(name, text):
    assert loads_elsewhere(name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<a href="https://arxiv.org/abs/2305.18290">paper</a>'),
        ("a.html", '<script src="_static/x.js"></script><link rel="author" href="https://x.org">'),
        ("a.css", ".a { background: url('x.png') } /* https://example.org */"),
        ("a.js", "// see https://example.org"),
    ],
)
def test_a_link_is_no_load(name, text):
    assert loads_elsewhere(name, text) == []


def test_an_option_on_a_page_has_its_hyphens(project_html):
    """Shown once on a text that has lost them."""
    assert DASHED_OPTION.findall("run_dpo –config dpo.yaml, 3–5, (a)–b") == ["–config"]
    found = {
        page.relative_to(project_html).as_posix(): DASHED_OPTION.findall(
            BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").get_text(" ")
        )
        for page in project_html.rglob("*.html")
        if "_modules" not in page.parts
    }
    assert {page: options for page, options in found.items() if options} == {}


def test_no_built_file_loads_from_elsewhere(project_html):
    files = [p for p in project_html.rglob("*") if p.suffix in (".html", ".css", ".js")]
    assert len(files) > 30
    for path in files:
        found = loads_elsewhere(path.name, path.read_text("utf-8"))
        assert found == [], path.relative_to(project_html)


def test_an_unchanged_build_executes_nothing_and_loads_no_torch(project_html, tmp_path):
    html = shutil.copytree(project_html, tmp_path / "html")  # other tests read the original
    for store in ("notebooks", "equations", "commands", "sources", "math"):
        (tmp_path / store).symlink_to(project_html.parent / store)
    code = (
        "import sys; from sphinx.cmd.build import main; code = main(sys.argv[1:]);"
        "print('torch loaded:', 'torch' in sys.modules); sys.exit(code)"
    )
    arguments = ["-W", "--keep-going", "-j", "auto", ".", str(html)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=TOP, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "executing" not in done.stdout
    assert "0 added, 0 changed, 0 removed" in done.stdout
    assert "torch loaded: False" in done.stdout


def public_modules():
    """List the package's modules that are neither private nor a script."""
    infos = pkgutil.walk_packages(nemo_rl_ref.__path__, "nemo_rl_ref.")
    names = {info.name for info in infos} - SCRIPTS
    private = {name for name in names if any(part.startswith("_") for part in name.split("."))}
    return sorted(names - private)


def public_objects():
    """List the public classes and functions that the package defines, each once."""
    found = {}
    for name in public_modules():
        module = importlib.import_module(name)
        hands_on = hasattr(module, "__path__")  # a package, what its private files define
        for attribute in vars(module).get("__all__", dir(module)):
            value = getattr(module, attribute)
            is_code = inspect.isclass(value) or inspect.isfunction(value)
            if not is_code or attribute.startswith("_"):
                continue
            if value.__module__ == name or (hands_on and "nemo_rl_ref" in value.__module__):
                found.setdefault(value, []).append(f"{name}.{attribute}")
    return found


def test_every_public_name_is_documented(project_html):
    inventory = InventoryFile.loads(project_html.joinpath("objects.inv").read_bytes(), uri="").data
    known = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    missing = [names[0] for value, names in public_objects().items() if not known & set(names)]
    assert missing == []


def test_every_public_name_has_a_docstring():
    bare = [names[0] for value, names in public_objects().items() if not inspect.getdoc(value)]
    for value, names in public_objects().items():
        if inspect.isclass(value):
            bare += [
                f"{names[0]}.{name}"
                for name, member in vars(value).items()
                if inspect.isfunction(member)
                and not name.startswith("_")
                and not inspect.getdoc(getattr(value, name))
            ]
    assert bare == []


def test_next_leads_through_the_guides_in_the_order_to_read_them(project_html):
    """From the home page on, as a reader clicks; and back."""
    names, page = [], project_html / "index.html"
    while len(names) < 17:
        names.append(page.relative_to(project_html).with_suffix("").as_posix().split("/")[-1])
        soup = BeautifulSoup(page.read_text("utf-8"), "html.parser")
        (following,) = soup.select("a.right-next")
        came_from, page = page, (page.parent / following["href"]).resolve()
        (back,) = BeautifulSoup(page.read_text("utf-8"), "html.parser").select("a.left-prev")
        assert (page.parent / back["href"]).resolve() == came_from
    assert [name for name in names if name != "index"] == [
        "get-started", "loss-functions", "data-to-batch", "custom-dpo", "preference-data",
        "custom-grpo", "hyperparameter-optimization", "mathematical-foundations", "policy-gradient",
        "preferences", "ppo", "grpo", "kl-and-distillation", "scaling", "fused-kernels",
    ]  # fmt: skip


def test_home_has_a_card_for_each_guide_and_no_hole(project_html):
    home = BeautifulSoup((project_html / "index.html").read_text("utf-8"), "html.parser")
    links = [card["href"] for card in home.select(".sd-card a.sd-stretched-link")]
    assert links[:2] == ["get-started.html", "advanced/algorithm-development/index.html"]
    assert len(links) == len(set(links)) == 10  # two columns
    tabs = [tab.get_text(strip=True) for tab in home.select("ul.bd-navbar-elements li a")]
    assert tabs[:3] == ["Get Started", "Advanced", "Reference"]
