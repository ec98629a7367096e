# SPDX-License-Identifier: Apache-2.0
"""What is exported computes what it did, starts with NeMo RL's scripts, or is refused."""

import importlib
import inspect
import os
import pkgutil
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from nemo_rl_recorder import Recorder, imported_from_nemo_rl
from omegaconf import OmegaConf

import nemo_rl_ref.custom
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, DPOLossConfig
from nemo_rl_ref.export import STAND_IN
from nemo_rl_ref.export.__main__ import main
from nemo_rl_ref.export.carry import PRIVATE_METHODS
from nemo_rl_ref.export.project import SCRIPTS, make_files
from nemo_rl_ref.upstream import load_manifest
from nemo_rl_ref.utils import config as our_config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "notebooks/get_started"
CHECKOUT = os.environ.get("NEMO_RL_CHECKOUT")
MANIFEST = load_manifest()


@pytest.fixture
def clean(monkeypatch):
    """Imports of a test are gone after it."""
    before, path = set(sys.modules), list(sys.path)
    yield monkeypatch
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.split(".")[0] not in ("torch", "ray", "nemo_rl_ref"):
            del sys.modules[name]


@pytest.fixture
def as_nemo_rl(clean):
    """The package under NeMo RL's name."""
    finders = list(sys.meta_path)
    sys.path.append(STAND_IN)
    yield
    sys.meta_path[:] = finders


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(inspect.cleandoc(text) + "\n")
    return folder


# It computes the same


def classes_of_custom():
    for found in pkgutil.iter_modules(nemo_rl_ref.custom.__path__):
        module = importlib.import_module(f"nemo_rl_ref.custom.{found.name}")
        for name, kind in vars(module).items():
            if getattr(kind, "__module__", "") == module.__name__ and name.endswith("LossFn"):
                if name not in ("PairLossFn", "TokenPGLossFn") and takes_this_batch(kind):
                    yield pytest.param(found.name, name, id=name)


def takes_this_batch(kind):
    return not getattr(kind, "needs_data", ()) and kind.input_type.name == "LOGPROB"


NEEDED = {
    "DrGRPOLossFn": {"max_response_length": 6},
    "ORPOLossFn": {"sft_loss_weight": 1, "preference_loss_weight": 0.1},
}


def batch():
    draw = torch.Generator().manual_seed(0)

    def logprobs():
        return -torch.rand(4, 6, generator=draw)

    mask = torch.ones(4, 6)
    mask[1, 4:], mask[:, :2] = 0, 0
    names = ("reference_policy_logprobs", "prev_logprobs", "generation_logprobs")
    return {
        **{name: logprobs() for name in names},
        "advantages": torch.randn(4, 6, generator=draw),
        "rewards": torch.rand(4, generator=draw),
        "token_mask": mask,
        "sample_mask": torch.ones(4),
        "input_ids": torch.ones(4, 6, dtype=torch.long),
    }, logprobs()[:, 1:].requires_grad_()


def value_and_gradient(kind, settings, policy_gradient):
    config = ClippedPGLossConfig if policy_gradient else DPOLossConfig
    loss_fn = kind(config(**settings))
    data, logprobs = batch()
    name = "next_token_logprobs"
    loss, metrics = loss_fn(
        data=data, global_valid_seqs=torch.tensor(4.0), global_valid_toks=torch.tensor(14.0),
        **{name: logprobs},
    )  # fmt: skip
    return loss.item(), torch.autograd.grad(loss, logprobs)[0], metrics


@pytest.mark.parametrize(("stem", "name"), classes_of_custom())
def test_an_exported_loss_returns_the_same_numbers(stem, name, as_nemo_rl, tmp_path, clean):
    policy_gradient = stem.startswith("policy_gradient")
    kind = getattr(importlib.import_module(f"nemo_rl_ref.custom.{stem}"), name)
    settings = NEEDED.get(name, {})
    pairs = [f"{key}={value}" for key, value in settings.items()]
    algorithm = "grpo" if policy_gradient else "dpo"
    files = make_files(algorithm, f"nemo_rl_ref.custom.{stem}:{name}", None, pairs, "x")
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    sys.path.insert(0, str(tmp_path))
    exported = getattr(importlib.import_module(f"custom_{stem}"), name)
    assert exported is not kind
    assert "nemo_rl_ref" not in "".join(files[f"custom_{stem}.py"])
    mine = value_and_gradient(exported, settings, policy_gradient)
    ours = value_and_gradient(kind, settings, policy_gradient)
    assert mine[0] == ours[0] and torch.equal(mine[1], ours[1]) and mine[2] == ours[2]


