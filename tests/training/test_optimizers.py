# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules of a configuration, and what is refused."""

import copy

import pydantic
import pytest
import torch

from nemo_rl_ref.config.sections import OptimizerConfig, Scheduler
from nemo_rl_ref.training import optimizers
from nemo_rl_ref.training.optimizers import OPTIMIZERS, SCHEDULERS

ADAMW = {"name": "torch.optim.AdamW", "kwargs": {"lr": 1.0, "foreach": False}}
LINEAR = {
    "name": "torch.optim.lr_scheduler.LinearLR",
    "kwargs": {"start_factor": 0.5, "end_factor": 1.0, "total_iters": 2},
}
CONSTANT = {
    "name": "torch.optim.lr_scheduler.ConstantLR",
    "kwargs": {"factor": 1.0, "total_iters": 10_000_000_000},
}
STEP = {"name": "torch.optim.lr_scheduler.StepLR", "kwargs": {"step_size": 2, "gamma": 0.1}}


def make_optimizer(config, parameters):
    return optimizers.make_optimizer(OptimizerConfig(**config), parameters)


def make_scheduler(config, optimizer):
    read = pydantic.TypeAdapter(Scheduler | None).validate_python(config)
    return optimizers.make_scheduler(read, optimizer)


def rates(config, steps, start=None):
    model = torch.nn.Linear(1, 1)
    optimizer = make_optimizer(ADAMW, model.parameters())
    scheduler = make_scheduler(config, optimizer)
    if start:
        optimizer.load_state_dict(start[0])
        scheduler.load_state_dict(start[1])
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        model(torch.ones(1)).sum().backward()
        optimizer.step()
        scheduler.step()
    return seen, copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, [1, 1, 1, 1, 1, 1]),
        (LINEAR, [0.5, 0.75, 1, 1, 1, 1]),
        ([LINEAR, CONSTANT, {"milestones": [2]}], [0.5, 0.75, 1, 1, 1, 1]),
        ([LINEAR, STEP, {"milestones": [2]}], [0.5, 0.75, 1, 1, 0.1, 0.1]),
        ([LINEAR, CONSTANT, STEP, {"milestones": [1, 3]}], [0.5, 1, 1, 1, 1, 0.1]),
        ([CONSTANT, {"milestones": []}], [1, 1, 1, 1, 1, 1]),
    ],
)
def test_rates(config, expected):
    seen, _ = rates(config, 6)
    assert seen == pytest.approx(expected)
    first, state = rates(config, 3)
    second, _ = rates(config, 3, state)
    assert first + second == seen  # bit by bit


def test_the_lists_hold_what_nemo_rl_uses_and_nothing_from_elsewhere():
    assert "torch.optim.AdamW" in OPTIMIZERS
    assert {
        f"torch.optim.lr_scheduler.{n}LR" for n in ("Linear", "Constant", "CosineAnnealing")
    } <= set(SCHEDULERS)
    for name, kind in {**OPTIMIZERS, **SCHEDULERS}.items():
        module, _, attribute = name.rpartition(".")
        owner = torch.optim if module == "torch.optim" else torch.optim.lr_scheduler
        assert getattr(owner, attribute) is kind


def test_names_of_dtypes_become_dtypes():
    with pytest.raises(
        ValueError, match=r"kwargs\.eps: got 'torch\.nn', expected the name of a dtype"
    ):
        make_optimizer({**ADAMW, "kwargs": {"eps": "torch.nn"}}, torch.nn.Linear(1, 1).parameters())


def test_frozen_parameters_are_left_out():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert make_optimizer(ADAMW, model.parameters()).param_groups[0]["params"] == [model.weight]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "os.system", "kwargs": {}},
            r"policy\.optimizer\.name: got 'os\.system'; It can be torch\.optim\.",
        ),
        (
            {"name": "torch.optim.AdmaW", "kwargs": {}},
            r"got 'torch\.optim\.AdmaW'; did you mean torch\.optim\.AdamW\?",
        ),
        (
            {**ADAMW, "kwargs": {"weight_deacy": 0.1}},
            r"policy\.optimizer\.kwargs\.weight_deacy: .* did you mean 'weight_decay'\?",
        ),
        (
            {**ADAMW, "kwargs": {"lr": -1.0}},
            r"policy\.optimizer: torch\.optim\.AdamW refuses .*Invalid",
        ),
        ({**ADAMW, "kwargs": {"lr": "1e-3x"}}, r"policy\.optimizer: torch\.optim\.AdamW refuses"),
    ],
)
def test_bad_optimizers(config, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(config, torch.nn.Linear(1, 1).parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "torch.optim.lr_scheduler.LambdaLR", "kwargs": {}},
            r"policy\.scheduler\.name: got ",
        ),
        (
            [LINEAR, CONSTANT],
            r"got milestones \[\], expected one entry milestones: .* with 1 increasing",
        ),
        ([LINEAR, CONSTANT, {"milestones": [2, 3]}], r"got milestones \[\[2, 3\]\]"),
        ([LINEAR, CONSTANT, STEP, {"milestones": [3, 2]}], r"with 2 increasing step numbers for 3"),
        ([LINEAR, CONSTANT, {"milestones": [0]}], r"with 1 increasing step number for 2"),
        (
            [{**LINEAR, "kwargs": {"strat_factor": 1}}, {"milestones": []}],
            r"policy\.scheduler\.0\.kwargs\.strat_factor: .* did you mean 'start_factor'\?",
        ),
    ],
)
def test_bad_schedules(config, message):
    optimizer = make_optimizer(ADAMW, torch.nn.Linear(1, 1).parameters())
    with pytest.raises(ValueError, match=message):
        make_scheduler(config, optimizer)
