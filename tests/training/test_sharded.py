# SPDX-License-Identifier: Apache-2.0
"""Models that processes share: FSDP with two processes on the CPU, and what DeepSpeed is told.

`accelerate` switches FSDP on for accelerators only. The script that these tests start says that its
two CPU processes have some; the sharding, the collectives and the state dictionaries are PyTorch's.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType
from safetensors.torch import load_file
from trainer_runs import curve, make_config

from nemo_rl_ref import tiny
from nemo_rl_ref.algorithms.loss import NLLLossFn
from nemo_rl_ref.algorithms.utils import get_tokenizer
from nemo_rl_ref.config.sections import SFTSettings
from nemo_rl_ref.config.settings import read_settings
from nemo_rl_ref.files.metrics import read_metrics
from nemo_rl_ref.training.checkpoints import Trained
from nemo_rl_ref.training.processes import make_accelerator, prepare_deepspeed
from nemo_rl_ref.training.samples import supervised_samples
from nemo_rl_ref.training.step import NotFinite, update

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "help")!r}]
from pathlib import Path
from accelerate import DistributedType, PartialState
from rl_runs import settings
from trainer_runs import run
from nemo_rl_ref import run_grpo
from nemo_rl_ref.training.processes import make_accelerator, process_state

sharded = sys.argv[2] == "fsdp"
made = PartialState.__init__

def with_accelerators(self, *args, **kwargs):
    made(self, *args, **kwargs)
    if sharded and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = with_accelerators
folder, name = Path(sys.argv[1]), sys.argv[2]
process_state()
assert (make_accelerator("float32").distributed_type == DistributedType.FSDP) == sharded
for section in ("sft", "dpo", "rm"):
    changes = {{"policy__train_micro_batch_size": 2, f"{{section}}__max_num_steps": 8}}
    run(section, folder, name=f"{{section}}-{{name}}", **changes)
if sharded:  # stopped and started again
    for steps in (4, 8):
        changes = {{"policy__train_micro_batch_size": 2, "sft__max_num_steps": steps}}
        run("sft", folder, name="sft-resumed", **changes)
for ppo in (False, True):
    place = folder / f"{{ppo}}-{{name}}"
    place.mkdir(exist_ok=True)
    section = "ppo" if ppo else "grpo"
    changes = {{
        f"{{section}}.max_num_steps": 2, "policy.train_global_batch_size": 8,
        "policy.train_micro_batch_size": 2, "loss_fn.reference_policy_kl_penalty": 0.05,
        f"{{section}}.skip_reference_policy_logprobs_calculation": False,
        f"{{section}}.val_period": 2, "policy.optimizer.kwargs.lr": 1e-4,
    }}
    run_grpo.train(settings(place, changes, ppo=ppo))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All trainers, once in one process and once with FSDP in two."""
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    for name in ("False-one", "False-fsdp", "True-one", "True-fsdp"):
        (folder / name).mkdir()
    config = ["--config_file", str(CONFIGS / "fsdp.yaml"), "--num_processes", "2"]
    launch = ["-m", "accelerate.commands.launch", *config]
    for name, launcher in (("one", []), ("fsdp", launch)):
        result = subprocess.run(
            [sys.executable, *launcher, str(script), str(folder), name],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.parametrize("section", ["sft", "dpo", "rm"])
def test_fsdp_trains_what_one_process_does(runs, section):
    one, both = (read_metrics(runs / f"{section}-{name}-logs") for name in ("one", "fsdp"))
    validation = "validation/val_loss" if section == "sft" else "validation-default/loss"
    for name in ("train/loss", validation):
        assert len(curve(one, name)) >= 3
        assert curve(both, name) == pytest.approx(curve(one, name), abs=1e-5), name
    norms = [curve(metrics, "train/grad_norm") for metrics in (one, both)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    weights = "step_8/policy/weights/model.safetensors"
    ours, theirs = (load_file(runs / f"{section}-{name}" / weights) for name in ("one", "fsdp"))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=5e-4)


@pytest.mark.parametrize("ppo", [False, True])
def test_fsdp_samples_and_trains_what_one_process_does(runs, ppo):
    one, both = (read_metrics(runs / f"{ppo}-{name}" / "logs") for name in ("one", "fsdp"))
    assert list(one) == list(both) == [1, 2]
    for step, metrics in one.items():
        assert metrics["train/reward"] == both[step]["train/reward"]
        for name in ("train/loss", "train/kl_penalty", "validation/accuracy"):
            if name in metrics:
                assert both[step][name] == pytest.approx(metrics[name], abs=1e-5), (step, name)


def test_fsdp_resumes_with_the_same_bits(runs):
    whole, resumed = (read_metrics(runs / f"sft-{name}-logs") for name in ("fsdp", "resumed"))
    for name in ("train/loss", "train/grad_norm", "train/lr"):
        assert curve(resumed, name) == curve(whole, name), name
    files = {path.suffix for path in (runs / "sft-fsdp" / "step_8").rglob("*") if path.is_file()}
    assert files <= {".json", ".yaml", ".safetensors", ".jinja", ".pt"}  # .pt without pickled code


# DeepSpeed is not installed here: what it is told, and that its way of stepping is followed.


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_accelerate_reads_the_configurations(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == name.upper()
    assert config.mixed_precision == "no" and config.num_processes == 2
    assert config.fsdp_config if name == "fsdp" else config.deepspeed_config["zero_stage"] == 2


def test_deepspeed_gets_the_runs_settings():
    config = load_config_from_file(str(CONFIGS / "deepspeed.yaml")).deepspeed_config
    plugin = SimpleNamespace(deepspeed_config=dict(config))
    stand_in = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    section = SimpleNamespace(train_micro_batch_size=4, max_grad_norm=None)
    prepare_deepspeed(stand_in, section, "policy")
    told = plugin.deepspeed_config
    assert told["train_micro_batch_size_per_gpu"] == 4 and told["gradient_clipping"] == 0.0
    assert told["gradient_accumulation_steps"] == 1
    assert DeepSpeedPlugin.__dataclass_fields__.keys() >= config.keys() - {
        "deepspeed_multinode_launcher"
    }
    with pytest.raises(ValueError, match="value: DeepSpeed trains one model here"):
        prepare_deepspeed(stand_in, section, "value")


class Engine:
    """What `accelerate` does with DeepSpeed: the last backward pass clips and takes the step."""

    distributed_type, num_processes, process_index, is_main_process = (
        DistributedType.DEEPSPEED,
        1,
        0,
        1,
    )
    device, sync_gradients = torch.device("cpu"), True

    def __init__(self, model, optimizer, limit):
        self.model, self.optimizer, self.limit, self.norm = model, optimizer, limit, None

    def backward(self, loss):
        loss.backward()
        if self.sync_gradients:
            self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def clip_grad_norm_(self, parameters, limit):
        return self.norm


def no_steps(optimizer):
    """`accelerate`'s wrapper around DeepSpeed's optimizer: it takes no step."""
    return SimpleNamespace(
        param_groups=optimizer.param_groups, step=lambda: None, zero_grad=lambda: None
    )


def test_an_update_with_deepspeed_is_one_step(tmp_path):
    config = make_config("sft", tmp_path)
    samples, _ = supervised_samples(
        read_settings(config, SFTSettings), get_tokenizer(config["policy"]["tokenizer"])
    )
    models, metrics = [], []
    for deepspeed in (False, True):
        model = tiny.load_policy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        trained = Trained(model, optimizer, None)
        accelerator = make_accelerator("float32")
        if deepspeed:
            accelerator = Engine(model, optimizer, 0.5)
            trained.optimizer = no_steps(optimizer)
        for step in range(2):
            batch = samples.batch(range(8 * step, 8 * step + 8))
            metrics.append(
                update(
                    trained.model, trained.optimizer, NLLLossFn(), batch, accelerator,
                    micro_rows=3, max_grad_norm=0.5,
                )
            )  # fmt: skip
        models.append(model.state_dict())
    assert metrics[:2] == metrics[2:]
    assert all(models[0][key].equal(models[1][key]) for key in models[0])
    accelerator.norm = None  # DeepSpeed does not always know it
    accelerator.clip_grad_norm_ = lambda *_: None
    found = update(
        trained.model, trained.optimizer, NLLLossFn(), batch, accelerator,
        micro_rows=8, max_grad_norm=0.5,
    )  # fmt: skip
    assert "grad_norm" not in found

    class Broken(NLLLossFn):
        def __call__(self, *args, **kwargs):
            loss, metrics = super().__call__(*args, **kwargs)
            return loss * float("nan"), metrics

    with pytest.raises(NotFinite, match="cannot be looked for while the weights") as error:
        update(
            trained.model, trained.optimizer, Broken(), batch, accelerator,
            micro_rows=8, max_grad_norm=0.5,
        )  # fmt: skip
    assert not error.value.model_is_whole
