# SPDX-License-Identifier: Apache-2.0
"""The HTML report of a study: what it says, also where there is little to say."""

import base64
import re

import matplotlib
import optuna
import pytest
from bs4 import BeautifulSoup
from matplotlib import pyplot
from optuna.trial import TrialState, create_trial
from studies import ACCURACY, BATCH, KL, LR, SPACE, make_study, spec_of

from nemo_rl_ref.tune import make_spec
from nemo_rl_ref.tune.outcome.best import best_from
from nemo_rl_ref.tune.outcome.report import failures_of, render, write_report
from nemo_rl_ref.tune.outcome.write import write_outcome

SECTIONS = [
    "Best configuration", "Failed trials", "History", "Which keys matter", "Value against each key",
    "Intermediate values",
]  # fmt: skip


def page(study, **options):
    return BeautifulSoup(render(study, **options), "html.parser")


def words(soup, section=None):
    part = soup.find("h2", string=section).parent if section else soup
    return " ".join(part.get_text(" ").split())


def pictures(soup, section):
    """The figures of a section, as the text of their SVG."""
    images = soup.find("h2", string=section).parent.find_all("img")
    return [base64.b64decode(image["src"].partition(",")[2]).decode() for image in images]


@pytest.fixture(scope="module")
def full():
    """A study with everything: 60 trials, failures, pruned ones, conditionals, ties."""
    return make_study(60, failing=lambda n: n % 10 == 7, pruning=lambda n: n % 10 in (2, 3), seed=1)


@pytest.fixture(scope="module")
def text(full):
    """Its report; drawing it leaves Matplotlib as it was."""
    before, open_figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    found = render(full)
    assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == open_figures
    return found


@pytest.fixture(scope="module")
def report(text):
    return BeautifulSoup(text, "html.parser")


def test_it_has_its_sections_and_a_line_that_counts_the_trials(report):
    assert [heading.get_text() for heading in report.find_all("h2")] == SECTIONS
    assert "Trials: 42 finished, 12 pruned, 6 failed; 90 s of training in all." in words(report)


def test_it_asks_nothing_of_the_network(text):
    assert not re.search(r'(src|href)\s*=\s*["\'](?!#|data:)', text)
    assert not re.search(r"url\(|@import|<script|<link|<iframe|<object", text)
    assert "default-src 'none'" in text
    assert "http" not in re.sub(r'http-equiv="', "", text)


def test_it_has_the_best_trial_its_override_line_and_yaml(full, report):
    best = full.best_trial
    text = words(report, "Best configuration")
    assert f"Trial {best.number}, chosen as the highest {ACCURACY}" in text
    assert f"{LR}={best.params[LR]!r}" in text
    assert f"lr: {best.params[LR]!r}" in text  # the YAML
    assert "python -m nemo_rl_ref.run_dpo --config configs/dpo.yaml dpo.val_period=20" in text


def test_figures_are_optunas_and_say_what_they_show(full, report):
    (history,) = pictures(report, "History")
    (importances,) = pictures(report, "Which keys matter")
    (curves,) = pictures(report, "Intermediate values")
    slices = pictures(report, "Value against each key")
    keys = {key for trial in full.trials for key in trial.params}
    assert len(slices) == len(keys)
    for svg in (history, *slices):
        assert svg.startswith("<?xml") and f">{ACCURACY}<" in svg
    assert ">Intermediate Value<" in curves and "Trial" not in curves, "a legend of all trials"
    assert LR in importances and BATCH in importances
    assert any(LR in svg for svg in slices)
    for figure in report.find_all("figure"):
        assert figure.img["alt"] == figure.figcaption.get_text() and len(figure.img["alt"]) > 30


def test_failures_are_listed_by_cause(full, report):
    rows = report.find("h2", string="Failed trials").parent.find_all("tr")[1:]
    cells = {row.td.get_text(): [c.get_text() for c in row.find_all("td")[1:]] for row in rows}
    assert cells["out of memory"] == ["3", "17, 37, 57"]
    # Where only numbers differ, it is one cause.
    assert cells["step 7: loss nan, gradient norm nan"] == ["3", "7, 27, 47"]


def test_a_killed_trial_is_listed_with_the_number_it_has_now():
    study = make_study(1)
    for state, attributes in (
        (TrialState.FAIL, {}),
        (TrialState.COMPLETE, {"failed_trial": 1, "retry_history": [1]}),
    ):
        value = 0.5 if state is TrialState.COMPLETE else None
        study.add_trial(create_trial(state=state, value=value, system_attrs=attributes))
    assert failures_of(study) == [
        ("its process died or was interrupted; run again as trial 2", [1])
    ]


