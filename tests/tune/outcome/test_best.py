# SPDX-License-Identifier: Apache-2.0
"""The best configuration of a study: which trial, and that YAML and override line give it back."""

import os
import shlex
import stat

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from nemo_rl_files import check_with_nemo_rl
from omegaconf import OmegaConf
from optuna.trial import TrialState, create_trial
from studies import (
    ACCURACY,
    AVERAGE,
    BATCH,
    BETA,
    KL,
    LR,
    MICRO,
    SFT,
    make_study,
    spec_of,
)

from nemo_rl_ref.tune import make_spec
from nemo_rl_ref.tune.outcome import best as module
from nemo_rl_ref.tune.outcome.best import (
    NoBest,
    best_of,
    choose,
    resolved_config,
    write_yaml,
)
from nemo_rl_ref.tune.outcome.write import write_outcome
from nemo_rl_ref.utils.config import OverridesError, load_config, parse_hydra_overrides


def nested(config, path):
    for part in path.split("."):
        config = config[part]
    return config


@pytest.fixture(scope="module")
def study():
    return make_study(12, failing=lambda n: n == 1, pruning=lambda n: n == 2)


def test_the_yaml_loads_as_configuration_plus_overrides(study, tmp_path):
    best = best_of(study)
    path = write_yaml(best, tmp_path / "new" / "best.yaml")
    loaded = OmegaConf.to_container(load_config(path))
    overrides = ["dpo.val_period=20", *shlex.split(best.override_line)]
    expected = OmegaConf.to_container(
        parse_hydra_overrides(load_config("configs/dpo.yaml"), overrides), resolve=True
    )
    assert loaded == expected == best.config
    for key, value in study.best_trial.user_attrs["values"].items():
        assert nested(loaded, key) == value
    assert loaded["dpo"]["val_period"] == 20  # what all trials shared
    # An interpolation follows what the trial set.
    assert loaded["policy"]["tokenizer"]["name"] == loaded["policy"]["model_name"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_override_line_parses_with_hydra_and_loads_nemo_rls_dpo_yaml(study):
    best = best_of(study)
    parsed = OverridesParser.create().parse_overrides(shlex.split(best.override_line))
    assert {o.key_or_group: o.value() for o in parsed} == study.best_trial.user_attrs["values"]
    config = check_with_nemo_rl(best.override_line, "dpo")
    for key, value in study.best_trial.user_attrs["values"].items():
        assert nested(config, key) == value
    assert config["policy"]["model_name"].startswith("meta-llama/")  # it is NeMo RL's file


def test_with_a_checkout_of_nemo_rl_its_own_file_is_taken(study):
    checkout = os.environ.get("NEMO_RL_CHECKOUT")
    if not checkout:
        pytest.skip("NEMO_RL_CHECKOUT does not name a checkout of NeMo RL")
    ours = check_with_nemo_rl(best_of(study).override_line, "dpo")
    theirs = check_with_nemo_rl(best_of(study).override_line, "dpo", checkout)
    assert ours == theirs


def test_the_file_of_the_checkout_given(study, tmp_path):
    folder = tmp_path / "examples" / "configs"
    folder.mkdir(parents=True)
    keys = list(study.best_trial.user_attrs["values"])
    config = OmegaConf.create({})
    for key in keys:
        OmegaConf.update(config, key, 0, force_add=True)
    OmegaConf.save(config, folder / "dpo.yaml")
    loaded = check_with_nemo_rl(best_of(study).override_line, "dpo", tmp_path)
    assert nested(loaded, LR) == study.best_trial.params[LR]


@pytest.mark.parametrize("algorithm", list(module.NEMO_RL_CONFIGS))
def test_nemo_rls_file_of_every_algorithm_is_in_the_manifest(algorithm):
    config = check_with_nemo_rl(f"{LR}=1e-5" if algorithm != "ppo" else "", algorithm)
    assert algorithm in config


@pytest.mark.parametrize("line", ["dpo.no_such_key=1", "dpo.seed=[1", "dpo.seed=1,2"])
def test_a_line_that_nemo_rl_would_refuse_is_refused(line):
    with pytest.raises(OverridesError):
        check_with_nemo_rl(line, "dpo")


@pytest.mark.parametrize("key", ["policy.optimizer.kwargs.amsgrad", "policy.logprob_batch_size"])
def test_keys_that_a_file_lacks_are_added(key):
    """The first is in no file, the second in ours and not in NeMo RL's: both need ``++``."""
    choices = [True, False] if key.endswith("amsgrad") else [32, 64]
    space = {LR: {"log_uniform": [1e-5, 1e-3]}, key: {"choice": choices}}
    spec = make_spec("dpo", "configs/dpo.yaml", space, [ACCURACY], launcher="nemo-rl")
    best = best_of(make_study(3, spec))
    assert f"++{key}=" in best.override_line
    assert f" {LR}=" in f" {best.override_line}"
    assert nested(check_with_nemo_rl(best.override_line, "dpo"), key) == best.values[key]


def test_conditional_and_tied_keys(study):
    trials = [t for t in study.trials if t.state is TrialState.COMPLETE]
    for wanted in (0, 0.1):
        trial = next(t for t in trials if t.user_attrs["values"][SFT] == wanted)
        best = module.best_from(study, trial)
        assert (f"{AVERAGE}=" in best.override_line) == (wanted == 0.1)
        config = best.config["policy"]
        assert config["train_global_batch_size"] % config["train_micro_batch_size"] == 0
        assert best.values[MICRO] == config["train_micro_batch_size"] and MICRO not in trial.params
        assert best.values[BATCH] == config["train_global_batch_size"]


def test_the_earlier_of_equal_trials_and_never_a_pruned_or_failed_one():
    study = optuna.create_study(direction="maximize")
    study.set_user_attr("spec", spec_of().to_dict())
    for state, value in (
        (TrialState.COMPLETE, 1.0), (TrialState.COMPLETE, 2.0), (TrialState.COMPLETE, 2.0),
        (TrialState.PRUNED, 9.0), (TrialState.FAIL, None),
    ):  # fmt: skip
        study.add_trial(create_trial(state=state, value=value))
    assert choose(study)[0].number == 1


def test_a_study_without_a_complete_trial_has_no_best():
    with pytest.raises(NoBest, match="no trial is complete"):
        choose(make_study(2, failing=lambda n: True))


def test_the_configuration_of_the_search_must_still_be_there(study, tmp_path):
    """A file that was edited since is not what was searched."""
    changed = make_study(2)
    base = {**changed.user_attrs["base"], "policy.max_grad_norm": 3.0}
    changed.set_user_attr("base", base)
    with pytest.raises(ValueError, match=r"policy\.max_grad_norm: 3\.0 then, 1\.0 now"):
        best_of(changed)


def test_yaml_that_loads_differently_is_refused(study, monkeypatch):
    monkeypatch.setattr(module, "_dump", lambda config: "policy: {}\n")
    with pytest.raises(ValueError, match="does not load as its configuration"):
        best_of(study)


# Several objectives


def front_of(points):
    """A study that maximizes the first objective and minimizes the second."""
    objectives = (f"{ACCURACY}:maximize", f"{KL}:minimize")
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.set_user_attr("spec", spec_of(objectives=objectives).to_dict())
    for point in points:
        study.add_trial(create_trial(values=point))
    return study


def test_the_earlier_of_equal_trials_of_a_front_that_a_rule_chooses_from():
    study = front_of([(0.7, 0.2), (0.8, 0.3), (0.8, 0.3)])
    assert choose(study, f"{ACCURACY} where {KL} <= 1")[0].number == 1


POINTS = [(0.5, 0.0), (0.8, 0.1), (0.85, 0.5), (0.9, 1.0), (0.7, 0.9)]


@pytest.mark.parametrize(
    ("rule", "number"),
    [
        (None, 1),
        ("knee", 1),
        (ACCURACY, 3),
        (KL, 0),
        (f"{ACCURACY} where {KL} <= 0.5", 2),
        (f"{ACCURACY} where {KL}<=0.5 and {KL}>=0.05 and {ACCURACY} <= 0.84", 1),
        (f"{KL} where {ACCURACY} >= 0.82", 2),
    ],
)
def test_rules(rule, number):
    trial, how = choose(front_of(POINTS), rule)
    assert trial.number == number
    assert ("ideal point" in how) if rule in (None, "knee") else (rule.split()[0] in how)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("val:speed", "got 'val:speed'"),
        (f"{ACCURACY} where {KL} < 0.5", "expected OBJECTIVE <= NUMBER"),
        (f"{ACCURACY} where {KL} <= much", "expected OBJECTIVE <= NUMBER"),
        (f"{ACCURACY} where {KL} <= -1", "no trial of the front keeps"),
    ],
)
def test_rules_that_cannot_be_kept(rule, message):
    with pytest.raises(ValueError, match=message):
        choose(front_of(POINTS), rule)


