# SPDX-License-Identifier: Apache-2.0
"""The order of the data is NeMo RL's."""

import pytest

from nemo_rl_ref.rl.rollouts import PromptPlan, prompt_batches
from nemo_rl_ref.training.samples import Plan, order

#: Three epochs of torchdata 0.11.0's ``StatefulDataLoader(range(7), shuffle=True)`` after
#: ``torch.manual_seed(seed)``, by seed and ``num_workers``.
RECORDED = {
    (42, 0): [[5, 0, 1, 3, 2, 4, 6], [2, 6, 5, 0, 1, 3, 4], [0, 4, 5, 6, 2, 1, 3]],
    (7, 0): [[6, 0, 4, 1, 2, 5, 3], [6, 1, 3, 0, 2, 5, 4], [0, 1, 2, 6, 3, 5, 4]],
    (42, 1): [[2, 6, 5, 0, 1, 3, 4], [1, 2, 3, 5, 0, 6, 4], [4, 2, 5, 6, 0, 1, 3]],
    (7, 1): [[6, 1, 3, 0, 2, 5, 4], [4, 5, 2, 3, 1, 6, 0], [2, 3, 5, 1, 0, 6, 4]],
}


@pytest.mark.parametrize(("seed", "num_workers"), RECORDED)
@pytest.mark.parametrize("epoch", range(3))
def test_the_order_is_that_of_nemo_rls_loader(seed, num_workers, epoch):
    expected = RECORDED[seed, num_workers][epoch]
    assert list(order(7, seed, epoch, num_workers)) == expected
    assert order(7, seed, epoch, 3 * num_workers) == order(7, seed, epoch, num_workers)

    plan = Plan(7, 2, 3, -1, True, seed, num_workers)
    assert sum((plan.numbers(3 * epoch + step) for step in range(3)), []) == expected[:6]

    prompts, options = list("abcdefg"), {"shuffle": True, "seed": seed, "num_workers": num_workers}
    batches = list(prompt_batches(prompts, 2, epoch=epoch, **options))
    assert [prompts.index(p) for batch in batches for p in batch] == expected[:6]
    prompt_plan = PromptPlan(prompts, 2, 3, True, seed, num_workers)
    state = {"current_epoch": epoch, "data_position": 1}
    assert list(prompt_plan.rest(state)) == batches[1:]