# Studies with little in them


def test_without_trials_it_says_so():
    text = words(page(make_study(0)))
    assert "Trials: no trials;" in text
    assert "no trial is complete, so there is no best one." in text
    assert "No trial has finished with a value" in text


def test_few_trials_have_no_importances():
    text = words(page(make_study(1, spec_of({LR: SPACE[LR]}))))
    assert "Importances need at least 20 finished trials; there are 1." in text
    assert "Trials: 1 finished" in text


def test_where_all_failed_it_lists_them():
    text = words(page(make_study(4, failing=lambda n: True)))
    assert "Trials: 4 failed" in text and "so there is no best one" in text


def test_one_key_has_no_importances():
    study = make_study(25, spec_of({LR: SPACE[LR]}))
    text = words(page(study))
    assert "Importances compare keys, and fewer than two of them vary" in text
    assert f"{LR}={study.best_trial.params[LR]!r}" in text


def test_a_study_that_is_not_of_this_package_is_refused():
    study = optuna.create_study(study_name="theirs")
    with pytest.raises(ValueError, match="study 'theirs' has no attribute 'spec'"):
        render(study)


def test_a_configuration_that_is_gone_is_said_and_nothing_else_is_lost(tmp_path):
    study = make_study(3, spec_of({LR: SPACE[LR]}))
    study.set_user_attr("spec", {**study.user_attrs["spec"], "config": str(tmp_path / "gone.yaml")})
    soup = page(study)
    assert f"Trial {study.best_trial.number} is the best, but has no override line" in words(soup)
    assert "gone.yaml" in words(soup, "Best configuration") and pictures(soup, "History")


def test_names_and_reasons_are_escaped():
    study = make_study(0, name="<b>&")
    trial = study.ask()
    trial.set_user_attr("failure", "<img src=x onerror=alert(1)>")
    study.tell(trial, state=TrialState.FAIL)
    text = render(study)
    assert "<img src=x" not in text and "<b>&" not in text and "&lt;b&gt;&amp;" in text


# Several objectives


@pytest.fixture(scope="module")
def two():
    objectives = (f"{ACCURACY}:maximize", f"{KL}:minimize")
    space = {key: SPACE[key] for key in (LR, BATCH)}
    return make_study(30, spec_of(space, objectives), failing=lambda n: n == 3)


def test_the_front_is_shown_and_one_trial_chosen_by_a_stated_rule(two):
    soup = page(two)
    (front,) = pictures(soup, "Pareto front")
    assert ACCURACY in front and KL in front
    assert f"the front has {len(two.best_trials)} trials" in words(soup, "Pareto front")
    assert "nearest to the ideal point" in words(soup, "Best configuration")
    assert len(pictures(soup, "History")) == len(pictures(soup, "Which keys matter")) == 2


def test_a_rule_that_cannot_be_read_is_an_error(two, tmp_path):
    with pytest.raises(ValueError, match="got 'speed'"):
        write_report(two, tmp_path / "report.html", rule="speed")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_written_whole(tmp_path):
    path = write_report(make_study(0), tmp_path / "a folder" / "report.html")
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_values_are_text_and_neither_markup_nor_formulas(tmp_path):
    """In the page, in its figures, in the comment of best.yaml, in what is printed at the end."""
    odd = [
        "$\\frac{x$", "$x_$", "[/INST]", "[red]", "<script>alert(1)</script>", "100%", "{a}", "a_b^c",
        "\"q'\"", "two\nlines: x", "\\",
    ]  # fmt: skip
    space = {LR: {"log_uniform": [1e-6, 1e-2]}, "policy.tokenizer.name": {"choice": odd}}
    spec = make_spec(
        "dpo", "configs/dpo.yaml", space, [ACCURACY], ["policy.model_name='<b>$m$</b>'"]
    )
    study = make_study(40, spec, name="<i>$s$</i>")
    said = write_outcome(study, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and "<b>" not in text and "<i>" not in text
    soup = BeautifulSoup(text, "html.parser")
    drawn = "".join(pictures(soup, "Value against each key"))
    for value in ("$x_$", "[/INST]", "100%", "{a}", "a_b^c"):
        assert value in drawn, value
    assert "&lt;script&gt;" in drawn
    assert "no best" not in "\n".join(said)
    for trial in study.trials:
        assert best_from(study, trial).config["policy"]["tokenizer"]["name"] in odd
