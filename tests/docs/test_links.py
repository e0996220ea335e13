"""What README and documentation name is there."""

import re
from pathlib import Path

import pytest

from rltune.config.load import load_experiment
from rltune.estimators.base import ESTIMATORS
from rltune.rewards.base import REWARDS
from rltune.rewards.scalarise import SCALARISATIONS
from rltune.runs.layout import RunFolder
from rltune.search.searcher import SAMPLERS
from tests.docs.pages import PAGES, README, ROOT, Page, known, page_named
from tests.test_layering import ALLOWED, CONFINED

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@every_page
def test_every_link_leads_somewhere(page: Page) -> None:
    for link in page.links():
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.path.parent / name if name else page.path
        assert target.is_file(), f"{page.name}: {link} leads to no file"
        if anchor:
            anchors = Page(target.resolve()).anchors()
            assert anchor in anchors, f"{page.name}: {link} leads to no heading"
            assert anchors[anchor] == anchor, (
                f"{page.name}: on the site {link} is #{anchors[anchor]}; reword the heading"
            )


@every_page
def test_every_file_of_the_repository_that_is_named_is_there(page: Page) -> None:
    for name in page.spans():
        if re.fullmatch(r"(rltune|tests|experiments|docs|\.ci)/[\w./-]+", name):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


@every_page
def test_nothing_is_left_to_fill_in(page: Page) -> None:
    assert not re.search(r"@@|TODO|FIXME|being written", page.text)


@pytest.mark.slow
def test_every_experiment_is_in_the_index_with_the_command_it_is_for() -> None:
    index = (ROOT / "experiments" / "README.md").read_text()
    for path in (ROOT / "experiments").rglob("*.yaml"):
        (row,) = (line for line in index.splitlines() if f"]({path.relative_to(ROOT / 'experiments')})" in line)
        experiment = load_experiment(path, [], known(), must_find_files=False)
        assert f"`rltune {'sweep' if experiment.is_searched else 'train'}`" in row, path


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("rewards", REWARDS.names()),
        ("rewards", tuple(SCALARISATIONS)),
        ("estimators", ESTIMATORS.names()),
        ("search", SAMPLERS),
    ],
    ids=["rewards", "mixtures", "estimators", "samplers"],
)
def test_every_name_that_an_experiment_can_use_has_a_row(page: str, names: tuple[str, ...]) -> None:
    rows = "\n".join(line.split("|")[1] for line in page_named(page).text.splitlines() if line.startswith("|"))
    assert [name for name in names if f"`{name}`" not in rows] == []


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert README.path.stat().st_size <= 9 * 1024
    linked = {link.partition("#")[0] for link in README.links()}
    assert [page.name for page in PAGES if page.name.startswith("docs/") and page.name not in linked] == []


def test_the_packages_are_those_of_the_architecture() -> None:
    rows = re.findall(r"^\| `rltune/(\w+)` \|.*\| (.*) \|$", page_named("architecture").text, flags=re.MULTILINE)
    order = [room for room, _ in rows]
    assert set(order) == {room for room in ALLOWED if (ROOT / "rltune" / room).is_dir()}
    for place, (room, never) in enumerate(rows):
        assert set(never.split(", ")) == {name for name in ("torch", "ray", "optuna") if room not in CONFINED[name]}, (
            room
        )
        assert not ALLOWED[room] & set(order[place:]), f"{room} stands above what it imports"


def test_every_file_of_a_run_folder_is_told_of() -> None:
    folder = RunFolder(Path("runs/mix"))
    parts = [getattr(folder, name) for name, kind in vars(RunFolder).items() if isinstance(kind, property)]
    paths = [path.relative_to(folder.path) for path in parts if isinstance(path, Path) and path != folder.path]
    assert len(paths) > 8
    of_trials = [getattr(folder, f"{name}_file")("001") for name in ("failure", "config", "trial_events")]
    paths += [path.relative_to(folder.path) for path in (*of_trials, folder.checkpoints_dir("001"))]
    text = page_named("run-folder").text
    shown = [path for path in map(str, paths) if not path.startswith(".")]
    assert [path for path in shown if not re.search(rf"`{path}[`/]", text)] == []
