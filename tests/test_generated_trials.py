# SPDX-License-Identifier: Apache-2.0
"""Whatever a trainer is given, it trains with finite metrics, or says what is wrong in one error.

Hypothesis builds configurations, overrides and data records, legal and illegal, from the keys and
types of NeMo RL, and a trainer runs with them, in this process. No case may end in a traceback,
hang, or have an error that names nothing: no key, no file, no argument.

A run of the tests tries 200 as far as the first step. ``TRIALS=2000`` in the environment tries that
many, others each time, and takes the step.
"""

import contextlib
import io
import json
import math
import os
import re
import signal
import tempfile
from pathlib import Path

import datasets
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rl_runs import settings as rl_config
from trainer_runs import RUNNERS, make_config

from nemo_rl_ref import run_grpo
from nemo_rl_ref.config.keys import flatten_keys, without_indices
from nemo_rl_ref.config.sections import DPOSettings, RMSettings, SFTSettings
from nemo_rl_ref.config.settings import used_keys
from nemo_rl_ref.config.types import key_types
from nemo_rl_ref.files.metrics import read_metrics
from nemo_rl_ref.rl.settings import GRPOSettings, PPOSettings
from nemo_rl_ref.rl.trainer import RLTrainer
from nemo_rl_ref.training.loop import Run
from nemo_rl_ref.training.supervised import Supervised
from nemo_rl_ref.upstream import load_keys, load_manifest

NIGHTLY = "TRIALS" in os.environ
TRIALS = int(os.environ.get("TRIALS", "200"))
#: Seconds that a trial may take; it takes less than one.
LIMIT = 60
KINDS = {
    "sft": SFTSettings, "dpo": DPOSettings, "rm": RMSettings, "grpo": GRPOSettings,
    "ppo": PPOSettings,
}  # fmt: skip

# Values

TEXT = st.sampled_from(
    ["", "x", "no", "1", "1e-3", "nan", "null", "é", "[/b]", "$x$", "a%d{}", "${x}", "<script>",
     "${policy.precision}", "'", "run.yaml", "missing.jsonl", "float32", "torch.optim.SGD"]
)  # fmt: skip
WHOLE = st.one_of(
    st.integers(0, 8), st.sampled_from([-8, -1, 16, 2**31, 2**32, 2**63 - 1, 2**63, 10**30])
)
REAL = st.sampled_from([0.0, 1e-30, 1e-3, 0.5, 0.9, 1.0, 2.5, 1e30, -0.1, math.nan, math.inf])
SIMPLE = {
    "int": WHOLE, "float": st.one_of(REAL, WHOLE), "bool": st.booleans(), "str": TEXT,
    "null": st.none(),
}  # fmt: skip
SCALAR = st.one_of(*SIMPLE.values())
NESTED = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["name", "kwargs", "lr", "x", "1", "a.b"]), inner, max_size=3
        ),
    ),
    max_leaves=4,
)


def values(key):
    """Values of a key: those that NeMo RL's files have, others of its type, and any."""
    kinds, pattern = key_types(key), without_indices(key)
    of_type = [SIMPLE[kind] for kind in sorted(kinds) if kind in SIMPLE] or [SCALAR]
    seen = [c[pattern] for c in load_manifest()["configs"].values() if pattern in c]
    seen = st.sampled_from(seen) if seen else st.one_of(*of_type)
    return st.one_of(seen, *[kind for kind in of_type for _ in range(3)], NESTED)


def base(section, folder):
    """A run of one step, without checkpoints."""
    if section in RUNNERS:
        config = make_config(section, folder, samples=8)
        config[section] |= {"val_batches": 1, "val_global_batch_size": 2}
        sizes = {"train_global_batch_size": 2, "train_micro_batch_size": 2}
    else:
        config = rl_config(folder, ppo=section == "ppo")
        config[section] |= {"num_prompts_per_step": 2, "num_generations_per_prompt": 2}
        sizes = {"train_global_batch_size": 4, "train_micro_batch_size": 4}
        config.get("value", {}).update(sizes)
    config["policy"] |= sizes
    config[section] |= {"max_num_steps": 1}
    config["checkpointing"] |= {"enabled": False, "metric_name": None}
    return config


@contextlib.contextmanager
def scratch():
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield Path(folder)


def keys(section):
    """What the section's trainer reads, what its configuration has, and what NeMo RL has beside."""
    with scratch() as folder:
        own = flatten_keys(base(section, folder))
    read = used_keys(KINDS[section])
    beside = [
        key for key in load_keys()["keys"] if key.split(".")[0] in (section, "policy", "data")
    ]
    beside = [key.replace("#", "0").replace("*", "x") for key in beside]
    own = st.sampled_from(sorted({*own, *read}))
    return st.one_of(*[own] * 8, st.sampled_from(sorted(beside)))


