# SPDX-License-Identifier: Apache-2.0
"""The launcher of the Custom DPO page, run from its first line to its last.

NeMo RL is not installed here. In its place stand modules with the names and signatures of the
manifest; the loss classes are the mirror's. What the launcher imports, calls and unpacks is
therefore checked against NeMo RL as it was at the pinned commit.
"""

import contextlib
import re
import runpy
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from nemo_rl_recorder import Recorder, imported_from_nemo_rl

import nemo_rl_ref.algorithms.loss
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.upstream import load_manifest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "docs/advanced/algorithm-development/run_custom_dpo.py"
NOTEBOOK = ROOT / "notebooks/custom_dpo.py"
SYMBOLS = load_manifest()["symbols"]


def cell(label):
    """The text of a labeled cell of the notebook."""
    (found,) = re.findall(
        rf"# %%\n#\| label: {label}\n(.*?)\n\n*(?=# %%)", NOTEBOOK.read_text(), re.S
    )
    return found


@pytest.fixture
def nemo_rl(monkeypatch):
    """Modules in NeMo RL's place; gives the recorders by name."""
    master_config = types.SimpleNamespace(
        policy={"tokenizer": {"name": "tiny"}},
        data={},
        dpo=DPOLossConfig(dpop_penalty=7.0),
        logger={"log_dir": "logs"},
    )
    checkpointer = contextlib.nullcontext()
    from_setup = (
        "policy", "cluster", "train batches", "validation batches",
        DPOLossFn(master_config.dpo, use_fused_linear_logprobs=True),
        "logger", checkpointer, "save state", master_config,
    )  # fmt: skip
    recorders = {
        name: Recorder(name, returns)
        for name, returns in {
            "nemo_rl.algorithms.dpo.setup": from_setup,
            "nemo_rl.algorithms.dpo.dpo_train": None,
            "nemo_rl.algorithms.utils.get_tokenizer": "tokenizer",
            "nemo_rl.data.utils.setup_preference_data": ("train data", "validation data"),
            "nemo_rl.distributed.virtual_cluster.init_ray": None,
            "nemo_rl.utils.config.load_config": lambda path: {"path": path},
            "nemo_rl.utils.config.parse_hydra_overrides": lambda cfg, o: {**cfg, "overrides": o},
            "nemo_rl.utils.logger.get_next_experiment_dir": lambda base: f"{base}/exp_001",
        }.items()
    }
    made = {"nemo_rl.algorithms.loss": nemo_rl_ref.algorithms.loss}
    for name, recorder in recorders.items():
        module, _, attribute = name.rpartition(".")
        made.setdefault(module, types.ModuleType(module))
        setattr(made[module], attribute, recorder)
    made["nemo_rl.algorithms.dpo"].MasterConfig = lambda **settings: (
        seen.update(settings) or master_config
    )
    seen, registered = {}, []
    made["omegaconf"] = types.ModuleType("omegaconf")
    made["omegaconf"].OmegaConf = types.SimpleNamespace(
        to_container=lambda config, *, resolve: dict(config) if resolve else None
    )
    made["ray.cloudpickle"] = types.ModuleType("ray.cloudpickle")
    made["ray.cloudpickle"].register_pickle_by_value = registered.append
    for name, module in made.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            package = ".".join(parts[:end])
            if package not in made:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(recorders=recorders, settings=seen, registered=registered)


def test_every_name_exists_in_nemo_rl():
    names = imported_from_nemo_rl(LAUNCHER.read_text())
    names += imported_from_nemo_rl(cell("dpop-loss").replace("nemo_rl_ref", "nemo_rl"))
    assert len(names) >= 11
    known = set(SYMBOLS) | {
        # algorithms.loss re-exports what loss_functions defines
        name.replace(".loss.loss_functions.", ".loss.")
        for name in SYMBOLS
    }
    assert not [f"{m}.{n}" for m, n in names if f"{m}.{n}" not in known]


