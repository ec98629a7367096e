# SPDX-License-Identifier: Apache-2.0
"""Facts read off a checkout: symbols, signatures, keys, files and lines."""

import json
import os
import subprocess

import pytest
from nemo_rl_checkouts import commit, git

from nemo_rl_ref.upstream import COMMIT, FOLDER, keys
from nemo_rl_ref.upstream.__main__ import main
from nemo_rl_ref.upstream.checkout import Checkout
from nemo_rl_ref.upstream.extract import extract
from nemo_rl_ref.upstream.keys import extract_keys

FILES = {
    "nemo_rl/__init__.py": "raise SystemExit('imported')",
    "nemo_rl/parts.py": """
        class Kwargs(TypedDict):
            name: str
            kwargs: dict[str, Any]
        class Milestones(TypedDict):
            milestones: list[int]
        class Base(TypedDict):
            backend: "str | None"
        class Extended(Base):
            engine: NotRequired[dict[str, int]]
        Several = Union[Kwargs, None]
    """,
    "nemo_rl/algorithms/one.py": """
        from nemo_rl.parts import Base, Extended, Kwargs, Milestones, Several
        class Section(BaseModel, extra="allow"):
            seed: int = 1
            schedule: Optional[list[Kwargs | Milestones]] = None
            number: Annotated[Literal["a", "b"], "note"] = "a"
            several: Several = None
            own: "Settings"
            one_of: list[int] | dict
        class Settings(BaseModel):
            depth: int
        class MasterConfig(BaseModel, extra="allow"):
            section: Section = Field(default_factory=Section)
            generation: Base
            more: Extended
            env: dict[str, Any]
    """,
    "nemo_rl/algorithms/two.py": """
        class Settings(BaseModel):
            width: int
        class MasterConfig(BaseModel):
            other: Settings
    """,
    "nemo_rl/algorithms/__init__.py": "from nemo_rl.algorithms.losses import TinyLossFn, _own",
    "nemo_rl/algorithms/losses.py": '''
        import torch
        SCALE = 2
        def _own(x): return x
        @torch.no_grad()
        @cache
        def halve(x: float, /, y=1.5, *more, key: str = "a", **rest) -> float:
            """Not a formula."""
            return x / 2
        class TinyLossFn(LossFunction):
            kind = LossType.TOKEN_LEVEL
            clip: float
            beta: float = 0.1
            def __init__(self, config, *, scale=1):
                self.config = config
            def __call__(self, data): return data
            def _private(self): pass
            @property
            def size(self): return 1
    ''',
    "examples/run_tiny.py": "print(1)",
    "examples/configs/tiny.yaml": "grpo: {eps: 1e-8, empty: {}, several: [1, {a: 2}]}",
    "examples/configs/recipes/a.yaml": """
        defaults: ../b.yaml
        extra: {_override_: true, list: [{x: 1}, 2]}
    """,
    "unrelated.yaml": "not_a_key: 1",
}


@pytest.fixture
def small_checkout(tmp_path, monkeypatch):
    """A repository with a few classes and files."""
    monkeypatch.setattr(keys, "HELD_TOO", {"other": ("Kwargs",)})
    monkeypatch.setattr(keys, "PASSED_ON", ())
    monkeypatch.setattr(keys, "LOOKED_UP", ("extra.looked_up",))
    commit(tmp_path / "RL", FILES)
    return tmp_path / "RL"