KEYS = {section: keys(section) for section in KINDS}
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", 3]),
     "content": st.one_of(TEXT, st.just([{"type": "text", "text": "1+2="}]), NESTED)}
)  # fmt: skip
FIELDS = {
    "sft": ["input", "output", "messages"],
    "dpo": ["prompt", "chosen", "rejected"],
    "rm": ["prompt", "chosen", "rejected"],
    "grpo": ["input", "output", "messages"],
    "ppo": ["input", "output", "messages"],
}
RAW = st.sampled_from(
    [b"", b"{", b"[]", b"[{}]", b"\xff\xfe", b"null", b'{"input": "\\ud800", "output": "1"}',
     b"\xef\xbb\xbf", b'{"messages": [{"role": "user", "content": null}]}', b"{" * 5000]
)  # fmt: skip


@st.composite
def trials(draw):
    """Section, changes of the configuration, overrides, and changes of the records."""
    section = draw(st.sampled_from(sorted(KINDS)))
    changes, overrides = [], []
    for _ in range(draw(st.integers(0, 3))):
        key = draw(KEYS[section])
        changes.append((key, draw(values(key))))
    for _ in range(draw(st.integers(0, 2))):
        key = draw(KEYS[section])
        odd = st.sampled_from(["{}={}", "+{}={}", "~{}", "{}={},1", "{}"])
        form = draw(st.one_of(*[st.just("++{}={}")] * 5, odd))
        value = draw(values(key))
        text = value if isinstance(value, str) else json.dumps(value).replace('"', "'")
        overrides.append(form.format(key, text))
    record = st.one_of(
        st.tuples(
            st.sampled_from(FIELDS[section]), st.one_of(NESTED, st.lists(MESSAGE, max_size=3))
        ),
        RAW,
    )
    return section, changes, overrides, draw(st.lists(record, max_size=1))


# Running one


class Hangs(BaseException):
    """A trial takes too long. No `Exception`, so that nothing takes it for one of its own."""


def stop(*_):
    raise Hangs


def put(config, key, value):
    """Set a value, through whatever stands in the way."""
    *path, last = key.split(".")
    if last == "ppo_epochs" and isinstance(value, int):
        value = min(value, 8)  # within one step
    for part in path:
        place = config.get(part)
        config[part] = dict(place) if isinstance(place, dict) else {}
        config = config[part]
    config[last] = value


def write(section, changes, records, folder):
    """The trial's configuration file and its data."""
    config = base(section, folder)
    for field in records:
        path = Path(config["data"]["train"]["data_path"])
        lines = path.read_bytes().splitlines()
        if isinstance(field, tuple):
            lines[0] = json.dumps({**json.loads(lines[0]), field[0]: field[1]}).encode()
        else:
            lines[0] = field
        path.write_bytes(b"\n".join(lines))
    for key, value in changes:
        put(config, key, value)
    path = folder / "run.yaml"
    OmegaConf.save(OmegaConf.create(config, flags={"allow_objects": True}), path)
    return path


def run_one(section, path, overrides):
    """Exit status and what was printed to stderr."""
    module = RUNNERS.get(section, run_grpo)
    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = module.main(["--config", str(path), *overrides])
    except SystemExit as error:
        status = error.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return status, err.getvalue()


#: A key, a file, or an argument.
NAMES = re.compile(r"\b[a-z_]+\.[a-z0-9_]+|\.yaml|\.jsonl|--[a-z]|'[^']*='|[a-z_]+: ")


def judge(status, err, folder):
    """Raise unless the trial ended as every run should."""
    error = err[err.find("error: ") :] if "error: " in err else ""
    assert "Traceback" not in err
    if status == 0:
        assert not error
        for logs in folder.rglob("metrics.jsonl"):
            for metrics in read_metrics(logs.parent).values():
                bad = {k: v for k, v in metrics.items() if not math.isfinite(v)}
                assert not bad, bad
    else:
        assert status in (1, 2) and error.count("error: ") >= 1, (status, err)
        assert NAMES.search(error), error
        assert len(error) < 4000, error


@pytest.fixture
def quiet(monkeypatch):
    """No network, no progress bars, no messages; no step, and at night one, whatever is asked."""
    for trainer in (Supervised, RLTrainer):
        monkeypatch.setattr(trainer, "is_last", lambda trainer, state: state["total_steps"] >= 1)
    if not NIGHTLY:
        monkeypatch.setattr(Run, "train", lambda run: {"validation": {}})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=TRIALS,
    derandomize=not NIGHTLY,
    database=None,  # its folder would be the trial's
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(trials())
def test_a_step_or_one_error_that_names_something(quiet, trial):
    section, changes, overrides, records = trial
    with scratch() as folder:
        path = write(section, changes, records, folder)
        status, err = run_one(section, path, overrides)
        judge(status, err, folder)
