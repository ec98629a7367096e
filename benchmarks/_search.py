# SPDX-License-Identifier: Apache-2.0
"""What the measurements of search (`search_*.py`) share: two small tasks, runs, and where they go.

DPO: the shipped model, 16 pairs a step, the sum against a random number with as many digits. The
objective is `val:validation-default_accuracy` on 400 pairs of held-out sums. GRPO: 128 responses a
step to the first 64 shipped problems; the objective is `val:accuracy` on these problems, 16
responses each, at temperature 1. Both are trained by this project's own trainers, one after the
other in one process, with one thread.

Compute is counted in optimizer steps (DPO) and in steps of 128 responses (GRPO), so that no result
depends on how fast a machine is. A run that is done is appended to `_build/studies/NAME.jsonl`; a
script that is started again goes on where it was.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # the paths in the configurations are relative to it
os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, not ours

import optuna  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from _record import device_name  # noqa: E402
from optuna.distributions import (  # noqa: E402
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from nemo_rl_ref import run_dpo, run_grpo, tiny  # noqa: E402
from nemo_rl_ref.config.read import read_config  # noqa: E402
from nemo_rl_ref.config.sections import DPOSettings  # noqa: E402
from nemo_rl_ref.config.settings import used_keys  # noqa: E402
from nemo_rl_ref.rl import trainer as rl_trainer  # noqa: E402
from nemo_rl_ref.rl.generate import response_kl, sample_responses  # noqa: E402
from nemo_rl_ref.rl.settings import GRPOSettings  # noqa: E402
from nemo_rl_ref.tiny.addition import answer, problems, prompt  # noqa: E402
from nemo_rl_ref.training.processes import make_accelerator  # noqa: E402
from nemo_rl_ref.training.reference import add_reference_logprobs  # noqa: E402

transformers.utils.logging.disable_progress_bar()
optuna.logging.set_verbosity(optuna.logging.WARNING)
torch.set_num_threads(1)

WORK = ROOT / "_build/studies"
RESULTS = Path(__file__).parent / "results"
PAIRS, HELD_OUT_PAIRS, SUMS = 2048, 400, 64
WARM_UP = "policy.scheduler.0.kwargs.total_iters"
RATE = "policy.optimizer.kwargs.lr"
SEEDS = range(5)  # of a search: its sampler's random numbers, and the seed of all its runs
TRIALS = 24  # of a search without pruning


def log_uniform(low, high):
    return FloatDistribution(low, high, log=True)


@dataclass(frozen=True)
class Task:
    """A small training to search in."""

    name: str
    config: str
    overrides: tuple[str, ...]
    objective: str
    steps: int
    val_period: int
    seed_key: str
    space: dict = field(default_factory=dict)
    kept: tuple[str, ...] = ()  # metrics that are kept besides the objective


DPO = Task(
    "dpo",
    "configs/dpo.yaml",
    (
        f"data.train.data_path={WORK}/pairs.train.jsonl",
        f"data.validation.data_path={WORK}/pairs.validation.jsonl",
        "policy.train_global_batch_size=16",
        "policy.train_micro_batch_size=16",
        "policy.optimizer.kwargs.fused=true",
        "dpo.val_batches=-1",
        "dpo.val_global_batch_size=400",
        "dpo.val_micro_batch_size=400",
        "dpo.val_at_start=false",
        f"{WARM_UP}=5",
    ),
    "val:validation-default_accuracy",
    steps=32,
    val_period=8,
    seed_key="dpo.seed",
    space={
        RATE: log_uniform(1e-5, 3e-3),
        "dpo.reference_policy_kl_penalty": log_uniform(0.01, 3.0),
        "dpo.sft_loss_weight": log_uniform(0.001, 3.0),
        "policy.optimizer.kwargs.weight_decay": log_uniform(0.001, 1.0),
        "policy.max_grad_norm": log_uniform(0.03, 10.0),
        WARM_UP: IntDistribution(1, 20),
    },
    kept=(
        "val:validation-default_preference_loss",
        "val:validation-default_rewards_chosen_mean",
        "val:validation-default_rewards_rejected_mean",
    ),
)

GROUPS = "grpo.num_generations_per_prompt"
PENALTY = "loss_fn.reference_policy_kl_penalty"
RESPONSES = 128
GRPO = Task(
    "grpo",
    "configs/grpo_tiny.yaml",
    (
        f"data.train.data_path={WORK}/sums.jsonl",
        f"data.validation.data_path={WORK}/sums.jsonl",
        "grpo.max_num_epochs=100000",
        f"grpo.max_val_samples={SUMS}",
        f"grpo.val_batch_size={SUMS}",
        "++grpo.val_num_generations_per_prompt=16",
        "grpo.val_at_start=false",
        f"{GROUPS}=8",
        "grpo.num_prompts_per_step=16",
        "policy.train_global_batch_size=64",
        "policy.train_micro_batch_size=64",
        "policy.generation.max_new_tokens=4",
        "policy.generation.val_temperature=1.0",
        f"{WARM_UP}=5",
    ),
    "val:accuracy",
    steps=24,
    val_period=4,
    seed_key="grpo.seed",
    space={
        RATE: log_uniform(1e-5, 3e-3),
        PENALTY: log_uniform(1e-4, 1.0),
        "loss_fn.ratio_clip_max": log_uniform(0.05, 1.0),
        GROUPS: CategoricalDistribution([4, 8, 16, 32]),
        "policy.train_global_batch_size": CategoricalDistribution([32, 64, 128]),
        "policy.generation.temperature": log_uniform(0.5, 2.0),
        "grpo.normalize_rewards": CategoricalDistribution([True, False]),
        "policy.max_grad_norm": log_uniform(0.03, 10.0),
    },
    kept=("train:kl_penalty", "train:reward"),
)
TASKS = {task.name: task for task in (DPO, GRPO)}
TRAINERS = {
    "dpo": (run_dpo.train, used_keys(DPOSettings)),
    "grpo": (run_grpo.train, used_keys(GRPOSettings)),
}


def with_ties(values):
    """The values, and those that follow from them: of other keys that must agree with them."""
    tied = dict(values)
    if WARM_UP in values:
        tied["policy.scheduler.2.milestones"] = [values[WARM_UP]]
    if GROUPS in values:
        tied["grpo.num_prompts_per_step"] = RESPONSES // values[GROUPS]
    if "loss_fn.ratio_clip_max" in values:
        tied["loss_fn.ratio_clip_min"] = min(values["loss_fn.ratio_clip_max"], 0.99)
    if "policy.train_global_batch_size" in values:
        tied["policy.train_micro_batch_size"] = values["policy.train_global_batch_size"]
    return tied


def make_data():
    """The pairs and the sums, the same each time."""
    WORK.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    trained_on, held_out = problems()

    def pair(problem):
        right = answer(problem)
        lowest = 10 ** (len(right) - 1) if len(right) > 1 else 0
        wrong = draw.choice([n for n in range(lowest, 10 ** len(right)) if str(n) != right])
        return {"prompt": prompt(problem), "chosen": right, "rejected": str(wrong)}

    for name, which in (("train", trained_on[:PAIRS]), ("validation", held_out[:HELD_OUT_PAIRS])):
        rows = "".join(json.dumps(pair(problem)) + "\n" for problem in which)
        (WORK / f"pairs.{name}.jsonl").write_text(rows)
    sums = tiny.TRAIN_PROBLEMS.read_text().splitlines(keepends=True)[:SUMS]
    (WORK / "sums.jsonl").write_text("".join(sums))


class Trainings:
    """Runs trainings one after the other in this process, and keeps what they have in common."""

    def __init__(self):
        make_data()
        self.tokenizer = tiny.load_tokenizer()
        self.reference = tiny.load_policy().eval()
        self.prompts = [prompt(problem) for problem in problems()[1][HELD_OUT_PAIRS:][:128]]
        self.sums = [
            json.loads(line)["input"] for line in (WORK / "sums.jsonl").read_text().splitlines()
        ]
        self.loaded = []
        for module in (run_dpo, rl_trainer):
            module.load_policy = self._keep(module.load_policy)
        loaded, load_samples = {}, run_dpo.preference_samples

        def samples_once(settings, *args, **options):
            """All pairs of a data set, tokenized and with the reference's column."""
            paths = settings.data.model_dump_json(include={"train", "validation"})
            if paths not in loaded:
                train, validation = loaded[paths] = load_samples(settings, *args, **options)
                sets = [train, *validation.values()]
                add_reference_logprobs(self.reference, sets, make_accelerator("float32"))
            return loaded[paths]

        run_dpo.preference_samples = samples_once
        run_dpo.keep_reference_logprobs = lambda *_: None  # they are there

    def _keep(self, load):
        def kept(*args, **options):
            self.loaded.append(load(*args, **options))
            return self.loaded[-1]

        return kept

    def run(self, task, values, seed, *, steps=None, overrides=(), val_period=None, watch=None):
        """Train once.

        Args:
            task: What to train.
            values: By configuration key; keys tied to them are set too.
            seed: Of the training.
            steps: Optimizer steps; those of the task if not given.
            overrides: More overrides.
            val_period: Steps between validations; that of the task if not given.
            watch: Called with step and objective at each validation; may raise to end the run.

        Returns:
            `values`, `seed`, `steps` done, `seconds`, `curve` (step, objective, and the task's
            other metrics, averaged since the last validation where they are of training), and
            `kl` to the reference in nats an answer. A run that failed has `failure` instead.
        """
        steps = steps or task.steps
        lines = [
            "checkpointing.enabled=false",
            f"logger.log_dir={WORK}/logs",
            *task.overrides,
            f"{task.name}.max_num_steps={steps}",
            f"{task.name}.val_period={val_period or task.val_period}",
            f"{task.seed_key}={seed}",
            *overrides,
            *(f"++{key}={json.dumps(value)}" for key, value in with_ties(values).items()),
        ]
        train, used = TRAINERS[task.name]
        config, _ = read_config(ROOT / task.config, lines, used)
        curve, since = [], []
        record = self.last = {"values": dict(values), "seed": seed, "steps": 0}
        started, self.loaded = time.perf_counter(), []

        def observe(step, metrics):
            record["steps"] = step
            since.append(metrics)
            if task.objective in metrics:
                kept = [metrics[task.objective]]
                for name in task.kept:
                    found = [m[name] for m in since if name in m]
                    kept.append(sum(found) / len(found))
                curve.append([step, *(round(value, 5) for value in kept)])
                since.clear()
                if watch:
                    watch(step, metrics[task.objective])

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train(config, observe=observe)
            record["kl"] = round(self.divergence(task), 5)
        except FloatingPointError as error:
            record["failure"] = str(error).split(";")[0]
        finally:
            record["curve"] = curve
            record["seconds"] = round(time.perf_counter() - started, 3)
        return record

    def divergence(self, task):
        """KL of the policy to the reference in nats an answer, over sums of the task."""
        policy = self.loaded[-1 if task is DPO else 0].eval()  # the other is the reference
        asked = self.prompts if task is DPO else self.sums * 2
        responses = sample_responses(policy, self.tokenizer, asked, max_new_tokens=4, seed=5)
        return response_kl(policy, self.reference, responses)


