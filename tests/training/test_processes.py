# SPDX-License-Identifier: Apache-2.0
"""One process and two, with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_runs import curve

from nemo_rl_ref.files.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def test_two_processes_train_what_one_does(tmp_path):
    script = tmp_path / "curves.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'help')!r}]\n"
        "from pathlib import Path\n"
        "from trainer_runs import run\n"
        "from nemo_rl_ref.training.processes import process_state\n"
        "for section in ('sft', 'dpo', 'rm'):\n"
        "    name = f'{section}-{process_state().num_processes}'\n"
        "    changes = {'policy__train_micro_batch_size': 2, f'{section}__max_num_steps': 8}\n"
        "    run(section, Path(sys.argv[1]), name=name, **changes)\n"
    )
    launch = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    two = [*launch, "--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2"]
    for launcher in ([], two):
        result = subprocess.run(
            [sys.executable, *launcher, str(script), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
    for section in ("sft", "dpo", "rm"):
        one, both = (read_metrics(tmp_path / f"{section}-{count}-logs") for count in (1, 2))
        key = "validation/val_loss" if section == "sft" else "validation-default/loss"
        for name in ("train/loss", key):
            assert len(curve(one, name)) >= 3
            assert curve(both, name) == pytest.approx(curve(one, name), abs=1e-5), (section, name)
