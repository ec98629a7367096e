# SPDX-License-Identifier: Apache-2.0
"""The launcher of the Custom GRPO page, run from its first line to its last.

As in test_launcher: modules with NeMo RL's names and signatures stand in for it, and the loss
classes are the mirror's. Ray's stand-in makes actors whose methods are called at once.
"""

import contextlib
import inspect
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import cloudpickle
import pytest
import torch
from nemo_rl_recorder import Recorder, imported_from_nemo_rl

import nemo_rl_ref.algorithms.advantage_estimator
import nemo_rl_ref.algorithms.loss
import nemo_rl_ref.algorithms.utils
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.upstream import load_manifest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/advanced/algorithm-development"
LAUNCHER, ENVIRONMENT = FOLDER / "run_custom_grpo.py", FOLDER / "custom_environment.py"
NOTEBOOK = ROOT / "notebooks/custom_grpo.py"
SYMBOLS = load_manifest()["symbols"]

# Not in the manifest, which has classes and public functions: a dictionary, from actor class to
# Python, that get_actor_python_env reads. The function that makes the estimator is checked when
# the launcher runs.
DICTIONARY = "nemo_rl.distributed.ray_actor_environment_registry.ACTOR_ENVIRONMENT_REGISTRY"


def pieces():
    """The cell that the page tells the reader to copy, with NeMo RL's prefix."""
    (found,) = re.findall(
        r"# %%\n#\| label: grpo-custom\n(.*?)\n\n*(?=# %%)", NOTEBOOK.read_text(), re.DOTALL
    )
    return found.replace("nemo_rl_ref", "nemo_rl")


def remote(kind):
    """ray.remote: an actor class."""
    kind.is_actor = True
    return kind


class MasterConfig(types.SimpleNamespace):
    """With the sections that the launcher looks at."""


@pytest.fixture
def nemo_rl(monkeypatch):
    """Modules in NeMo RL's place; gives the recorders by name and what else was noted."""
    seen, registered, environments = {}, [], {}
    config = MasterConfig(
        policy={
            "tokenizer": {"name": "tiny"},
            "generation": {"backend": "vllm"},
            "draft": {"enabled": False},
        },
        data={"default": {"env_name": "partial_credit"}},
        env={"partial_credit": {"num_workers": 1}},
        grpo=types.SimpleNamespace(
            adv_estimator="estimator settings", async_grpo=types.SimpleNamespace(enabled=False)
        ),
        loss_fn=ClippedPGLossConfig(max_response_length=7.0),
        data_plane=None,
        logger={"log_dir": "logs"},
    )
    from_setup = (
        "policy", "generation", None, "cluster", "train batches", "validation batches",
        ClippedPGLossFn(config.loss_fn, use_fused_linear_logprobs=True),
        "logger", contextlib.nullcontext(), "save state", config, "teachers", "aliases",
    )  # fmt: skip
    shut_down = []
    generation = types.SimpleNamespace(shutdown=lambda: shut_down.append("generation"))
    from_setup = (from_setup[0], generation, *from_setup[2:])
    recorders = {
        name: Recorder(name, returns)
        for name, returns in {
            "nemo_rl.algorithms.grpo.setup": from_setup,
            "nemo_rl.algorithms.grpo.grpo_train": lambda *_: seen.update(
                estimator=made["nemo_rl.algorithms.grpo"]._create_advantage_estimator(config)
            ),
            "nemo_rl.algorithms.grpo.shutdown_environments": lambda *_: shut_down.append("envs"),
            "nemo_rl.algorithms.utils.get_tokenizer": "tokenizer",
            "nemo_rl.data.utils.setup_response_data": ("train", "val", {"t": "env"}, {"v": "env"}),
            "nemo_rl.distributed.virtual_cluster.init_ray": None,
            "nemo_rl.environments.utils.register_env": environments.__setitem__,
            "nemo_rl.models.generation.configure_generation_config": lambda c, *_, **__: {
                **c, "configured": True
            },
            "nemo_rl.utils.config.load_config": lambda path: {"path": path},
            "nemo_rl.utils.config.parse_hydra_overrides": lambda cfg, o: {**cfg, "overrides": o},
            "nemo_rl.utils.config.register_omegaconf_resolvers": None,
            "nemo_rl.utils.logger.get_next_experiment_dir": lambda base: f"{base}/exp_001",
        }.items()
    }  # fmt: skip
    utils = types.ModuleType("nemo_rl.algorithms.utils")
    utils.__dict__.update(vars(nemo_rl_ref.algorithms.utils))
    made = {
        "nemo_rl.algorithms.loss": nemo_rl_ref.algorithms.loss,
        "nemo_rl.algorithms.advantage_estimator": nemo_rl_ref.algorithms.advantage_estimator,
        "nemo_rl.algorithms.utils": utils,
    }

    def module(name):
        return made.setdefault(name, types.ModuleType(name))

    for name, recorder in recorders.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module(owner), attribute, recorder)
    module("nemo_rl.algorithms.grpo").MasterConfig = lambda **settings: (
        seen.update(settings=settings) or config
    )
    made["nemo_rl.algorithms.grpo"]._create_advantage_estimator = None
    registry = module("nemo_rl.distributed.ray_actor_environment_registry")
    registry.ACTOR_ENVIRONMENT_REGISTRY = {}
    made["nemo_rl.distributed.virtual_cluster"].PY_EXECUTABLES = types.SimpleNamespace(
        SYSTEM="this python"
    )
    interfaces = module("nemo_rl.environments.interfaces")
    interfaces.EnvironmentInterface = type("EnvironmentInterface", (), {})
    interfaces.EnvironmentReturn = lambda **given: types.SimpleNamespace(**given)
    module("ray").remote = remote
    module("ray.cloudpickle").register_pickle_by_value = registered.append
    module("omegaconf").OmegaConf = types.SimpleNamespace(
        to_container=lambda config, *, resolve: dict(config) if resolve else None
    )
    for name in list(made):
        parts = name.split(".")
        for end in range(1, len(parts)):
            module(".".join(parts[:end]))
    for name, found in made.items():
        monkeypatch.setitem(sys.modules, name, found)
        parent, _, attribute = name.rpartition(".")
        if parent:
            setattr(made[parent], attribute, found)
    return types.SimpleNamespace(
        recorders=recorders, seen=seen, registered=registered, environments=environments,
        registry=registry.ACTOR_ENVIRONMENT_REGISTRY, config=config, shut_down=shut_down,
        made=made,
    )  # fmt: skip


