"""What is said of a front and of a gain: what it was measured on, who is marked, what nothing is exported for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from rltune.cli.front_table import BEATEN_MARK, PLUS_MINUS, PROBABILITY, front_view, gain_view, nothing_to_export
from rltune.cli.tables import BREACH_MARK
from rltune.runs.confirmations import Measured
from rltune.runs.fronts import front_as_csv, front_as_dict
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.metrics import OVER_PROMPTS
from rltune.runs.objectives import Fresh, Front, Objectives, Soup, Soups, find_front, nearest
from rltune.runs.results import TrialResult
from tests.cli.test_tables import render, words
from tests.run_folders import result

UNITS = {"brightness": 0.1, "drift": 0.1}
BASE = result(BASE_TRIAL, 0.5, 0.0)


def front_of(*results: TrialResult, not_held: Mapping[str, str] | None = None, num_reused: int | None = None) -> Front:
    front = find_front(results, Objectives(("brightness", "drift")), UNITS)
    assert front is not None
    front = replace(front, num_prompts=16)
    return front if num_reused is None else replace(front, fresh=Fresh(num_reused, 0.25, 0.125, not_held or {}))


def shown(front: Front, width: int = 100) -> tuple[list[str], str]:
    lines = render(front_view(front), width)
    return lines, words(lines)


@pytest.mark.parametrize("width", [60, 100])
def test_fresh_prompts_the_interval_of_the_volume_and_what_no_effect_would_show(width: int) -> None:
    _, text = shown(front_of(BASE, result("001", 0.7, 0.05), num_reused=0), width)
    assert "Measured again on 16 prompts, and noise, that no trial was chosen by." in text
    # above the reference: base (1, 1), trial (3, 0.5)
    assert f"Hypervolume 2 {PLUS_MINUS} 0.25, in standard" in text
    assert f"without any effect it would be 1 {PLUS_MINUS} 0.12." in text


def test_prompts_that_were_used_before_are_not_called_fresh() -> None:
    _, text = shown(front_of(BASE, result("001", 0.7, 0.05), num_reused=16))
    assert "on the 16 prompts that trials were chosen by" in text
    assert "no trial was chosen by" not in text


def test_what_means_hide_stands_in_a_table_of_its_own() -> None:
    trial, known = result("001", 0.7, 0.05), {"eval/domination": 0.5, "eval/domination_se": 0.1, "eval/collapse": 0.0}
    _, text = shown(front_of(BASE, trial))
    assert "domination" not in text  # a run of before
    front = front_of(BASE, replace(trial, metrics={**trial.metrics, **known, "eval/collapse_se": 0.0}))
    lines, text = shown(front, 80)
    row = lines.index(next(line for line in lines if line.split() == ["trial", "domination", "collapse"]))
    # Student's t of 15 degrees of freedom: 2.131; of shares that do not differ nothing is known
    assert lines[row + 1].split() == ["001", f"0.500{PLUS_MINUS}0.213", "0.000"]
    assert "shares of images that are better, and worse, than the base model's" in text
    header, *rows = front_as_csv(front).splitlines()
    assert "gain/drift_se,eval/domination,eval/domination_se,eval/collapse,eval/collapse_se,prompts" in header
    assert ",0.5,0.1,0.0,0.0,16," in rows[0]
    assert "domination" not in front_as_csv(front_of(BASE, trial))


def test_how_probable_each_place_is_and_what_the_search_claimed() -> None:
    front = front_of(BASE, result("001", 0.7, 0.05), result("002", 0.6, 0.02), num_reused=0)
    assert front.fresh is not None
    places = {"001": 0.9985, "002": 0.4321, BASE_TRIAL: 1.0}
    front = replace(front, fresh=replace(front.fresh, non_dominated=places, search_hypervolume=2.5))
    lines, text = shown(front, 80)
    row = lines.index(next(line for line in lines if line.split() == ["trial", PROBABILITY]))
    assert [line.split() for line in lines[row + 1 : row + 3]] == [["001", ">0.99"], ["002", "0.43"]]
    assert "By the numbers that chose its members, which luck raises, it was 2.5." in text
    content = front_as_dict(front)
    assert content["hypervolume_of_search"] == 2.5
    assert [member["p_non_dominated"] for member in content["members"]] == [0.9985, 0.4321, 1.0]
    header, first, *_ = front_as_csv(front).splitlines()
    assert header.split(",").index("p_non_dominated") == first.split(",").index("0.9985")


def test_numbers_that_members_were_chosen_by_are_said_to_be_lucky() -> None:
    _, text = shown(front_of(BASE, result("001", 0.7, 0.05), result("002", 0.6, 0.2)))
    assert "Members were chosen from 2 trials by these very numbers" in text
    assert "without any effect" not in text
    _, text = shown(front_of(BASE, result("001", 0.7, 0.05)))  # of one there was nothing to choose
    assert "luck" not in text


def test_who_does_not_hold_its_place_is_marked_and_told_of() -> None:
    beaten, broken = result("001", 0.9, 0.05), result("002", 0.7, 0.02)
    front = front_of(BASE, beaten, broken, not_held={"001": "002 is at least as good in every objective"}, num_reused=0)
    members = [replace(m, constraints={"drift.max": 0.03}) if m.trial == "002" else m for m in front.members]
    lines, text = shown(replace(front, members=tuple(members)))
    assert [line.split()[:2] for line in lines[1:4]] == [[BEATEN_MARK, "knee"], [BREACH_MARK, "002"], ["000", "base"]]
    assert f"{BEATEN_MARK} does not hold its place on them: 001 (002 is at least as good in every objective)." in text
    assert f"{BREACH_MARK} breaks a constraint, so it is neither picked nor counted: 002 (drift.max by 0.03)." in text


def test_a_unit_that_is_no_deviation_over_prompts_is_named() -> None:
    words_of = {
        "brightness": OVER_PROMPTS,
        "drift": "mean distance of two images of a prompt",
        "other": "of no account",
    }
    _, text = shown(replace(front_of(BASE), unit_words=words_of))
    unit = (
        "in standard deviations of the base model over prompts (but of drift: mean distance of two images of a prompt)"
    )
    assert unit in text
    content = front_as_dict(replace(front_of(BASE), unit_words=words_of))
    assert content["units"]["drift"] == {"size": 0.1, "what": "mean distance of two images of a prompt"}


def test_the_files_say_what_the_numbers_are() -> None:
    why = {"001": "002 is at least as good in every objective"}
    content = front_as_dict(front_of(BASE, result("001", 0.7, 0.05), not_held=why, num_reused=0))
    assert (content["is_measured_again"], content["prompts"], content["fresh_prompts"]) == (True, 16, 16)
    assert content["hypervolume_half_width"] == 0.25
    assert content["hypervolume_without_effect"] == {"mean": 1.0, "half_width": 0.125}
    assert [member["not_held"] for member in content["members"]] == [why["001"], None]
    assert content["best"] == {"brightness": "001", "drift": "001"}
    assert front_as_dict(front_of(BASE, num_reused=16))["fresh_prompts"] == 0
    before = front_as_dict(front_of(BASE))
    assert (before["is_measured_again"], before["fresh_prompts"], before["hypervolume_half_width"]) == (False, 0, None)


@pytest.mark.parametrize(
    ("num_reused", "is_selected", "said", "not_said"),
    [
        (0, True, "They are fresh: the checkpoint was selected by others.", "luck"),
        (0, False, "They are fresh: nothing was selected by them.", "others"),
        (4, True, "the checkpoint was selected by these prompts", "They are fresh"),
        (4, False, "95 % interval over the 4 prompts", "selected"),
        (None, True, "The checkpoint was selected by these very numbers: luck has raised them.", "fresh"),
        (None, False, "95 % interval over the 4 prompts", "luck"),
    ],
)
def test_a_gain_says_whether_it_was_selected_by(
    num_reused: int | None, is_selected: bool, said: str, not_said: str
) -> None:
    text = words(render(gain_view(Measured(result("001", 0.7, 0.01), 4, num_reused, is_selected)), 80))
    assert said in text
    assert not_said not in text


def test_a_single_run_that_breaks_a_constraint_says_so() -> None:
    broken = result("001", 0.7, 0.01, constraints={"diversity.min": 0.1, "drift.max": -0.2})
    assert f"{BREACH_MARK} It breaks a constraint: diversity.min by 0.1." in words(
        render(gain_view(Measured(broken, 4, None, False)), 80)
    )


def test_where_no_trial_keeps_the_constraints_nothing_is_exported_and_the_nearest_is_named() -> None:
    far = result("001", 0.9, 0.5, constraints={"brightness.min": -0.1, "drift.max": 0.3})
    near = result("002", 0.1, 0.1, constraints={"brightness.min": 0.15, "drift.max": -0.1})
    worse = result("003", 0.1, 0.1, constraints={"brightness.min": 0.1, "drift.max": 0.1})
    front = front_of(BASE, far, near, worse)
    assert [member.trial for member in front.members] == [BASE_TRIAL]
    assert front.knee is None
    # in units: 3, 1.5 and 1 + 1; where brightness scatters a tenth as much: 3, 15 and 10 + 1
    assert picked([far, near, worse], UNITS) == "002"
    assert picked([far, near, worse], UNITS | {"brightness": 0.01}) == "001"
    assert picked([far, worse], UNITS) == "003"
    assert picked([BASE, result("004", reason="nan")], UNITS) is None
    said = nothing_to_export(front, nearest([far, near, worse], UNITS), "runs/mix")
    assert said == (
        "Nothing is exported: no trial keeps every constraint; trial 002 is the nearest, it breaks brightness.min by "
        "0.15. To have it all the same: rltune export runs/mix --pick 002"
    )


def picked(results: Sequence[TrialResult], units: Mapping[str, float]) -> str | None:
    found = nearest(results, units)
    return found.trial if found else None


def test_where_the_base_model_is_better_or_all_break_on_fresh_prompts_nothing_is_exported_either() -> None:
    worse = result("001", 0.4, 0.1)
    assert "no trial is better than the base model" in nothing_to_export(front_of(BASE, worse), worse, "runs/mix")
    member = result("002", 0.9, 0.1)
    said = nothing_to_export(front_of(BASE, member, num_reused=0), worse, "runs/mix")
    assert "keeps every constraint on fresh prompts" in said
    assert said.endswith("rltune export runs/mix --pick 002")


def test_a_base_model_that_breaks_a_bound_is_marked_and_gives_way_to_trials_that_keep_it() -> None:
    base = result(BASE_TRIAL, 0.5, 0.0, constraints={"brightness.min": 0.2})
    alone = front_of(base, result("001", 0.6, 0.2, constraints={"brightness.min": 0.1}))
    lines, text = shown(alone)
    assert any(line.split()[:3] == [BREACH_MARK, "000", "base"] for line in lines)
    assert "neither picked nor counted: 000 (brightness.min by 0.2)" in text
    assert alone.hypervolume == 0.0  # nothing of it counts
    assert "what breaks a constraint covers nothing" in text
    kept = front_of(base, result("001", 0.75, 0.05, constraints={"brightness.min": -0.05}))
    assert [member.trial for member in kept.members] == ["001"]  # the base has less drift, and does not keep the bound
    assert kept.hypervolume == pytest.approx(3.5 * 0.5)


def test_soups_stand_below_the_trials_with_what_they_are_made_of() -> None:
    front = front_of(BASE, result("001", 0.7, 0.05), num_reused=0)
    assert "soup" not in shown(front)[1].lower()
    kept, lost = result("soup-1", 0.65, 0.04, values={}), result("soup-2", 0.64, 0.05, values={})
    shares = {"001": 0.25, "002": 0.75}
    soups = Soups((Soup(kept, shares, "", 0.5), Soup(lost, shares, "soup-1 is better", 0.1)), 2.5, 0.3, 0.25)
    lines, text = shown(replace(front, soups=soups), 80)
    assert [line.split() for line in lines if line.startswith("soup-")] == [
        ["soup-1", "0.650", f"+0.150{PLUS_MINUS}0.011", "0.040", f"+0.040{PLUS_MINUS}0.032"],
        ["soup-1", "0.25", "x", "001", "+", "0.75", "x", "002", "0.50"],
    ]
    assert "Soups: 2 mixtures of LoRAs of the front, not trained; one of them is on the front" in text
    assert f"With all of them the hypervolume is 2.5, +0.5 {PLUS_MINUS} 0.25." in text
