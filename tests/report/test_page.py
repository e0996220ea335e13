"""The page as text: what is in it, what must never be, and how large it gets."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rltune.report import pictures
from rltune.report.markup import clean
from rltune.report.write import write_report
from rltune.runs.layout import RunFolder
from rltune.runs.results import append_result
from tests.report.synthetic import FOUR, asked, write_synthetic
from tests.run_folders import experiment, result, write_run

NASTY = [
    "</script><script>alert(1)</script>",
    "\"quotes\" 'and' <!-- comments --> & ]]>",
    "an emoji \N{FIRE} and [bold red]markup[/] \N{RIGHT-TO-LEFT OVERRIDE}",
    "x" * 10_000,
]


class Elements(HTMLParser):
    """Names of all elements, and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def written(folder: RunFolder, asked: Any) -> str:
    return write_report(folder, asked).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a run with prompts that try to get out."""
    wanted = asked(12, FOUR[:3], prompts=NASTY)
    folder = write_synthetic(tmp_path_factory.mktemp("runs") / "mix", wanted)
    append_result(folder.results_file, result("013", reason="<img src=http://evil.example/x> is not finite"))
    return written(folder, wanted)


def test_nothing_comes_from_elsewhere_and_no_text_becomes_an_element(page: str) -> None:
    elements = Elements(page).found
    assert [attributes for tag, attributes in elements if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
    ]
    assert not [tag for tag, _ in elements if tag in ("img", "link", "iframe", "object", "base")]
    assert not [a for _, attributes in elements for a in attributes if a in ("src", "href") or a.startswith("on")]
    (policy,) = [a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; script-src 'sha256-[\w+/]+='; style-src 'unsafe-inline'; img-src data:", policy
    )
    assert "&lt;img src=http://evil.example/x&gt; is not finite" in page


def test_prompts_come_through_as_they_are(page: str) -> None:
    assert data_of(page)["grid"]["prompts"] == NASTY


def test_every_trial_is_there_with_its_numbers_settings_curve_and_pictures(page: str) -> None:
    data = data_of(page)
    assert list(data["trials"]) == [f"{i:03d}" for i in range(13)]
    assert set(data["sheets"]) == set(data["trials"])
    assert set(data["curves"]) == set(data["trials"]) - {"000"}
    trial, curve = data["trials"]["007"], data["curves"]["007"]
    assert curve["steps"] == [5, 10]
    last = [gains[-1] for gains in curve["gains"]]
    assert last == trial["gains"]
    assert trial["halves"][0] == pytest.approx(0.003 * 3.182, rel=1e-3)  # Student's t of four prompts
    assert len(trial["values"]) == len(data["settings"]) == 5
    assert data["export"].startswith("rltune export ")


@pytest.mark.parametrize(
    "heading",
    [
        "Pareto front",
        "Settings and what they gave",
        "Which settings mattered",
        "Hypervolume",
        "Judges against rewards",
        "Trials that failed or were stopped",
        "Run it again",
    ],
)
def test_every_section_is_there(page: str, heading: str) -> None:
    assert f"<h2>{heading}</h2>" in page


def test_it_can_be_run_again_from_the_page(page: str) -> None:
    assert re.search(r"rltune sweep \S*/mix/experiment\.yaml --name mix-again", page)
    assert "log_float:" in page
    assert "<th>diffusers</th>" in page


def test_no_secret_gets_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_TOKEN", 'secret<"&>1234')
    clean.cache_clear()
    wanted = asked(2, FOUR[:2], prompts=['say secret<"&>1234', "b", "c", "d"])
    folder = write_synthetic(tmp_path / "mix", wanted)
    html = written(folder, wanted)
    clean.cache_clear()
    assert "1234" not in html
    assert data_of(html)["grid"]["prompts"][0] == "say ***"


@pytest.mark.slow
def test_pictures_stay_within_their_budget_and_the_front_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = asked(20, FOUR[:2])
    folder = write_synthetic(tmp_path / "mix", wanted)
    noise = np.random.default_rng(0)
    for file in folder.path.glob("trials/*/samples/*.png"):
        Image.fromarray(noise.integers(0, 256, (64, 512, 3), np.uint8)).save(file)
    html = written(folder, wanted)
    size = max(map(len, data_of(html)["sheets"].values()))
    monkeypatch.setattr(pictures, "BUDGET", int(size * 14.5))
    html = written(folder, wanted)
    data = data_of(html)
    front = {trial for trial, row in data["trials"].items() if "on the front" in row["notes"]}
    assert front
    assert {"000", *front} <= set(data["sheets"])
    assert sum(map(len, data["sheets"].values())) <= size * 14.5
    left_out = 21 - len(data["sheets"])
    assert left_out > 0
    assert f"The pictures of {left_out} trials are left out" in html


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    wanted = asked(1, FOUR[:2])
    folder = write_synthetic(tmp_path / "mix", wanted)
    file = folder.trial_dir("001") / "samples" / "step-000010.png"
    Image.new("RGB", (8 * 512, 512), "red").save(file)
    sheet = data_of(written(folder, wanted))["sheets"]["001"]
    layout = pictures.Layout((), 2, 4, 8, 1)
    assert sheet == pictures.Shrinker()(file, layout, 256)
    assert len(sheet) < 30_000


def test_a_run_of_which_little_is_known_has_a_page(tmp_path: Path) -> None:
    """One whose base model has just ended: no trial, no picture, no event, no prompt."""
    wanted = experiment()
    folder = write_run(tmp_path / "mix", wanted, [result("000", 0.5, 0.0)])
    html = written(folder, wanted)
    assert data_of(html)["first"] == "000"
    assert "0 of 4 trials ended; while the run goes on" in html
