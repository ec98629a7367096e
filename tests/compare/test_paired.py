# SPDX-License-Identifier: Apache-2.0
"""Comparisons over seeds: what is run, what is said, and the command from end to end."""

import json
import statistics

import pytest
from scipy.stats import ttest_rel

from nemo_rl_ref.compare.__main__ import main, make_parser, sides_of
from nemo_rl_ref.compare.paired import compare_sides, seeds_needed
from nemo_rl_ref.tune.trial import TrialFailed

METRIC = "val:validation-default_accuracy"
BETA = "dpo.reference_policy_kl_penalty"
LOSS = '''
from nemo_rl_ref.algorithms.loss import DPOLossFn


class Shifted(DPOLossFn):
    """DPO that wants a larger margin."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.margin = getattr(cfg, "margin", 0.5)

    def split_output_tensor(self, tensor):
        chosen, rejected = super().split_output_tensor(tensor)
        return (chosen - self.margin, rejected) if tensor.ndim == 1 else (chosen, rejected)
'''


def sides(*arguments):
    options, overrides = make_parser().parse_known_args(
        ["dpo", "--config", "configs/dpo.yaml", *arguments]
    )
    return sides_of(options, overrides)


class Trainer:
    """Stands for the training: accuracy from a table by side and seed, and a list of the calls."""

    def __init__(self, gain):
        self.gain, self.calls = gain, []

    def __call__(self, spec, values, folder, *, seed, observe):
        self.calls.append(seed)
        observe(40, {METRIC: 0.0})
        is_mine = any(BETA in line for line in spec.overrides)
        return {METRIC: 0.5 + 0.01 * seed % 0.07 + (self.gain(seed) if is_mine else 0.0)}


def run(folder, gain, seeds=4):
    trainer = Trainer(gain)
    pair = sides("--change", f"{BETA}=0.5")
    result = compare_sides(*pair, seeds, folder, run_trial=trainer, show=lambda _: None)
    return result, trainer


def test_both_sides_get_the_same_seeds_and_the_interval_is_that_of_a_paired_test(tmp_path):
    result, trainer = run(tmp_path, lambda seed: 0.02 + 0.001 * seed)
    assert trainer.calls == [seed for seed in range(42, 46) for _ in range(2)]
    mine, other = ([*result.values(side).values()] for side in (result.mine, result.other))
    low, high = ttest_rel(mine, other).confidence_interval()
    assert (result.found["low"], result.found["high"]) == pytest.approx((low, high))
    assert result.found["mean_difference"] == pytest.approx(statistics.fmean(result.differences))
    assert any("is better on this data" in line for line in result.sentences())
    assert json.loads((tmp_path / "result.json").read_text())["found"]["pairs"] == 4
    assert (tmp_path / "difference.svg").read_text().lstrip().startswith("<?xml")


def test_what_is_not_settled_is_called_so_with_the_seeds_it_takes(tmp_path):
    result, _ = run(tmp_path, lambda seed: 0.05 if seed % 2 else -0.03)
    text = " ".join(result.sentences())
    assert "do not settle which is better" in text
    assert f"about {seeds_needed(result.differences)} seeds" in text


def test_a_worse_side_is_called_worse(tmp_path):
    result, _ = run(tmp_path, lambda seed: -0.1 - 0.001 * seed)
    assert any("is worse on this data" in line for line in result.sentences())


def test_the_same_call_again_trains_nothing_and_more_seeds_train_the_rest(tmp_path):
    first, _ = run(tmp_path, lambda seed: 0.001 * seed, seeds=3)
    again, trainer = run(tmp_path, lambda seed: 0.001 * seed, seeds=3)
    assert not trainer.calls and again.found == first.found
    assert run(tmp_path, lambda seed: 0.001 * seed, seeds=4)[1].calls == [45, 45]


def test_a_run_that_fails_is_named_and_its_seed_left_out(tmp_path):
    def gain(seed):
        if seed == 43:
            raise TrialFailed("out of memory")
        return 0.02 + 0.001 * seed

    result, _ = run(tmp_path, gain)
    assert result.found["pairs"] == 3
    assert any("seed 43: out of memory" in line for line in result.sentences())


def test_the_seeds_it_takes_shrink_the_interval_below_the_difference():
    differences = [0.02, 0.05, -0.01, 0.03]
    needed = seeds_needed(differences)
    scale = (statistics.stdev(differences), statistics.fmean(differences))
    from scipy.stats import t

    def half(count):
        return t.ppf(0.975, count - 1) * scale[0] / count**0.5

    assert half(needed) < scale[1] <= half(needed - 1)
    assert seeds_needed([0.001, -0.001, 0.00001]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "both sides are the same training"),
        (["--seeds", "0", "--change", f"{BETA}=0.5"], "--seeds: got 0"),
        (["--level", "2", "--change", f"{BETA}=0.5"], "level: got 2"),
        (["--loss", "nowhere.py:Loss"], "--loss: no file at nowhere.py"),
        (["--env", "nowhere.py:reward"], "--env: got nowhere.py:reward with dpo"),
        (["--change", "dpo.reference_policy_kl_penlty=0.5"], BETA),
        (["--metric", "val:kl", "--change", f"{BETA}=0.5"], "which way is better"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(arguments, message, tmp_path, capsys):
    line = ["dpo", "--config", "configs/dpo.yaml", "--folder", str(tmp_path / "runs"), *arguments]
    assert main(line) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "runs").exists()


def test_a_loss_against_the_default_from_end_to_end(tmp_path, capsys):
    file = tmp_path / "shifted_loss.py"
    file.write_text(LOSS)
    line = [
        "dpo", "--config", "configs/dpo.yaml", "--loss", f"{file}:Shifted", "--seeds", "2",
        "--folder", str(tmp_path / "runs"), "--json", "dpo.max_num_steps=2", "++dpo.margin=0.1",
        "dpo.val_at_start=false", "policy.train_global_batch_size=8",
        "policy.train_micro_batch_size=8",
    ]  # fmt: skip
    assert main(line) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mine"] == "Shifted" and result["found"]["pairs"] == 2
    values = {(r["candidate"], r["seed"]): r["value"] for r in result["runs"]}
    assert len(values) == 4
    # An edited loss is another training: its runs are made again.
    before = (tmp_path / "runs/Shifted-seed-42/run.json").read_text()
    file.write_text(LOSS.replace("larger margin", "larger margin, later"))
    assert main(line) == 0
    assert (tmp_path / "runs/Shifted-seed-42/run.json").read_text() != before