def test_symbols_have_signatures_fields_and_lines(small_checkout):
    manifest = extract(Checkout(small_checkout))["manifest.json"]
    symbols, file = manifest["symbols"], "nemo_rl/algorithms/losses.py"
    assert symbols["nemo_rl.algorithms.losses.halve"] == {
        "kind": "function",
        "file": file,
        "line": 7,
        "signature": "(x, /, y=1.5, *more, key='a', **rest)",
    }
    assert symbols["nemo_rl.algorithms.losses.TinyLossFn"] == {
        "kind": "class",
        "file": file,
        "line": 10,
        "bases": ["LossFunction"],
        "fields": {
            "kind": {"default": "LossType.TOKEN_LEVEL"},
            "clip": {"type": "float"},
            "beta": {"type": "float", "default": "0.1"},
        },
        "methods": {
            "__init__": {"line": 14, "signature": "(self, config, *, scale=1)"},
            "__call__": {"line": 16, "signature": "(self, data)"},
            "size": {"line": 19, "signature": "(self)"},
        },
    }
    assert not any("_own" in name or "SCALE" in name for name in symbols)
    assert manifest["exports"] == {
        "nemo_rl.algorithms.TinyLossFn": "nemo_rl.algorithms.losses.TinyLossFn"
    }


def test_configurations_scripts_and_files(small_checkout):
    manifest = extract(Checkout(small_checkout))["manifest.json"]
    assert manifest["configs"] == {
        "tiny.yaml": {"grpo.eps": "1e-8", "grpo.empty": {}, "grpo.several": [1, {"a": 2}]}
    }
    assert manifest["scripts"] == ["examples/run_tiny.py"]
    assert manifest["files"] == tuple(sorted(FILES))
    assert manifest["commit"] == git(small_checkout, "rev-parse", "HEAD")
    assert manifest["date"] == git(small_checkout, "log", "-1", "--format=%cs")


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ("return x / 2", "return x / 2  # half", set()),
        ("Not a formula", "Still none", set()),
        ("-> float", "-> int", set()),
        ("return x / 2", "return x / 3", {"halve.body"}),
        ("clip: float\n", "clip: float = 1\n", {"TinyLossFn.body"}),
        ("return data", "return -data", {"TinyLossFn.__call__"}),
        ("self): pass", "self): return 2", {"TinyLossFn._private"}),
    ],
)
def test_a_hash_changes_with_what_is_computed_and_with_nothing_else(
    small_checkout, before, after, changed
):
    def hashes():
        sources = extract(Checkout(small_checkout))["sources.json"]["sources"]
        return {
            f"{name.rpartition('.')[2]}.{part}": value
            for name, parts in sources.items()
            for part, value in parts.items()
        }

    first, name = hashes(), "nemo_rl/algorithms/losses.py"
    text = FILES[name].replace(before, after)
    assert text != FILES[name]
    commit(small_checkout, {name: text})
    second = hashes()
    assert first.keys() == second.keys()
    assert {key for key in first if first[key] != second[key]} == changed


def test_a_hash_covers_the_private_functions_that_are_called(small_checkout):
    name = "nemo_rl/algorithms/losses.py"
    called = FILES[name].replace("return x / 2", "return _own(x) / 2")
    commit(small_checkout, {name: called})
    first = extract(Checkout(small_checkout))["sources.json"]["sources"]
    commit(small_checkout, {name: called.replace("_own(x): return x", "_own(x): return 2 * x")})
    second = extract(Checkout(small_checkout))["sources.json"]["sources"]
    assert {n.rpartition(".")[2] for n in first if first[n] != second[n]} == {"halve"}


def test_keys_are_those_of_classes_and_files(small_checkout):
    made, _ = extract_keys(Checkout(small_checkout))
    assert made["keys"] == [
        "env",
        "extra", "extra.list", "extra.list.#.x", "extra.looked_up",
        "generation", "generation.backend", "generation.engine", "generation.engine.*",
        "grpo", "grpo.empty", "grpo.eps", "grpo.several", "grpo.several.#.a",
        "more", "more.backend", "more.engine", "more.engine.*",
        "other", "other.kwargs", "other.name", "other.width",
        "section", "section.number", "section.one_of", "section.own", "section.own.depth",
        "section.schedule", "section.schedule.#.kwargs", "section.schedule.#.milestones",
        "section.schedule.#.name",
        "section.seed", "section.several", "section.several.kwargs", "section.several.name",
    ]  # fmt: skip
    assert made["open"] == [
        "env",
        "other.kwargs",
        "section.one_of",
        "section.schedule.#.kwargs",
        "section.several.kwargs",
    ]