class SeededByTrial(optuna.samplers.BaseSampler):
    """One of Optuna's samplers, made anew for every trial with a seed of the trial's number.

    So a study that is read from its file and goes on draws what one without a pause draws.

    Args:
        make: Makes a sampler of a seed.
        seed: The study's seed.
    """

    def __init__(self, make, seed):
        self._make, self._seed = make, seed
        self._number, self._sampler = -1, make(seed)

    def _of(self, trial):
        if trial.number != self._number:
            self._number = trial.number
            mixed = random.Random(f"{self._seed} {trial.number}").getrandbits(32)
            self._sampler = self._make(mixed)
        return self._sampler

    def infer_relative_search_space(self, study, trial):
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study, trial):
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study, trial, state, values):
        self._of(trial).after_trial(study, trial, state, values)


class Store:
    """Runs that are done, by a key, in a file of JSON lines."""

    def __init__(self, name):
        WORK.mkdir(parents=True, exist_ok=True)
        self.path, self.done = WORK / f"{name}.jsonl", {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed script
                    row = json.loads(line)
                    self.done[row["key"]] = row["record"]

    def get(self, key, make):
        """The record of a key; made and kept if it is not there."""
        if key not in self.done:
            record = make()
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "record": record}) + "\n")
            self.done[key] = record
            if sys.stdout.isatty() or len(self.done) % 10 == 0:
                print(f"{datetime.datetime.now():%H:%M:%S} {len(self.done)} {key}", flush=True)
        return self.done[key]


def header(task=None):
    """Where and with what a result was measured."""
    found = {
        "script": Path(sys.argv[0]).name,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "optuna", "cmaes")},
        },
    }
    if task:
        found |= {
            "task": task.name,
            "config": task.config,
            "overrides": [o for o in task.overrides if str(WORK) not in o],
            "objective": task.objective,
            "steps": task.steps,
            "val_period": task.val_period,
            "columns": ["step", task.objective, *task.kept],
            "space": {
                key: json.loads(optuna.distributions.distribution_to_json(distribution))
                for key, distribution in task.space.items()
            },
        }
    return found


def write(name, content):
    """Write `results/search-NAME.json`: the header's entries, and one run a line."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"search-{name}.json"
    temporary = path.with_suffix(".tmp")
    runs = content.pop("runs")
    text = json.dumps(content, indent=1)[:-2]
    lines = ",\n".join(f"  {json.dumps(run, separators=(',', ':'))}" for run in runs)
    temporary.write_text(f'{text},\n "runs": [\n{lines}\n ]\n}}\n')
    os.replace(temporary, path)
    print(f"{path.relative_to(ROOT)}: {len(runs)} runs")