@pytest.fixture
def folder(nemo_rl, monkeypatch, tmp_path):
    """What the page tells the reader to put together."""
    (tmp_path / "custom_grpo.py").write_text(pieces())
    for file in (LAUNCHER, ENVIRONMENT):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("custom_grpo", "custom_environment"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("custom_grpo", "custom_environment"):
        sys.modules.pop(name, None)


def launch(folder, monkeypatch):
    script = folder / LAUNCHER.name
    monkeypatch.setattr(sys, "argv", [str(script), "--config", "grpo.yaml", "++a.b=1"])
    runpy.run_path(str(script), run_name="__main__")


def test_every_name_exists_in_nemo_rl():
    names = [
        f"{module}.{name}"
        for source in (LAUNCHER.read_text(), ENVIRONMENT.read_text(), pieces())
        for module, name in imported_from_nemo_rl(source)
    ]
    known = set(SYMBOLS) | {name.replace(".loss.loss_functions.", ".loss.") for name in SYMBOLS}
    modules = {name.rpartition(".")[0] for name in SYMBOLS}
    assert len(names) >= 20
    assert [n for n in names if n not in known and n not in modules] == [DICTIONARY]
    fields = SYMBOLS["nemo_rl.environments.interfaces.EnvironmentReturn"]["fields"]
    returned = re.search(
        r"EnvironmentReturn\((.*?)\n        \)", ENVIRONMENT.read_text(), re.DOTALL
    )
    assert set(re.findall(r"^            (\w+)=", returned[1], re.MULTILINE)) == set(fields)
    assert "SYSTEM" in SYMBOLS["nemo_rl.distributed.virtual_cluster.PY_EXECUTABLES"]["fields"]


def test_the_launcher_runs_and_trains_with_all_three_pieces(nemo_rl, folder, monkeypatch):
    launch(folder, monkeypatch)
    assert nemo_rl.seen["settings"] == {"path": "grpo.yaml", "overrides": ["++a.b=1"]}
    assert [m.__name__ for m in nemo_rl.registered] == ["custom_grpo", "custom_environment"]
    (trained,) = nemo_rl.recorders["nemo_rl.algorithms.grpo.grpo_train"].calls
    loss_fn = trained.pop("loss_fn")
    assert type(loss_fn).__name__ == "ConstantLengthLossFn"
    assert type(loss_fn).__module__ == "custom_grpo"
    assert loss_fn.length == 7.0 and loss_fn.use_fused_linear_logprobs
    assert type(nemo_rl.seen["estimator"]).__name__ == "BatchStdEstimator"
    assert trained.pop("master_config").logger["log_dir"] == "logs/exp_001"
    assert trained.pop("checkpointer") is not None
    assert trained.pop("policy_generation") is not None
    assert trained == {
        "policy": "policy",
        "wrapped_dataloader": "train batches",
        "val_dataloader": "validation batches",
        "tokenizer": "tokenizer",
        "task_to_env": {"t": "env"},
        "val_task_to_env": {"v": "env"},
        "logger": "logger",
        "grpo_save_state": "save state",
    }
    assert nemo_rl.config.policy["generation"]["configured"]
    assert nemo_rl.shut_down == ["envs", "generation"]


def test_the_environment_is_registered_under_a_name_that_can_be_imported(
    nemo_rl, folder, monkeypatch
):
    launch(folder, monkeypatch)
    ((name, path),) = nemo_rl.environments.items()
    assert name == nemo_rl.config.data["default"]["env_name"] and name in nemo_rl.config.env
    assert nemo_rl.registry == {path: "this python"}
    module, _, attribute = path.rpartition(".")
    kind = getattr(sys.modules[module], attribute)
    assert kind.is_actor
    wanted = SYMBOLS["nemo_rl.environments.interfaces.EnvironmentInterface"]["methods"]
    for method in wanted:
        assert list(inspect.signature(getattr(kind, method)).parameters) == [
            part.strip() for part in wanted[method]["signature"].strip("()").split(",")
        ]


def test_the_environment_scores_what_nemo_rl_sends(folder):
    import custom_environment

    environment = custom_environment.CustomEnvironment({"num_workers": 1})
    conversation = [
        [{"role": "user", "content": "<s>58+65="}, {"role": "assistant", "content": answer}]
        for answer in ("123", "124", r"It is \boxed{123}.", "1")
    ]
    found = environment.step(conversation, [{"ground_truth": "123"}] * 4)
    assert found.rewards.tolist() == pytest.approx([1.0, 1 / 3, 1.0, 0.0])
    assert found.terminateds.tolist() == [1.0] * 4
    assert len(found.observations) == len(found.metadata) == len(found.next_stop_strings) == 4
    _, metrics = environment.global_post_process_and_metrics({"rewards": found.rewards})
    assert metrics["mean_reward"] == pytest.approx(7 / 12)
    environment.shutdown()


def test_a_nemo_rl_that_makes_its_estimator_elsewhere_is_noticed(nemo_rl, folder, monkeypatch):
    del nemo_rl.made["nemo_rl.algorithms.grpo"]._create_advantage_estimator
    with pytest.raises(RuntimeError, match="makes its estimator elsewhere"):
        launch(folder, monkeypatch)


def test_trainers_that_the_launcher_does_not_start_are_refused(nemo_rl, folder, monkeypatch):
    nemo_rl.config.grpo.async_grpo.enabled = True
    with pytest.raises(ValueError, match="have trainers of their own"):
        launch(folder, monkeypatch)


def test_pieces_travel_by_value_to_a_process_without_the_folder(tmp_path):
    """With the real cloudpickle: reward, estimator and loss, where custom_grpo cannot be found."""
    (tmp_path / "custom_grpo.py").write_text(pieces().replace("nemo_rl", "nemo_rl_ref"))
    sender = (
        "import sys, cloudpickle, custom_grpo as c\n"
        "from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig as Config\n"
        "if sys.argv[1] == 'value': cloudpickle.register_pickle_by_value(c)\n"
        "loss = c.ConstantLengthLossFn(Config(max_response_length=5))\n"
        "sys.stdout.buffer.write(cloudpickle.dumps((c.partial_credit, loss)))\n"
    )
    receiver = (
        "import pickle, sys; reward, loss = pickle.load(sys.stdin.buffer); "
        "print(reward('', '124', '123'), loss.length)"
    )

    def send(how):
        sent = subprocess.run(
            [sys.executable, "-c", sender, how],
            capture_output=True, check=True, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        )  # fmt: skip
        return subprocess.run(
            [sys.executable, "-c", receiver],
            input=sent.stdout, capture_output=True, check=False, env={"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    assert send("value").stdout.decode().split() == [str(1 / 3), "5"]
    assert b"No module named 'custom_grpo'" in send("reference").stderr
    assert cloudpickle.__name__ == "cloudpickle"  # the real one, not a stand-in


def test_the_loss_refuses_what_it_cannot_do():
    namespace = {}
    exec(pieces().replace("nemo_rl", "nemo_rl_ref"), namespace)  # the listing of our own page
    for settings in ({}, {"max_response_length": 5, "token_level_loss": False}):
        with pytest.raises(ValueError, match="expected a positive number and true"):
            namespace["ConstantLengthLossFn"](ClippedPGLossConfig(**settings))
    assert torch.is_tensor(
        namespace["BatchStdEstimator"](None, None).compute_advantage(
            torch.zeros(2, 1), torch.tensor([0.0, 1.0]), torch.ones(2, 3)
        )
    )
