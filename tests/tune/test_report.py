# SPDX-License-Identifier: Apache-2.0
"""The HTML report of a study: what it says, also where there is little to say."""

import re

import optuna
import pytest
from bs4 import BeautifulSoup
from optuna.trial import TrialState, create_trial
from studies import ACCURACY, AVERAGE, BATCH, KL, LR, SFT, SPACE, make_study, spec_of

from nemo_rl_ref.tune._reading import Reading
from nemo_rl_ref.tune.report import render, write_report

SECTIONS = [
    "best", "searched", "history", "failures", "curves", "importances", "slices", "parallel",
    "trials",
]  # fmt: skip


def page(study, **options):
    text = render(study, **options).replace("<wbr>", "")  # where a line may end
    return BeautifulSoup(text, "html.parser")


def words(soup, section=None):
    part = soup.find(id=section).parent if section else soup
    return " ".join(part.get_text(" ").split())


def row(table, start):
    """The cells of the row that begins with a text."""
    for line in table.find_all("tr"):
        cells = [cell.get_text() for cell in line.find_all(["td", "th"])]
        if cells and cells[0] == start:
            return cells
    raise AssertionError(f"no row {start!r}")


@pytest.fixture(scope="module")
def full():
    """A study with everything: 60 trials, failures, pruned ones, conditionals, ties."""
    return make_study(60, failing=lambda n: n % 10 == 7, pruning=lambda n: n % 10 in (2, 3), seed=1)


@pytest.fixture(scope="module")
def report(full):
    return page(full)


def test_sections_and_links_to_them(report):
    assert [h.get("id") for h in report.find_all("h2")] == SECTIONS
    assert [a["href"] for a in report.nav.find_all("a")] == [f"#{name}" for name in SECTIONS]


def test_it_asks_nothing_of_the_network(full):
    text = render(full)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", text)
    assert not re.search(r"url\((?![\"']?#)|@import|<script|<link|<iframe|<object", text)
    assert "default-src 'none'" in text
    assert "http" not in re.sub(r'http-equiv="', "", text)


def test_best_trial_with_override_line_and_yaml(full, report):
    best = full.best_trial
    text = words(report, "best")
    assert f"Trial {best.number}, chosen as the highest {ACCURACY}" in text
    assert f"{LR}={best.params[LR]!r}" in text
    assert f"lr: {best.params[LR]!r}" in text  # the YAML
    assert "python -m nemo_rl_ref.run_dpo --config configs/dpo.yaml dpo.val_period=20" in text


def test_what_was_searched(report):
    text = words(report, "searched")
    assert "configs/dpo.yaml" in text and "more is better" in text
    table = report.find(id="searched").parent.find_all("table")[1]
    assert row(table, LR)[1:] == ["1e-06 to 0.01", "yes", "all trials"]
    assert re.fullmatch(r"\d+ trials", row(table, AVERAGE)[3])
    assert "dpo.max_num_steps" in text and "policy.train_micro_batch_size" in text  # tied, fixed
    assert "42 finished, 12 pruned, 6 failed" in text


def test_failures_are_listed_and_never_counted_as_values(full, report):
    text = words(report, "failures")
    assert "6 trials failed" in text
    table = report.find(id="failures").parent.table
    assert row(table, "out of memory")[1:] == ["3", "17, 37, 57"]
    # Where only numbers differ, it is one cause.
    assert row(table, "step 7: loss nan, gradient norm nan")[1:] == ["3", "7, 27, 47"]
    numbers = [t.number for t in full.trials if t.state is TrialState.FAIL]
    trials = report.find(id="trials").parent.table
    for number in numbers:
        assert row(trials, str(number))[1] == "—"
    reading = Reading(full)
    assert not {t.number for t in reading.ranked()} & set(numbers)
    assert len(reading.running_best(0)) == 42


def test_pruned_trials_have_a_last_value_that_is_no_result(full, report):
    text = words(report, "curves")
    assert "12 trials were pruned" in text and "not a result" in text
    pruned = next(t for t in full.trials if t.state is TrialState.PRUNED)
    table = report.find(id="curves").parent.find_all("table")[1]
    assert row(table, str(pruned.number))[1:] == ["40", f"{pruned.intermediate_values[40]:.4g}"]
    # Optuna keeps the last intermediate value of a pruned trial as its value; it is no result here.
    assert pruned.value is not None
    trials = report.find(id="trials").parent.table
    assert row(trials, str(pruned.number))[1] == "—"


def test_a_better_pruned_value_is_not_the_best(full):
    study = optuna.create_study(direction="maximize")
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    for state, value in ((TrialState.COMPLETE, 0.5), (TrialState.PRUNED, 0.9)):
        study.add_trial(
            create_trial(
                state=state, value=value, params={"x": 0.5}, distributions=space,
                intermediate_values={1: value},
            )
        )  # fmt: skip
    assert "Best: trial 0 with value 0.5" in words(page(study))


def test_every_figure_has_words(report):
    figures = report.find_all("figure")
    assert len(figures) >= 8
    for figure in figures:
        assert len(figure.figcaption.get_text()) > 30
        assert figure.svg["aria-hidden"] == "true"


def test_figures_take_their_colours_from_the_page(report):
    for svg in report.find_all("svg"):
        colours = set(re.findall(r"#[0-9a-f]{6}\b", str(svg)))
        assert colours == set(), colours
    style = report.style.get_text()
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", str(report)))
    assert used <= set(re.findall(r"--([a-z0-9-]+):", style))
    dark = style[style.index("prefers-color-scheme: dark") :]
    assert {"ground", "ink", "line-0", "line-3"} <= set(re.findall(r"--([a-z0-9-]+):", dark))


def test_ids_are_unique(full):
    ids = re.findall(r'\sid="([^"]+)"', render(full))
    assert len(ids) == len(set(ids))