def test_the_exported_loss_of_get_started_keeps_its_promises(tmp_path, clean):
    """The folder's own test, in a process of its own, as a user runs it."""
    clean.chdir(EXAMPLE)
    assert main(["my_loss.py:MyLoss", "--algorithm=dpo", f"--to={tmp_path / 'mine'}"]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_loss.py"],
        cwd=tmp_path / "mine", env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


# It starts with NeMo RL's scripts


class Section(DPOLossConfig):
    """A section of NeMo RL's configuration: any key."""


def master_config(**sections):
    """As NeMo RL's: settings of an algorithm by attribute, other sections by key."""
    made = dict(sections)
    for name in ("dpo", "sft", "rm"):
        made |= {name: Section(**sections[name])} if name in sections else {}
    if "grpo" in sections:
        off = types.SimpleNamespace(enabled=False)
        made["grpo"] = types.SimpleNamespace(async_grpo=off)
        made["loss_fn"] = ClippedPGLossConfig(**sections["loss_fn"])
    return types.SimpleNamespace(**{"data_plane": None, "env": {}, **made})


def unflat(flat):
    tree = {}
    for key, value in flat.items():
        *parts, last = key.split(".")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


SCRIPT = """
import argparse
from nemo_rl.algorithms.{0} import MasterConfig, {0}_train, setup
from nemo_rl.utils.config import load_config, parse_hydra_overrides, register_omegaconf_resolvers
from omegaconf import OmegaConf

def main():
    register_omegaconf_resolvers()
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=None)
    args, overrides = parser.parse_known_args()
    config = parse_hydra_overrides(load_config(args.config), overrides)
    config = MasterConfig(**OmegaConf.to_container(config, resolve=True))
    ({1}) = setup(config, "tokenizer", "train", "validation")
    {0}_train(*[{2}])
"""
TRAIN = {
    "grpo": "policy, generation, dataloader, val_dataloader, 'tokenizer', loss_fn, {}, {}, "
    "logger, checkpointer, state, config",
}
USUAL = (
    "policy, dataloader, val_dataloader, 'tokenizer', loss_fn, config, logger, checkpointer, state"
)


@pytest.fixture
def examples(clean, tmp_path, request):
    """``examples/`` of a checkout; gives the folder and what its training was called with."""
    algorithm = request.param
    script = SCRIPTS[algorithm]
    folder = tmp_path / "examples"
    (folder / "configs").mkdir(parents=True)
    if CHECKOUT:
        source = Path(CHECKOUT, f"examples/run_{algorithm}.py").read_text()
        shutil.copytree(Path(CHECKOUT, "examples/configs"), folder / "configs", dirs_exist_ok=True)
    else:
        train = TRAIN.get(algorithm, USUAL)
        source = SCRIPT.format(algorithm, ", ".join(script.outputs), train)
        config = unflat(MANIFEST["configs"][script.base])
        (folder / "configs" / script.base).write_text(yaml.safe_dump(config))
    (folder / f"run_{algorithm}.py").write_text(source)

    def their_setup(config, *_, **__):
        made = {name: MagicMock(name=name) for name in script.outputs} | {"config": config}
        made["loss_fn"].use_fused_linear_logprobs = bool(config.policy.get("fused"))
        return tuple(made[name] for name in script.outputs)

    names = {pair: MagicMock(name=pair[1]) for pair in imported_from_nemo_rl(source)}
    environment = "nemo_rl.distributed.ray_actor_environment_registry"
    names[environment, "ACTOR_ENVIRONMENT_REGISTRY"] = registry = {}
    names["nemo_rl.distributed.virtual_cluster", "PY_EXECUTABLES"] = types.SimpleNamespace(
        SYSTEM="this python"
    )
    names["nemo_rl.environments.utils", "register_env"] = registry.__setitem__
    names["nemo_rl.environments.interfaces", "EnvironmentInterface"] = type("Interface", (), {})
    names["nemo_rl.environments.interfaces", "EnvironmentReturn"] = types.SimpleNamespace
    names["nemo_rl.data.utils", "setup_response_data"] = lambda *_: ("d", "v", {}, {})
    names["nemo_rl.data.utils", "setup_preference_data"] = lambda *_: ("d", "v")
    names["nemo_rl.data.datasets", "merge_datasets"] = list
    module = f"nemo_rl.algorithms.{algorithm}"
    train = Recorder(f"{module}.{algorithm}_train", None)
    names[module, f"{algorithm}_train"] = train
    names[module, "setup"] = Recorder(f"{module}.setup", their_setup)
    names[module, "MasterConfig"] = master_config
    for name in ("load_config", "parse_hydra_overrides", "register_omegaconf_resolvers"):
        names["nemo_rl.utils.config", name] = getattr(our_config, name)
    made = {"nemo_rl.algorithms.loss": importlib.import_module("nemo_rl_ref.algorithms.loss")}
    made["nemo_rl.algorithms.utils"] = utils = types.ModuleType("nemo_rl.algorithms.utils")
    utils.__dict__.update(vars(importlib.import_module("nemo_rl_ref.algorithms.utils")))
    for (owner, name), value in names.items():
        for end in range(1, owner.count(".") + 2):
            part = ".".join(owner.split(".")[:end])
            made.setdefault(part, types.ModuleType(part))
        setattr(made[owner], name, value)
    for name, value in made.items():
        clean.setitem(sys.modules, name, value)
    return types.SimpleNamespace(folder=folder, trained=train.calls, registry=registry)


def launch(folder, monkeypatch, *words):
    (script,) = folder.glob("run_*.py")
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    sys.path.insert(0, str(folder))
    from ray.cloudpickle import list_registry_pickle_by_value, unregister_pickle_by_value

    before = set(list_registry_pickle_by_value())
    runpy.run_path(str(script), run_name="__main__")
    registered = set(list_registry_pickle_by_value()) - before
    for name in registered:
        unregister_pickle_by_value(sys.modules[name])
    return registered


LOSSES = {
    "dpo": "DPOLossFn",
    "sft": "NLLLossFn",
    "rm": "PreferenceLossFn",
    "grpo": "ClippedPGLossFn",
}


@pytest.mark.parametrize(
    ("examples", "algorithm"), [(name, name) for name in SCRIPTS], indirect=["examples"]
)
def test_the_launcher_trains_with_the_loss(examples, algorithm, tmp_path, clean):
    base = LOSSES[algorithm]
    has_config = algorithm in ("dpo", "grpo")
    arguments, begin = "scale: float = 0.5", "super().__init__()"
    if has_config:
        arguments, begin = "cfg", "super().__init__(cfg); scale = scale_of(cfg)"
    own = write(
        tmp_path / "own",
        scale_of="""
        def scale_of(cfg):
            return getattr(cfg, "scale", 0.5)
        """,
        scaled=f"""
        from nemo_rl_ref.algorithms.loss import {base}
        from scale_of import scale_of

        class Scaled({base}):
            def __init__(self, {arguments}, power: int = 2):
                {begin}
                self.scale, self.power = scale, power
        """,
    )
    to = examples.folder / "mine"
    assert (
        main([f"{own}/scaled.py:Scaled", "power=3", f"--algorithm={algorithm}", f"--to={to}"]) == 0
    )
    for name in ("scaled", "scale_of"):
        sys.modules.pop(name, None)
    key = SCRIPTS[algorithm].section
    registered = launch(to, clean, f"++{key}.scale=2.5")
    assert registered == {"scaled", "scale_of"}
    (call,) = examples.trained
    loss_fn = call["loss_fn"]
    assert (type(loss_fn).__module__, type(loss_fn).__name__) == ("scaled", "Scaled")
    assert Path(sys.modules["scaled"].__file__).parent == to
    assert (loss_fn.scale, loss_fn.power) == (2.5, 3)
    assert call["master_config"].checkpointing["checkpoint_dir"] == "results/scaled"


@pytest.mark.parametrize("examples", ["dpo"], indirect=True)
def test_a_fused_model_with_a_loss_that_does_not_know_it_is_refused(examples, clean):
    clean.chdir(EXAMPLE)
    to = examples.folder / "mine"
    assert main(["my_loss.py:MyLoss", "--algorithm=dpo", f"--to={to}"]) == 0
    sys.modules.pop("my_loss", None)
    with pytest.raises(ValueError, match="use_fused_linear_logprobs: got true, expected false"):
        launch(to, clean, "++policy.fused=true")


@pytest.mark.parametrize("examples", ["grpo"], indirect=True)
def test_the_launcher_gives_grpo_the_reward(examples, clean):
    clean.chdir(EXAMPLE)
    to = examples.folder / "mine"
    assert main(["--env=my_reward.py:reward", "--algorithm=grpo", f"--to={to}"]) == 0
    sys.modules.pop("my_reward", None)
    assert launch(to, clean) == {"my_reward", "my_reward_environment"}
    actor = "my_reward_environment.RewardEnvironment"
    assert examples.registry == {"my_reward": actor, actor: "this python"}
    (call,) = examples.trained
    config = call["master_config"]
    assert config.data["train"]["env_name"] == "my_reward" and "my_reward" in config.env
    assert config.data["default"]["env_name"] == "math"  # that of validation
    kind = sys.modules["my_reward_environment"].RewardEnvironment.__ray_metadata__.modified_class
    talk = [
        [{"role": "user", "content": "58+65="}, {"role": "assistant", "content": answer}]
        for answer in ("123", "124", "")
    ]
    found = kind({}).step(talk, [{"ground_truth": "123"}] * 3)
    assert found.rewards.tolist() == pytest.approx([1.0, 0.2 / 3, 0.0])
    fields = MANIFEST["symbols"]["nemo_rl.environments.interfaces.EnvironmentReturn"]["fields"]
    assert vars(found).keys() == fields.keys()


def test_what_the_launchers_import_is_in_nemo_rl(clean):
    clean.chdir(EXAMPLE)
    both = make_files("grpo", None, "my_reward.py:reward", [], "x")
    known = {
        *MANIFEST["symbols"],
        # a dictionary, which the manifest does not list
        "nemo_rl.distributed.ray_actor_environment_registry.ACTOR_ENVIRONMENT_REGISTRY",
    }
    names = [
        f"{module}.{name}"
        for file in ("run_my_reward.py", "my_reward_environment.py")
        for module, name in imported_from_nemo_rl(both[file])
    ]
    assert len(names) == 5 and not set(names) - known
    scripts = {f"examples/run_{name}.py" for name in SCRIPTS}
    assert scripts <= set(MANIFEST["scripts"])
    assert all(script.base in MANIFEST["configs"] for script in SCRIPTS.values())


def test_a_launcher_outside_examples_says_where_it_belongs(tmp_path, clean):
    clean.chdir(EXAMPLE)
    assert main(["my_loss.py:MyLoss", "--algorithm=dpo", f"--to={tmp_path / 'mine'}"]) == 0
    with pytest.raises(SystemExit, match="expected in the folder examples/ of NeMo RL"):
        launch(tmp_path / "mine", clean)


# What a loss brings with it


def test_its_own_config_and_its_defaults_become_keys(tmp_path, clean):
    own = write(
        tmp_path / "own",
        graded="""
        from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn

        class GradedConfig(DPOLossConfig):
            grade: float = 0.25

        class Graded(DPOLossFn):
            def __init__(self, cfg: GradedConfig, use_fused_linear_logprobs: bool = False):
                super().__init__(cfg, use_fused_linear_logprobs)
                self.grade = cfg.grade
        """,
    )
    files = make_files("dpo", f"{own}/graded.py:Graded", None, ["sft_loss_weight=1e-2"], "x")
    overlay = OmegaConf.create(files["graded.yaml"])
    assert overlay.dpo == {"grade": 0.25, "sft_loss_weight": 0.01}
    assert "graded.Graded(cfg=graded.GradedConfig(**section.model_dump())" in files["run_graded.py"]
    assert "use_fused_linear_logprobs=fused" in files["run_graded.py"]


def test_packages_and_couplings_are_named_in_the_readme(tmp_path, clean):
    own = write(
        tmp_path / "own",
        needy="""
        import numpy as np
        from nemo_rl_ref.custom.batch import AOTLossFn

        class Needy(AOTLossFn):
            pass
        """,
    )
    files = make_files("dpo", f"{own}/needy.py:Needy", None, [], "x")
    assert "custom_batch.py" in files and "from custom_batch import AOTLossFn" in files["needy.py"]
    assert "`numpy` must be in the" in files["README.md"]
    assert "couples the rows of a micro-batch" in files["README.md"]


def test_the_private_methods_that_are_carried_are_nemo_rls():
    if CHECKOUT:
        source = Path(CHECKOUT, "nemo_rl/algorithms/loss/loss_functions.py").read_text()
        assert all(f"    def {name}(" in source for name in PRIVATE_METHODS)
    from nemo_rl_ref.algorithms.loss import DPOLossFn

    assert all(hasattr(DPOLossFn, name) for name in PRIVATE_METHODS)


# What is refused

BASE = "from nemo_rl_ref.algorithms.loss import ClippedPGLossFn, DPOLossFn\n"
REFUSED = {
    "a name that NeMo RL does not have": (
        "from nemo_rl_ref.logprobs import token_logprobs\n",
        "mine.py:1: NeMo RL has no nemo_rl.logprobs.token_logprobs",
    ),
    "a private module of the mirror": (
        "from nemo_rl_ref.algorithms.loss._preference import DPOLossFn as D\n",
        "mine.py:1: NeMo RL has no nemo_rl.algorithms.loss._preference.DPOLossFn",
    ),
    "a trainer of this package": (
        "import nemo_rl_ref.training.loop as loop\n",
        "mine.py:1: NeMo RL has no nemo_rl.training.loop",
    ),
    "a folder of custom": (
        "from nemo_rl_ref.custom import pairwise\n",
        "mine.py:1: got nemo_rl_ref.custom, expected nemo_rl_ref.custom.pairwise",
    ),
    "a folder beside the file": (
        "from folder.helpers import x\n",
        "mine.py:1: folder.helpers is a folder beside this file",
    ),
    "data beside the file": (
        "HERE = __file__\n",
        "mine.py:1: it looks for files beside itself",
    ),
    "a text that names the package": (
        "WHERE = 'nemo_rl_ref/tiny'\n",
        "mine.py:1: a text names nemo_rl_ref",
    ),
}


@pytest.mark.parametrize(("first", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_carried_is_refused_with_its_line(first, message, tmp_path, clean, capsys):
    write(tmp_path / "folder", helpers="x = 1")
    (tmp_path / "mine.py").write_text(f"{first}{BASE}class Mine(DPOLossFn):\n    pass\n")
    to = tmp_path / "to"
    assert main([f"{tmp_path}/mine.py:Mine", "--algorithm=dpo", f"--to={to}"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err and not captured.out and not to.exists()


@pytest.mark.parametrize("body", ["def _terms(self, *t): return {}", "x = lambda s: s._terms()"])
def test_a_method_that_only_the_mirror_has_is_refused(body, tmp_path, clean, capsys):
    (tmp_path / "mine.py").write_text(f"{BASE}class Mine(ClippedPGLossFn):\n    {body}\n")
    assert main([f"{tmp_path}/mine.py:Mine", "--algorithm=grpo", f"--to={tmp_path}/to"]) == 1
    assert "mine.py:3: NeMo RL's class has no _terms" in capsys.readouterr().err


ASKED_WRONGLY = {
    "nothing": ([], "nothing to export"),
    "a reward for DPO": (["--env=my_reward.py:reward"], "got it with --algorithm dpo"),
    "a misspelt class": (["my_loss.py:MyLos"], "did you mean 'MyLoss'?"),
    "no class": (["my_reward.py:reward"], "is no class"),
    "a bad value": (["my_loss.py:MyLoss", "reference_policy_kl_penalty=high"], "expected float"),
    "an unknown setting": (["my_loss.py:MyLoss", "magrin=1"], "did you mean 'margin'?"),
}


@pytest.mark.parametrize(("words", "message"), ASKED_WRONGLY.values(), ids=ASKED_WRONGLY)
def test_a_wrong_command_is_one_line(words, message, tmp_path, clean, capsys):
    clean.chdir(EXAMPLE)
    assert main([*words, "--algorithm=dpo", f"--to={tmp_path}/to"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


# How it is written


def test_a_folder_is_not_overwritten_without_force(tmp_path, clean, capsys):
    clean.chdir(EXAMPLE)
    words = ["my_loss.py:MyLoss", "--algorithm=dpo", f"--to={tmp_path}/to"]
    assert main(words) == 0
    (tmp_path / "to/my_loss.yaml").write_text("mine")
    assert main(words) == 1 and "--force replaces it" in capsys.readouterr().err
    assert (tmp_path / "to/my_loss.yaml").read_text() == "mine"
    assert main([*words, "--force"]) == 0
    assert "margin: 0.5" in (tmp_path / "to/my_loss.yaml").read_text()
    (tmp_path / "to/notes.txt").write_text("mine")
    assert main([*words, "--force"]) == 1 and "holds notes.txt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, clean, capsys):
    clean.chdir(EXAMPLE)
    words = ["my_loss.py:MyLoss", "--algorithm=dpo", "--force", f"--to={tmp_path}/to"]
    assert main(words) == 0
    (tmp_path / "to/my_loss.yaml").write_text("mine")
    write_text = Path.write_text

    def full(self, text, **options):
        if self.name == "README.md":
            raise OSError(28, "No space left on device")
        return write_text(self, text, **options)

    clean.setattr(Path, "write_text", full)
    assert main(words) == 1 and "No space left" in capsys.readouterr().err
    assert (tmp_path / "to/my_loss.yaml").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