def test_places_are_lines_of_the_example_or_else_of_the_class(small_checkout, monkeypatch):
    recipe = "examples/configs/recipes/a.yaml"
    monkeypatch.setattr(keys, "PLACES", ("examples/none.yaml", recipe))
    _, made = extract_keys(Checkout(small_checkout))
    one, two, parts = (
        f"nemo_rl/{name}.py" for name in ("algorithms/one", "algorithms/two", "parts")
    )
    assert made["files"] == [recipe, one, two, parts]
    found = {key: (made["files"][number], line) for key, (number, line) in made["places"].items()}
    wanted = {  # lines counted in the texts above, which begin with an empty one
        "extra": (recipe, 3),
        "extra.list.#.x": (recipe, 3),
        "section": (one, 13),
        "section.seed": (one, 4),
        "section.schedule.#.milestones": (parts, 6),
        "other.width": (two, 3),
        "generation.engine": (parts, 10),
    }
    assert {key: found[key] for key in wanted} == wanted
    assert "defaults" not in found and "extra.looked_up" not in found  # no key; in no file


def test_what_cannot_be_read_is_a_note_with_file_and_line(small_checkout, tmp_path, capsys):
    commit(
        small_checkout,
        {
            "nemo_rl/broken.py": "x = 1\ndef f(:\n",
            "examples/configs/broken.yaml": "a: 1\nb: [1\n",
            "examples/configs/tagged.yaml": "a: 1\nb: !!python/object/apply:os.abort []\n",
        },
    )
    assert main(["extract", str(small_checkout), "--to", str(tmp_path)]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert notes[0].startswith("note: nemo_rl/broken.py:2: not read: invalid syntax")
    assert notes[1].startswith("note: examples/configs/broken.yaml:3: not read: expected")
    assert notes[2].startswith("note: examples/configs/tagged.yaml:2: not read: could not")
    assert "tiny.yaml" in json.loads((tmp_path / "manifest.json").read_text())["configs"]


def test_a_folder_that_is_no_checkout_is_one_error(small_checkout, tmp_path, capsys):
    def error(*arguments):
        assert main(["extract", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    (tmp_path / "empty").mkdir()
    assert "which is no folder" in error(tmp_path / "nothing")
    assert "not a git repository" in error(tmp_path / "empty")
    assert "the folder nemo_rl/ inside a checkout" in error(small_checkout / "nemo_rl")
    assert "it has no commit v9" in error(small_checkout, "--at", "v9")
    other = tmp_path / "other"
    commit(other, {"README.md": "x"})
    assert "has no nemo_rl/__init__.py" in error(other)
    head = git(small_checkout, "rev-parse", "HEAD")
    assert f"got commit {head}, expected {COMMIT}" in error(small_checkout)
    commit(small_checkout, {})
    clone = ["git", "clone", "-q", "--depth", "1", f"file://{small_checkout}", tmp_path / "shallow"]
    subprocess.run(clone, check=True)
    assert "it is shallow: git -C" in error(tmp_path / "shallow", "--at", head)


def test_the_files_are_what_the_checkout_gives(tmp_path, capsys):
    path = os.environ.get("NEMO_RL_CHECKOUT")
    if not path:
        pytest.skip("NEMO_RL_CHECKOUT does not name a checkout of NeMo RL")
    assert main(["extract", path, "--at", COMMIT, "--to", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""  # no notes
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [
        "keys.json", "manifest.json", "places.json", "readers.json", "sources.json",
    ]  # fmt: skip
    for name in names:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_a_class_that_is_gone_is_a_note(small_checkout, monkeypatch):
    monkeypatch.setattr(keys, "HELD_TOO", {"other": ("Gone",)})
    checkout = Checkout(small_checkout)
    extract_keys(checkout)
    (note,) = checkout.notes
    assert "other has no keys of a class Gone, which is not there" in note