def test_the_knee_scales_objectives():
    """The same front in other units has the same knee."""
    scaled = [(1000 * a, b / 1000) for a, b in POINTS]
    assert choose(front_of(scaled))[0].number == 1


def test_a_front_of_one_point():
    assert choose(front_of([(0.5, 0.5)]))[0].number == 0


def test_a_rule_for_one_objective_is_refused(study):
    with pytest.raises(ValueError, match="has one objective"):
        choose(study, f"{ACCURACY} where {KL} <= 1")


# Files


def test_resolved_config_has_no_interpolations():
    assert "${" not in str(resolved_config("configs/dpo.yaml", [f"{BETA}=0.2"]))


# The age of a metric


def test_best_report_and_summary_say_at_which_step_a_value_was_measured(tmp_path):
    """Trials may end at different steps: the length is searched, or a run stops early."""
    study = make_study(4)
    said = "\n".join(write_outcome(study, tmp_path))
    assert f"{best_of(study).scores[ACCURACY]:.6g} at step 60, the highest" in said
    assert " at step 60." in best_of(study).yaml.splitlines()[0]
    assert "different steps" not in said + (tmp_path / "report.html").read_text()
    study.add_trial(
        create_trial(
            value=0.1, params=study.trials[0].params, distributions=study.trials[0].distributions,
            user_attrs={**study.trials[0].user_attrs, "steps": 20},
        )
    )  # fmt: skip
    note = "The trials ended at different steps, 20 to 60"
    assert note in "\n".join(write_outcome(study, tmp_path))
    assert note in (tmp_path / "report.html").read_text()


def test_a_best_value_that_other_trials_have_too_is_called_a_tie():
    """Such as an accuracy on few pairs: the search did not decide between them."""
    study = make_study(3)
    best = study.best_trial
    for _ in range(2):
        study.add_trial(
            create_trial(
                value=best.value, params=best.params, distributions=best.distributions,
                user_attrs=best.user_attrs,
            )
        )  # fmt: skip
    how = f"the highest {ACCURACY}, which 2 other trials have too, the earliest"
    assert best_of(study).rule == how and best_of(study).trial == best.number