def test_the_launcher_runs_and_trains_with_the_custom_loss(nemo_rl, monkeypatch, tmp_path):
    # What the page tells the reader to do: copy the cell, change the prefix, put both in a folder.
    source = cell("dpop-loss").replace("nemo_rl_ref", "nemo_rl")
    (tmp_path / "dpop_loss.py").write_text(source)
    script = tmp_path / LAUNCHER.name
    script.write_text(LAUNCHER.read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "dpop_loss", raising=False)
    monkeypatch.setattr(sys, "argv", [str(script), "--config", "dpo.yaml", "++dpo.dpop_penalty=7"])
    runpy.run_path(str(script), run_name="__main__")

    assert nemo_rl.settings == {"path": "dpo.yaml", "overrides": ["++dpo.dpop_penalty=7"]}
    assert [module.__name__ for module in nemo_rl.registered] == ["dpop_loss"]
    (trained,) = nemo_rl.recorders["nemo_rl.algorithms.dpo.dpo_train"].calls
    loss_fn = trained.pop("loss_fn")
    assert type(loss_fn).__name__ == "DPOPLossFn" and type(loss_fn).__module__ == "dpop_loss"
    assert loss_fn.penalty == 7.0 and loss_fn.use_fused_linear_logprobs
    config = trained.pop("master_config")
    assert config.logger["log_dir"] == "logs/exp_001"
    assert trained.pop("checkpointer") is not None
    assert trained == {
        "policy": "policy",
        "train_dataloader": "train batches",
        "val_dataloader": "validation batches",
        "tokenizer": "tokenizer",
        "logger": "logger",
        "dpo_save_state": "save state",
    }


def test_the_metrics_are_those_that_validation_looks_up():
    """NeMo RL's validation reads these from every micro-batch; a missing one is a KeyError."""
    wanted = set(SYMBOLS["nemo_rl.algorithms.dpo.DPOValMetrics"]["fields"])
    wanted -= {"global_valid_seqs", "global_valid_toks"}  # the trainer adds these
    namespace = {}
    exec(cell("dpop-loss"), namespace)  # the listing of our own page
    loss_fn = namespace["DPOPLossFn"](DPOLossConfig())
    _, metrics = loss_fn(
        torch.zeros(2, 3),
        {
            "reference_policy_logprobs": torch.zeros(2, 4),
            "token_mask": torch.ones(2, 4),
            "sample_mask": torch.ones(2),
        },
        torch.tensor(2.0),
        torch.tensor(6.0),
    )
    assert set(metrics) == wanted
    page = (ROOT / "docs/advanced/algorithm-development/custom-dpo.md").read_text()
    assert all(f"`{name}`" in page for name in wanted)


def test_a_negative_penalty_is_refused():
    namespace = {}
    exec(cell("dpop-loss"), namespace)  # the listing of our own page
    with pytest.raises(ValueError, match="dpop_penalty: got -1.0, expected 0 or more"):
        namespace["DPOPLossFn"](DPOLossConfig(dpop_penalty=-1.0))


# The command lines of the pages


def nemo_rl_commands():
    """(page, command line, overrides) of every NeMo RL run that a page prints."""
    found = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for listing in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for command in listing.replace("\\\n", " ").splitlines():
                if "uv run examples/" in command:
                    words = shlex.split(command.partition(";")[0].partition(" done")[0])
                    overrides = [tuple(w.split("=", 1)) for w in words if "=" in w]
                    found.append(pytest.param(command, overrides, listing, id=page.stem))
    return found


@pytest.mark.parametrize(("command", "overrides", "listing"), nemo_rl_commands())
def test_command_lines_name_real_keys_and_do_not_resume_another_run(command, overrides, listing):
    given = re.search(r"--config examples/configs/(\S+)", command)
    name = given[1] if given else "dpo.yaml"
    known = load_manifest()["configs"][name]
    assert overrides
    for key, _ in overrides:
        # A key that the configuration does not have needs Hydra's ++.
        assert key.startswith("++") or key in known, f"{key} is not in {name}"
        assert key.removeprefix("++") not in known or not key.startswith("++"), key
    folder = dict(overrides).get("checkpointing.checkpoint_dir")
    assert folder and folder != known["checkpointing.checkpoint_dir"], command
    if "for " in listing:
        assert "$" in folder, "every run of the loop needs a folder of its own"


def test_the_reference_table_names_real_keys_and_scripts():
    page = (ROOT / "docs/core-design/design-principles/loss-functions.md").read_text()
    section = page.split("### In NeMo RL, mirrored")[1].split("###")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row[2])]
    manifest = load_manifest()
    known = {key for config in manifest["configs"].values() for key in config}
    known |= set(manifest["scripts"])
    assert len(rows) == 13 and len(named) >= 12
    assert not [name for name in named if name not in known]
