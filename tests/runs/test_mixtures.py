"""Soups made by hand: which are on the front, what they add to it, and what is written of them."""

import csv
import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from rltune.pareto.fresh import fresh_volume
from rltune.records import to_record
from rltune.runs.confirmations import Confirmation
from rltune.runs.fronts import front_as_csv, front_as_dict, read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.metrics import summarise
from rltune.runs.mixtures import Mixture, read_mixtures, reported_front
from rltune.runs.objectives import Front, Objectives, find_front
from rltune.runs.store import append_line
from tests.run_folders import experiment, result, write_run

UNITS = {"brightness": 0.1, "drift": 1.0}
"""With these every trial lies above the reference point, so that each counts in a hypervolume."""
PROMPTS = tuple(f"prompt {i}" for i in range(4))
BASE = {"brightness": np.array([0.1, 0.7, 0.4, 0.4]), "drift": np.zeros(4)}
NOISE = np.array([0.02, -0.01, 0.0, -0.01])
"""Of prompts; together 0."""
TRIALS = {"001": (1.0, 0.5), "002": (0.8, 0.1)}
"""Brightness, which is to rise, and drift, which is to fall, by the search and on average on fresh prompts."""


def values(brightness: float, drift: float) -> dict[str, np.ndarray]:
    return {"brightness": BASE["brightness"] + brightness - 0.4 + NOISE, "drift": drift + 0.1 * NOISE}


def confirmation(trial: str, values_: dict[str, np.ndarray]) -> Confirmation:
    rows = {name: values_P.tolist() for name, values_P in values_.items()}
    return Confirmation(trial, "", 4, summarise(values_, BASE), values=rows, prompts=PROMPTS)


CONFIRMATIONS = [
    confirmation(BASE_TRIAL, BASE),
    *(confirmation(trial, values(*point)) for trial, point in TRIALS.items()),
]


def mixture(name: str, brightness: float, drift: float, **weights: float) -> Mixture:
    row = confirmation(name, values(brightness, drift))
    shares = {trial.removeprefix("t"): weight for trial, weight in weights.items()} or {"001": 0.5, "002": 0.5}
    return Mixture(
        name, shares, dict.fromkeys(shares, ""), 4, metrics=row.metrics, values=row.values, prompts=row.prompts
    )


def front_with(*mixtures: Mixture, **sections: object) -> Front:
    rows = [result(BASE_TRIAL, 0.4, 0.0), *(result(trial, *point) for trial, point in TRIALS.items())]
    searched = find_front(rows, Objectives(("brightness", "drift")), UNITS)
    assert searched is not None
    return reported_front(searched, experiment(**sections), CONFIRMATIONS, mixtures)


def test_a_soup_is_on_the_front_unless_something_has_beaten_it() -> None:
    front = front_with(
        mixture("soup-1", 0.92, 0.2),
        mixture("soup-2", 0.79, 0.3),  # below 002
        mixture("soup-3", 0.91, 0.25),  # below soup-1
        mixture("soup-4", 0.3, 0.01),  # below the base model
        mixture("001@0.5", 0.95, 0.2, t001=0.5),  # a strength is no soup
    )
    assert front.soups is not None
    assert [soup.name for soup in front.soups.members] == ["soup-1"]
    better = "is at least as good in every objective"
    assert {soup.name: soup.beaten for soup in front.soups.every} == {
        "soup-1": "",
        "soup-2": f"002 {better}",
        "soup-3": f"soup-1 {better}",
        "soup-4": f"000 {better}",
    }
    (soup,) = front.soups.members
    assert soup.recipe == "0.5 x 001 + 0.5 x 002"
    assert soup.non_dominated == 1.0  # what prompts leave open is a hundredth of the distances
    assert front.soups.every[1].non_dominated == 0.0
    # members, knee and hypervolume are those of the search, measured again, as without soups
    alone = front_with()
    assert alone.soups is None
    assert replace(front, soups=None, reference_D=alone.reference_D, unit_D=alone.unit_D) == alone


def test_a_soup_that_breaks_a_constraint_is_not_on_the_front() -> None:
    front = front_with(mixture("soup-1", 0.92, 0.2), constraints={"drift": {"max": 0.15}})
    assert front.soups is not None
    assert front.soups.members == ()
    assert front.soups.every[0].beaten == "breaks drift.max by 0.05"
    assert front.soups.hypervolume == pytest.approx(front.hypervolume)


def test_the_hypervolume_counts_a_soup_where_it_was_to_be_expected() -> None:
    soup = mixture("soup-1", 0.92, 0.2, t001=0.75, t002=0.25)
    front = front_with(soup, mixture("soup-9", 0.99, 0.4, t001=0.5, t777=0.5))  # 777 is on no front: no place is known
    assert front.soups is not None
    units = [(6.0, -0.5), (4.0, -0.1), (5.5, -0.4), (0.0, 0.0)]  # of the search: 001, 002, three quarters, the base
    gains = [(values(*point)["brightness"] - BASE["brightness"], -values(*point)["drift"]) for point in
             (*TRIALS.values(), (0.92, 0.2))]  # fmt: skip
    gains_PND = np.stack(
        [np.stack(pair, axis=1) / list(UNITS.values()) for pair in (*gains, (np.zeros(4), np.zeros(4)))], axis=1
    )
    expected = fresh_volume(1 + np.array(units), gains_PND)
    assert front.soups.hypervolume == pytest.approx(expected.value)
    assert front.soups.half_width == pytest.approx(expected.half_width)
    assert front.soups.hypervolume > front.hypervolume + 0.1
    assert front.soups.growth_half_width is not None


