# SPDX-License-Identifier: Apache-2.0
"""Configuration files: inheritance, overrides, resolvers. Small files, written by each test.

With ``NEMO_RL_CHECKOUT`` set to a checkout of NeMo RL at the pinned commit, every configuration in
it is loaded by NeMo RL's loader as well, and the results are compared.
"""

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_rl_ref.upstream import load_manifest
from nemo_rl_ref.utils import config as mirror
from nemo_rl_ref.utils.config import (
    OverridesError,
    load_config,
    load_config_with_inheritance,
    merge_with_override,
    parse_hydra_overrides,
    register_omegaconf_resolvers,
    resolve_path,
)


@pytest.fixture
def write(tmp_path):
    """Writes files from their names and contents; gives the path of the last."""

    def write_files(**files):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write_files


def plain(config):
    return OmegaConf.to_container(config, resolve=True)


# The mirror


def public(module):
    return {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    }


def test_names_and_signatures_are_nemo_rls():
    symbols = load_manifest()["symbols"]
    expected = {
        name.rpartition(".")[2]: entry
        for name, entry in symbols.items()
        if name.startswith("nemo_rl.utils.config.")
    }
    assert public(mirror).keys() == expected.keys()
    for name, value in public(mirror).items():
        if expected[name]["kind"] == "function":
            arguments = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0].args
            for argument in arguments.args:
                argument.annotation = None
            assert f"({ast.unparse(arguments)})" == expected[name]["signature"], name
        else:
            assert [base.__name__ for base in value.__bases__] == expected[name]["bases"]


