# SPDX-License-Identifier: Apache-2.0
"""Mistakes that published pages made, typed into the equations and into the code.

Each is planted in a copy of the package, and the check of the equations has to name the equation
that no longer agrees with the code.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nemo_rl_ref"

#: The mistake, the file, what stands there, what was typed, and the equation that it concerns.
IN_EQUATIONS = [
    (
        "1: the DPO gradient weighted by the wrong side of the sigmoid",
        "equations/preferences.py",
        "right=-beta * sigma(-m) * (grad_w - grad_l)",
        "right=-beta * sigma(m) * (grad_w - grad_l)",
        "dpo-gradient",
    ),
    (
        "2: a DPO loss with the logarithm around the difference",
        "equations/preferences.py",
        """                logsigma(
                    beta * log(chosen[n] / ref_chosen[n])
                    - beta * log(rejected[n] / ref_rejected[n])
                ),
                n,
                N,
                PAIRS,
            ),
            implementation=DPO,
            check=_dpo_loss""",
        """                logsigma(
                    beta * log(chosen[n] / ref_chosen[n] - rejected[n] / ref_rejected[n])
                ),
                n,
                N,
                PAIRS,
            ),
            implementation=DPO,
            check=_dpo_loss""",
        "dpo-loss",
    ),
    (
        "3: GRPO as DPO with groups",
        "equations/grpo.py",
        "sum_over(mask[i, t] * bracket(beta * kl_k[i, t] - _surrogate), t, T)",
        "log(1 + exp(-beta * (advantages[1] - advantages[2])))",
        "grpo-objective",
    ),
    (
        "3: GRPO with a value loss",
        "equations/grpo.py",
        "sum_over(mask[i, t] * _surrogate, t, T) / sum_over(mask[i, t], t, T),",
        "(sum_over(mask[i, t] * _surrogate, t, T) - advantages[i] ** 2 / 2)"
        " / sum_over(mask[i, t], t, T),",
        "grpo-published",
    ),
    (
        "4: the ratio after a step is said to be inside the clipping range",
        "equations/ppo.py",
        "            right=exp(rate * A * (1 - token_probability[sampled]))",
        "            right=clip(1 + rate * A, 1 - eps, 1 + eps) + 0 * exp(rate)",
        "ppo-step-ratio",
    ),
    (
        "5: KL of the policy as an expectation under the other policy",
        "equations/kl_estimators.py",
        "right=expectation(log_ratio, y, Y, pi[y], UNDER_POLICY)",
        "right=expectation(log_ratio, y, Y, ref[y], UNDER_POLICY)",
        "kl-definition",
    ),
    (
        "5: k3 called unbiased for samples from the other policy",
        "equations/kl_estimators.py",
        "expectation(k3_of_answer, y, Y, pi[y], UNDER_POLICY),\n                sum_over",
        "expectation(k3_of_answer, y, Y, ref[y], UNDER_POLICY),\n                sum_over",
        "k3-mean",
    ),
    (
        "6: the mean of the micro-batches' means",
        "equations/reductions.py",
        "sum_over(sum_over(counted[b, t] * token_losses[b, t], t, T) / _all, b, B),",
        "average(sum_over(counted[b, t] * token_losses[b, t], t, T)"
        " / sum_over(counted[b, t], t, T), b, B),",
        "global-mean",
    ),
]

LOSS = "algorithms/loss/_preference.py"
DPO = "loss = -logsigmoid(beta * (chosen - rejected)) * chosen_mask"
IN_CODE = [
    ("1", LOSS, DPO, DPO.replace("(beta", "(-beta"), "dpo-gradient"),
    (
        "2",
        LOSS,
        DPO,
        "loss = -(beta * (chosen.exp() - rejected.exp()).log()).sigmoid().log() * chosen_mask",
        "dpo-loss",
    ),
    (
        "3: as DPO with groups",
        "algorithms/loss/_policy_gradient.py",
        "return torch.maximum(-advantages * ratios, -advantages * clipped_ratios)",
        "return -torch.nn.functional.logsigmoid(advantages * ratios.log()) + 0 * clipped_ratios",
        "grpo-objective",
    ),
    (
        "3: with a value loss",
        "algorithms/loss/_clipped_pg_terms.py",
        "    loss = (\n        actor_loss",
        "    loss = (\n        advantages.square().mean() / 2 + actor_loss",
        "grpo-objective",
    ),
    (
        "4: the ratio is forced into the range",
        "algorithms/loss/_policy_gradient.py",
        "return torch.maximum(-advantages * ratios, -advantages * clipped_ratios)",
        "return -advantages * clipped_ratios",
        "ppo-gradient",
    ),
    (
        "5: the divergence averaged under its second argument",
        "equations/world.py",
        "return expect(log_p, log_p - log_q)",
        "return expect(log_q, log_p - log_q)",
        "kl-definition",
    ),
    (
        "6: every micro-batch divides by its own count",
        "algorithms/utils.py",
        "    count = global_normalization_factor\n    if count is None:",
        "    count = global_normalization_factor\n    if True:",
        "global-mean",
    ),
]


@pytest.fixture
def plant(tmp_path):
    """Return what copies the package, types something else into files, and checks equations."""
    top = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "assets", "*.json")
    shutil.copytree(PACKAGE, top / "nemo_rl_ref", ignore=ignored)

    def check(mistakes, labels):
        for _, file, right, wrong, _ in mistakes:
            path = top / "nemo_rl_ref" / file
            text = path.read_text(encoding="utf-8")
            assert text.count(right) == 1, f"{file} does not hold once: {right}"
            path.write_text(text.replace(right, wrong), encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "nemo_rl_ref.equations", *labels],
            cwd=top,
            env=os.environ | {"PYTHONPATH": str(top)},
            capture_output=True,
            text=True,
        )

    return check


def test_the_right_equations_pass(plant):
    labels = sorted({label for *_, label in IN_EQUATIONS + IN_CODE})
    done = plant([], labels)
    assert done.returncode == 0, done.stderr


def test_mistakes_in_equations_are_named(plant):
    labels = [label for *_, label in IN_EQUATIONS]
    done = plant(IN_EQUATIONS, labels)
    assert done.returncode == 1, done.stdout
    for label in labels:
        assert f"equation '{label}' (" in done.stderr, (label, done.stderr)


@pytest.mark.parametrize("mistake", IN_CODE, ids=[name for name, *_ in IN_CODE])
def test_a_mistake_in_the_code_is_named(plant, mistake):
    label = mistake[-1]
    done = plant([mistake], [label])
    assert done.returncode == 1, done.stdout
    assert f"equation '{label}' (" in done.stderr, done.stderr
    assert "is not what nemo_rl_ref." in done.stderr