def test_what_is_written_of_a_front_has_soups_as_a_kind(tmp_path: Path) -> None:
    front = front_with(mixture("soup-1", 0.92, 0.2), mixture("soup-2", 0.79, 0.3))
    told = json.loads(json.dumps(front_as_dict(front)))
    assert [(row["trial"], row["kind"]) for row in told["members"]] == [
        ("001", "trial"),
        ("002", "trial"),
        ("000", "base"),
        ("soup-1", "soup"),
    ]
    soup = told["members"][-1]
    assert (soup["soup"], soup["chosen_by"], soup["values"]) == ({"001": 0.5, "002": 0.5}, None, {})
    assert soup["metrics"]["eval/brightness"] == pytest.approx(0.92)
    assert [row["trial"] for row in told["soups_not_held"]] == ["soup-2"]
    growth = told["hypervolume_with_soups"]
    assert growth["mean"] == pytest.approx(told["hypervolume"] + growth["growth"])
    rows = list(csv.DictReader(io.StringIO(front_as_csv(front))))
    assert [(row["trial"], row["kind"], row["soup"]) for row in rows][-1] == ("soup-1", "soup", "0.5 x 001 + 0.5 x 002")
    assert (float(rows[-1]["eval/brightness"]), rows[-1]["prompts"]) == (pytest.approx(0.92), "4")


def test_a_run_is_read_with_its_soups_and_without(tmp_path: Path) -> None:
    rows = [result(BASE_TRIAL, 0.4, 0.0), *(result(trial, *point) for trial, point in TRIALS.items())]
    folder = write_run(tmp_path / "mix", experiment(), rows)
    for row in CONFIRMATIONS:
        append_line(folder.confirmed_file, json.dumps(asdict(row)))

    def read(**options: object) -> Front:
        front = read_front(RunFolder(folder.path), experiment(), **options)
        assert front is not None
        return front

    assert read_mixtures(folder) == []
    assert read().soups is None
    other = replace(mixture("soup-1", 0.92, 0.2), prompts=("another",))  # what its front is no longer measured on
    for made in (other, mixture("soup-2", 0.92, 0.2)):
        append_line(folder.mixtures_file, json.dumps(to_record(asdict(made))))
    soups = read().soups
    assert soups is not None
    assert [soup.name for soup in soups.every] == ["soup-2"]
    assert read(where=["brightness > 0"]).soups is None  # a soup has no numbers of the search


def point(name: str, brightness: float, drift: float, seen: tuple[float, float], share: float) -> Mixture:
    row = mixture(name, brightness, drift, t001=1.0)
    mix = {"brightness": share, "drift": 1 - share}
    return replace(row, mix=mix, foreseen={"eval/brightness": seen[0], "eval/drift": seen[1]})


def test_points_of_a_basis_are_members_of_their_own_kind_in_the_place_that_the_search_foresaw() -> None:
    kept = point("001@0.25,0.75", 0.95, 0.2, (0.5, 0.6), 0.25)  # lucky: the search saw it beaten
    lost = point("001@0.5,0.5", 0.5, 0.6, (0.6, 0.4), 0.5)
    strength = mixture("001@0.5", 0.99, 0.05, t001=0.5)  # of a LoRA, which is on no front
    front = front_with(kept, lost, strength)
    assert front.soups is not None
    assert [(row.name, row.kind, bool(row.beaten)) for row in front.soups.every] == [
        ("001@0.25,0.75", "basis", False),
        ("001@0.5,0.5", "basis", True),
    ]
    assert front.soups.every[0].recipe == "001 at 0.25 brightness + 0.75 drift"
    assert front.soups.words == "Bases: 2 points between LoRAs that were trained together"
    units = [(6.0, -0.5), (4.0, -0.1), (0.0, 0.0), (1.0, -0.6), (2.0, -0.4)]  # of the search: 001, 002, base, points
    gains = [(values(*at)["brightness"] - BASE["brightness"], -values(*at)["drift"]) for at in TRIALS.values()]
    gains.append((np.zeros(4), np.zeros(4)))
    gains += [
        (values(*at)["brightness"] - BASE["brightness"], -values(*at)["drift"]) for at in ((0.95, 0.2), (0.5, 0.6))
    ]
    gains_PND = np.stack([np.stack(pair, axis=1) / list(UNITS.values()) for pair in gains], axis=1)
    assert front.soups.hypervolume == pytest.approx(fresh_volume(1 + np.array(units), gains_PND).value)
    (row,) = [one for one in front_as_dict(front)["members"] if one["kind"] == "basis"]
    assert row["mix"] == {"brightness": 0.25, "drift": 0.75}
    assert "001@0.25,0.75,basis,001 at" in front_as_csv(front).replace('"', "")