def test_importances_are_compared_with_chance(full, report):
    found = Reading(full).importances(0)
    assert next(iter(found.shares)) == LR
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares[LR] > found.chance[LR]
    assert found.shares[SFT] <= found.chance[SFT]  # without any influence
    table = report.find(id="importances").parent.table
    assert row(table, LR)[3] == "yes" and row(table, SFT)[3] == "no"
    assert "Only 5 trials" not in words(report, "importances")


def test_importances_of_few_trials_come_with_a_warning():
    text = words(page(make_study(30)), "importances")
    assert "Only 3 trials in the best tenth" in text


def test_slices_say_where_the_best_are(full, report):
    captions = [f.figcaption.get_text() for f in report.find(id="slices").parent.find_all("figure")]
    lr = next(text for text in captions if text.startswith(LR))
    low, high = map(float, re.search(r"lies from (\S+) to (\S+)\.$", lr).groups())
    tenth = [t.params[LR] for t in Reading(full).best_tenth()]
    assert (low, high) == pytest.approx((min(tenth), max(tenth)), rel=0.01)
    batch = next(text for text in captions if text.startswith(BATCH))
    assert re.search(r"16: \d+ trials, median 0\.\d+, best 0\.\d+; 32: ", batch)


# Studies with little in them


def test_without_trials():
    text = words(page(make_study(0)))
    assert "The study has no trials yet." in text
    assert "no trial is complete, so there is no best one" in text
    assert "No trial has a parameter yet." in text


@pytest.mark.parametrize("trials", [1, 2])
def test_with_one_or_two_trials(trials):
    soup = page(make_study(trials))
    text = words(soup)
    assert "Importances need at least 20 finished trials" in text
    assert ("Parallel coordinates need two finished trials." in text) == (trials == 1)
    assert f"{trials} trial{'s' * (trials > 1)} finished." in text


def test_where_all_failed():
    text = words(page(make_study(4, failing=lambda n: True)))
    assert "4 trials failed" in text and "so there is no best one" in text
    assert "Best: trial" not in text


def test_with_one_parameter():
    study = make_study(40, spec_of({LR: SPACE[LR]}))
    text = words(page(study))
    assert "Importances compare parameters, and fewer than two of them vary." in text
    assert f"{LR}={study.best_trial.params[LR]!r}" in text


def test_where_all_values_are_the_same():
    study = optuna.create_study()
    space = {n: optuna.distributions.FloatDistribution(0, 1) for n in ("x", "y")}
    for i in range(25):
        params = {"x": i / 25, "y": 1 - i / 25}
        study.add_trial(create_trial(value=1.0, params=params, distributions=space))
    assert "no parameter can be important" in words(page(study))


def test_a_study_that_is_not_of_this_package():
    study = optuna.create_study(study_name="theirs")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    text = words(page(study))
    assert "study 'theirs' has no attribute 'spec'" in text
    assert "No trial reported an intermediate value" in text


def test_a_configuration_that_is_gone_is_said_and_nothing_else_is_lost(tmp_path):
    study = make_study(3)
    study.set_user_attr("spec", {**study.user_attrs["spec"], "config": str(tmp_path / "gone.yaml")})
    text = words(page(study), "best")
    assert "No YAML and no override line" in text and "gone.yaml" in text
    assert f"{study.best_trial.params[LR]:.4g}" in text


def test_infinite_and_huge_values():
    study = optuna.create_study()
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    for i, value in enumerate([1e-3, 5.0, 1e6, float("inf")]):
        study.add_trial(create_trial(value=value, params={"x": i / 4}, distributions=space))
    assert "Best: trial 0 with value 0.001" in words(page(study))


def test_names_and_reasons_are_escaped():
    study = optuna.create_study(study_name="<b>&")
    trial = study.ask({"x": optuna.distributions.CategoricalDistribution(["<script>", "y&z"])})
    trial.set_user_attr("failure", "<img src=x onerror=alert(1)>")
    study.tell(trial, state=TrialState.FAIL)
    study.add_trial(
        create_trial(value=1.0, params={"x": "<script>"}, distributions=trial.distributions)
    )
    text = render(study)
    assert "<script>" not in text and "<img" not in text and "<b>&" not in text


# Several objectives


@pytest.fixture(scope="module")
def two():
    objectives = (f"{ACCURACY}:maximize", f"{KL}:minimize")
    return make_study(50, spec_of(objectives=objectives), failing=lambda n: n == 3)


def test_the_front_is_shown_and_one_trial_chosen_by_a_stated_rule(two):
    soup = page(two)
    assert "pareto" in [h["id"] for h in soup.find_all("h2")]
    front = {str(t.number) for t in two.best_trials}
    table = soup.find(id="pareto").parent.table
    assert {line.td.get_text() for line in table.tbody.find_all("tr")} == front
    assert "nearest to the ideal point" in words(soup, "best")
    assert f"{len(front)} trials of 49 finished ones" in words(soup, "pareto")
    assert KL in words(soup, "importances") and ACCURACY in words(soup, "importances")


def test_a_rule_for_the_front(two):
    text = words(page(two, rule=f"{ACCURACY} where {KL} <= 0.02"), "best")
    kept = [t for t in two.best_trials if t.values[1] <= 0.02]
    best = max(kept, key=lambda t: t.values[0])
    assert f"Trial {best.number}, chosen as the best {ACCURACY} on the Pareto front" in text


def test_a_rule_that_cannot_be_read_is_an_error(two, tmp_path):
    with pytest.raises(ValueError, match="got 'speed'"):
        write_report(two, tmp_path / "report.html", rule="speed")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_written_whole(two, tmp_path):
    path = write_report(two, tmp_path / "a folder" / "report.html")
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