def test_importing_the_package_needs_neither_omegaconf_nor_hydra():
    code = (
        "import sys; sys.modules['omegaconf'] = sys.modules['hydra'] = sys.modules['yaml'] = None; "
        "import nemo_rl_ref.utils.config, nemo_rl_ref.config.keys"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Inheritance


def test_a_child_wins_and_parents_merge_in_order(write):
    path = write(
        first="a: {x: 1, y: 1, z: 1}",
        second="a: {y: 2, z: 2}",
        child="""
            defaults: [first.yaml, second.yaml]
            a: {z: 3}
        """,
    )
    config = load_config(path)
    assert plain(config) == {"a": {"x": 1, "y": 2, "z": 3}}
    assert "defaults" not in config


def test_a_parent_looks_for_its_parents_in_its_own_folder(write):
    path = write(
        base__grandparent="a: {x: 1, y: 1}",
        base__deeper__parent="defaults: ../grandparent.yaml\na: {y: 2}",
        recipes__child="defaults: ../base/deeper/parent.yaml",
    )
    assert plain(load_config(path)) == {"a": {"x": 1, "y": 2}}


def test_base_dir_is_where_this_files_parents_are(write, tmp_path):
    path = write(elsewhere__parent="a: 1", child="defaults: parent.yaml")
    with pytest.raises(FileNotFoundError, match=r"parent\.yaml, which .*child\.yaml names under"):
        load_config(path)
    config = load_config_with_inheritance(path, tmp_path / "elsewhere")
    assert plain(config) == {"a": 1}


def test_an_absolute_parent(write, tmp_path):
    write(parent="a: 1")
    path = write(folder__child=f"defaults: {tmp_path}/parent.yaml")
    assert plain(load_config(path)) == {"a": 1}
    assert resolve_path(Path("base"), "/abs/file.yaml") == Path("/abs/file.yaml")
    assert resolve_path(Path("base"), "file.yaml") == Path("base/file.yaml")


def test_override_replaces_a_section_of_the_top_level_only(write):
    path = write(
        parent="data: {train: {name: squad, split: train}, shuffle: true}\nenv: {a: {x: 1, y: 1}}",
        child="""
            defaults: parent.yaml
            data: {_override_: true, train: {path: mine.jsonl}}
            env: {a: {_override_: true, x: 2}}
        """,
    )
    config = plain(load_config(path))
    assert config["data"] == {"train": {"path": "mine.jsonl"}}
    # As in NeMo RL, whose merge looks at the top level: the marker below it stays.
    assert config["env"] == {"a": {"x": 2, "y": 1, "_override_": True}}


def test_override_that_is_false_merges():
    base = OmegaConf.create({"a": {"x": 1}})
    child = OmegaConf.create({"a": {"_override_": False, "y": 2}})
    merged = merge_with_override(base, child)
    assert plain(merged) == {"a": {"x": 1, "y": 2, "_override_": False}}


def test_interpolations_follow_the_child_and_the_command_line(write):
    path = write(
        parent="p: {batch: 2, twice: '${mul:2,${.batch}}', same: '${p.batch}'}",
        child="defaults: parent.yaml\np: {batch: 3}",
    )
    register_omegaconf_resolvers()
    config = load_config(path)
    assert plain(config)["p"] == {"batch": 3, "twice": 6, "same": 3}
    assert plain(parse_hydra_overrides(config, ["p.batch=5"]))["p"]["twice"] == 10


def test_a_mandatory_value_may_come_later(write):
    path = write(
        parent="save: ???\na:\n  b: ???",
        middle="defaults: parent.yaml",
        child="defaults: middle.yaml",
    )
    config = load_config(path)
    assert OmegaConf.missing_keys(config) == {"save", "a.b"}
    parse_hydra_overrides(config, ["save=dir", "a.b=1"])
    assert plain(config) == {"save": "dir", "a": {"b": 1}}


def test_an_interpolation_at_the_top_level_is_left_alone(write):
    path = write(parent="base: {x: 1}", child="defaults: parent.yaml\ncopy: ${base}")
    assert plain(load_config(path)) == {"base": {"x": 1}, "copy": {"x": 1}}


def test_errors_name_the_file(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*nothing\.yaml$"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ValueError, match=r"list\.yaml, which .*child\.yaml names .*: got a list"):
        load_config(write(list="- 1", child="defaults: list.yaml"))
    with pytest.raises(ValueError, match=r"broken\.yaml: cannot be read as YAML: (.|\n)*line 1"):
        load_config(write(broken="a: {b: 1"))
    with pytest.raises(ValueError, match="duplicate key b"):
        load_config(write(twice="a: {b: 1, b: 2}"))
    with pytest.raises(ValueError, match=r"odd\.yaml: defaults has 3, expected paths"):
        load_config(write(odd="defaults: [3]"))
    with pytest.raises(
        ValueError, match=r"a\.yaml inherits from itself: .*a\.yaml -> .*b\.yaml -> "
    ):
        load_config(write(b="defaults: a.yaml", a="defaults: b.yaml"))


def test_aliases_of_aliases_are_counted(write):
    """Nine lines stand for a billion values; a few aliases are fine, one of itself is not."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]" for n in range(9)]
    assert plain(load_config(write(few="\n".join(lines[:4]))))["a3"][9][9][9] == [1] * 10
    with pytest.raises(ValueError, match=r"many\.yaml: its aliases stand for more than 100000"):
        load_config(write(many="\n".join(lines)))
    for text in ("a: &a [*a]", "a: &a {b: *a}", "a: " + "[" * 5000 + "]" * 5000):
        with pytest.raises(ValueError, match=r"deep\.yaml: is nested too deeply, or an alias"):
            load_config(write(deep=text))


def test_a_file_that_is_not_utf_8_is_named(write):
    """Also where another file names it; a byte order mark is fine."""
    (write(parent="a: 1")).write_bytes(b"a: \xff")
    with pytest.raises(
        ValueError, match=r"parent\.yaml, which .*child\.yaml names .*: is not UTF-8"
    ):
        load_config(write(child="defaults: parent.yaml"))
    assert plain(load_config(write(marked="\ufeffa: 1"))) == {"a": 1}


def test_a_diamond_is_no_cycle(write):
    path = write(
        top="a: 1",
        left="defaults: top.yaml\nb: 1",
        right="defaults: top.yaml\nc: 1",
        child="defaults: [left.yaml, right.yaml]",
    )
    assert plain(load_config(path)) == {"a": 1, "b": 1, "c": 1}


# Overrides


@pytest.fixture
def config():
    return OmegaConf.create(
        {
            "dpo": {"seed": 42, "sft_loss_weight": 0},
            "policy": {"optimizer": {"name": "x", "kwargs": {"lr": 1.0}}, "tags": ["a"]},
        }
    )


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("dpo.seed=7", "dpo.seed", 7),
        ("dpo.sft_loss_weight=1e-1", "dpo.sft_loss_weight", 0.1),
        ("dpo.seed=null", "dpo.seed", None),
        ("policy.optimizer.name='a b=c'", "policy.optimizer.name", "a b=c"),
        ("policy.tags=[x,y]", "policy.tags", ["x", "y"]),
        ("policy.optimizer.kwargs={lr: 2}", "policy.optimizer.kwargs", {"lr": 2}),
        ("++policy.optimizer.kwargs={b: 2}", "policy.optimizer.kwargs", {"lr": 1.0, "b": 2}),
        ("++dpo.penalty=5.0", "dpo.penalty", 5.0),
        ("++dpo.seed=9", "dpo.seed", 9),
        ("+dpo.penalty=5.0", "dpo.penalty", 5.0),
        ("+new.section.key=true", "new.section.key", True),
    ],
)
def test_overrides(config, override, key, value):
    result = parse_hydra_overrides(config, [override])
    assert result is config
    assert OmegaConf.select(config, key) == value


def test_delete(config):
    parse_hydra_overrides(config, ["~policy.optimizer"])
    assert plain(config)["policy"] == {"tags": ["a"]}


def test_overrides_apply_in_order(config):
    parse_hydra_overrides(config, ["++dpo.penalty=1", "dpo.penalty=2"])
    assert config.dpo.penalty == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.sft_loss_wieght=1", "dpo.sft_loss_wieght"),
        ("+dpo.seed=3", "An item is already at 'dpo.seed'"),
        ("dpo.seed=1,2", "several values"),
        ("dpo.seed=[1", r"'dpo\.seed=\[1'"),
        ("dpo.seed", "dpo.seed"),
    ],
)
def test_bad_overrides(config, override, message):
    with pytest.raises(
        OverridesError, match=rf"^Failed to parse Hydra overrides: (.|\n)*{message}"
    ):
        parse_hydra_overrides(config, [override])


# Resolvers


def test_resolvers(monkeypatch):
    register_omegaconf_resolvers()
    register_omegaconf_resolvers()  # a second time changes nothing
    monkeypatch.setenv("NRL_K8S_USER", "A_B.c")
    config = OmegaConf.create(
        {
            "two": 2,
            "add": "${add:${two},3}",
            "mul": "${mul:${two},1.5}",
            "div": "${div:7,${two}}",
            "max": "${max:${two},-1}",
            "user": "${user:}",
        }
    )
    assert plain(config) == {"two": 2, "add": 5, "mul": 3.0, "div": 3.5, "max": 2, "user": "a-b-c"}
    monkeypatch.delenv("NRL_K8S_USER")
    monkeypatch.setattr("getpass.getuser", lambda: "Jo_Doe")
    assert config.user == "jo-doe"


def test_a_resolver_that_exists_stays():
    for name in ("add", "mul", "div", "max", "user"):
        OmegaConf.clear_resolver(name)
    OmegaConf.register_new_resolver("add", lambda a, b: "mine")
    try:
        register_omegaconf_resolvers()
        config = OmegaConf.create({"x": "${add:1,2}", "y": "${mul:2,3}"})
        assert plain(config) == {"x": "mine", "y": 6}
    finally:
        OmegaConf.clear_resolver("add")
        register_omegaconf_resolvers()


# NeMo RL's own files and loader


@pytest.fixture(scope="module")
def checkout():
    path = os.environ.get("NEMO_RL_CHECKOUT")
    if not path:
        pytest.skip("NEMO_RL_CHECKOUT does not name a checkout of NeMo RL")
    return Path(path)


def test_every_configuration_of_a_checkout_loads_as_nemo_rl_loads_it(checkout):
    spec = importlib.util.spec_from_file_location("up", checkout / "nemo_rl/utils/config.py")
    upstream = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upstream)
    folder = checkout / "examples/configs"
    paths = sorted(folder.rglob("*.yaml"))
    assert {f"{p.relative_to(folder)}" for p in paths} >= load_manifest()["configs"].keys()
    different = [
        path
        for path in paths
        if OmegaConf.to_yaml(load_config(path)) != OmegaConf.to_yaml(upstream.load_config(path))
    ]
    assert different == []
