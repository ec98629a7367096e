# SPDX-License-Identifier: Apache-2.0
"""The world in which every answer is listed."""

import math

import pytest
import torch

from nemo_rl_ref.equations.world import World, ascend, expect, gradient, groups, kl, variance


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("vocab", "horizon"), [(1, 1), (2, 1), (3, 3), (2, 5)])
def test_every_answer_is_listed_once(vocab, horizon):
    world = World(vocab, horizon)
    assert len(world) == vocab**horizon
    assert len(torch.unique(world.answers, dim=0)) == len(world)
    assert (world.mask == 1).all()
    assert world.states == sum(vocab**step for step in range(horizon))


def test_an_end_token_ends_an_answer():
    world = World(2, 3, end=1)
    listed = [
        answer[: int(n)].tolist()
        for answer, n in zip(world.answers, world.mask.sum(1), strict=True)
    ]
    assert sorted(listed) == [[0, 0, 0], [0, 0, 1], [0, 1], [1]]
    assert world.states == 3  # the empty prefix, 0, 00


@pytest.mark.parametrize("end", [None, 0, 2])
@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
def test_the_probabilities_of_all_answers_add_up_to_one(end, scale):
    world = World(3, 4, end=end)
    logits = world.policy(scale, seed=3)
    assert world.logprob(logits).exp().sum().item() == pytest.approx(1, abs=1e-14)


def test_an_answers_probability_is_the_product_of_its_tokens():
    world = World(2, 2)
    logits = torch.log(doubles([0.25, 0.75], [0.5, 0.5], [0.1, 0.9]))
    probabilities = dict(
        zip(map(tuple, world.answers.tolist()), world.logprob(logits).exp(), strict=True)
    )
    rows = {
        tuple(a[:1]): r[1]
        for a, r in zip(world.answers.tolist(), world.prefixes.tolist(), strict=True)
    }
    first = doubles([0.25, 0.75])[0]
    for answer, probability in probabilities.items():
        table = torch.softmax(logits, -1)
        expected = first[answer[0]] * table[rows[answer[:1]], answer[1]]
        assert probability.item() == pytest.approx(expected.item())


def test_expectation_and_variance_are_exact():
    log_p = torch.log(doubles(0.25, 0.75))
    assert expect(log_p, doubles(1.0, 3.0)).item() == pytest.approx(2.5)
    assert variance(log_p, doubles(1.0, 3.0)).item() == pytest.approx(0.75)
    assert expect(log_p, doubles([1.0, 0.0], [3.0, 4.0])).tolist() == pytest.approx([2.5, 3.0])


def test_the_divergence_is_an_expectation_under_its_first_argument():
    log_p, log_q = torch.log(doubles(0.25, 0.75)), torch.log(doubles(0.5, 0.5))
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl(log_p, log_q).item() == pytest.approx(expected)
    assert kl(log_q, log_p).item() != pytest.approx(expected)
    assert kl(log_p, log_p).item() == 0


def test_groups_are_all_tuples_of_independent_samples():
    log_p = torch.log(doubles(0.25, 0.75))
    members, log_weight = groups(log_p, 2)
    assert members.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert log_weight.exp().tolist() == pytest.approx([0.0625, 0.1875, 0.1875, 0.5625])
    assert groups(log_p, 1)[0].tolist() == [[0], [1]]


def test_the_gradient_goes_through_the_sum():
    world = World(3, 2)
    logits = world.policy(seed=1)
    rewards = torch.arange(9, dtype=torch.float64)

    def value(at):
        return expect(world.logprob(at), rewards)

    assert torch.autograd.gradcheck(value, logits)
    assert gradient(value(logits), logits).shape == (world.states, 3)


def test_ascent_finds_the_maximum_and_leaves_its_beginning_alone():
    world = World(3, 1)
    start = world.policy(seed=2)
    before = start.detach().clone()
    target = torch.log_softmax(doubles(1.0, 2.0, 0.5), 0)
    found = ascend(lambda logits: -kl(world.logprob(logits), target), start)
    assert torch.allclose(world.logprob(found), target, atol=1e-7)
    assert torch.equal(start, before)
    assert not found.requires_grad


def test_policies_differ_with_seed_and_scale():
    world = World()
    assert torch.equal(world.policy(seed=1), world.policy(seed=1))
    assert not torch.equal(world.policy(seed=1), world.policy(seed=2))
    assert (world.policy(0.0) == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab": 0}, "vocab should be at least 1, got 0"),
        ({"horizon": 0}, "horizon should be at least 1, got 0"),
        ({"vocab": 3, "end": 3}, "end should be a token from 0 to 2, got 3"),
        ({"vocab": 10, "horizon": 6}, r"at most 100000, got 10 \*\* 6 answers"),
    ],
)
def test_a_world_that_cannot_be_listed_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        World(**arguments)


def test_too_many_groups_are_refused():
    with pytest.raises(ValueError, match=r"at most a million groups, got 27 \*\* 5"):
        groups(torch.zeros(27), 5)
