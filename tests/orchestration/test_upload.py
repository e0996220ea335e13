"""What of this machine goes up with an experiment, and what must not."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rltune.config.distributions import Choice
from rltune.config.load import load_experiment, parse_experiment
from rltune.errors import ExperimentError
from rltune.orchestration import upload
from rltune.orchestration.upload import stage
from rltune.training.canvases import prompt_set

BRIGHT = {"brightness": {"weight": 1.0}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user stands in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """What goes up."""
    folder = tmp_path / "there"
    folder.mkdir()
    return folder


def write(path: Path, text: str = "a cat\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def written(**sections: Any) -> Any:
    return parse_experiment({"name": "mix", "rewards": BRIGHT, **sections}, "mix.yaml", must_find_files=False)


def test_the_experiment_goes_up_with_its_overrides(here: Path, there: Path) -> None:
    path = write(here / "a.yaml", "rewards: {brightness: {weight: 1.0}}\noptim: {lr: {log_float: [1.0e-4, 1.0e-3]}}\n")
    experiment = load_experiment(path, ["name=mix", "optim.steps=7"], must_find_files=False)
    found = stage(experiment, there)
    assert (found.experiment_file, found.files, found.notes) == ("mix.yaml", ("mix.yaml",), ())
    again = load_experiment(there / "mix.yaml")
    assert (again.raw, again.shared.optim.steps) == (experiment.raw, 7)
    assert found.size == (there / "mix.yaml").stat().st_size


def test_prompt_files_keep_their_place_and_others_get_one(here: Path, there: Path, tmp_path: Path) -> None:
    write(here / "prompts" / "train.txt")
    outside = write(tmp_path / "elsewhere" / "held out.txt", "a dog\n")
    found = stage(written(prompts={"train": "prompts/train.txt", "eval": str(outside)}), there)
    assert found.files == ("inputs/eval/held out.txt", "mix.yaml", "prompts/train.txt")
    again = load_experiment(there / "mix.yaml", must_find_files=False)
    assert again.shared.prompts.train == "prompts/train.txt"
    assert again.shared.prompts.eval == "inputs/eval/held out.txt"
    assert (there / "inputs/eval/held out.txt").read_text() == "a dog\n"


def test_every_prompt_file_that_a_search_may_take_goes_up(here: Path, there: Path, tmp_path: Path) -> None:
    write(here / "a.txt")
    outside = write(tmp_path / "b.txt")
    found = stage(written(prompts={"train": {"choice": ["a.txt", str(outside)]}}), there)
    assert found.files == ("a.txt", "inputs/train/b.txt", "mix.yaml")
    kind = load_experiment(there / "mix.yaml", must_find_files=False).space["prompts.train"]
    assert kind == Choice(("a.txt", "inputs/train/b.txt"))


@pytest.mark.parametrize("is_outside", [False, True])
def test_pictures_go_up_where_their_table_finds_them(
    here: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_outside: bool
) -> None:
    root = tmp_path / "elsewhere" if is_outside else here / "data"
    table = write(root / "table.csv", "prompt,image,mask\na cat,pics/cat.png,pics/mask.png\n")
    (root / "pics").mkdir()
    for name in ("cat", "mask", "unused"):
        Image.new("RGB", (8, 8), "white").save(root / "pics" / f"{name}.png")
    source = str(table) if is_outside else "data/table.csv"
    found = stage(written(task="inpaint", prompts={"train": source, "eval": "builtin-heldout"}), there)
    base = "inputs/train" if is_outside else "data"
    assert found.files == tuple(
        sorted([f"{base}/pics/cat.png", f"{base}/pics/mask.png", f"{base}/table.csv", "mix.yaml"])
    )
    monkeypatch.chdir(there)
    prompts = prompt_set(load_experiment("mix.yaml").shared, "train").prompts
    assert prompts[0].read(8, 8)[0].shape == (8, 8, 3)  # type: ignore[attr-defined]


def test_a_picture_outside_of_its_folder_would_not_be_found(here: Path, there: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    write(here / "t.csv", "prompt,image\na cat,../cat.png\n")
    with pytest.raises(ExperimentError, match=r"prompts\.train: its picture .*cat\.png lies outside"):
        stage(written(task="inpaint", prompts={"train": "t.csv", "eval": "builtin-heldout"}), there)


def test_the_user_s_modules_go_up_with_what_they_import(here: Path, there: Path) -> None:
    write(here / "mine" / "scores.py", "import torch\nfrom . import parts\nfrom .deep.more import x\nimport helper\n")
    write(here / "mine" / "parts.py", "from mine.other import f\n")
    write(here / "mine" / "other.py", "def f(): import late\n")
    write(here / "mine" / "deep" / "__init__.py", "")
    write(here / "mine" / "deep" / "more.py", "x = 1\n")
    write(here / "helper.py", "")
    write(here / "late.py", "")
    write(here / "unused.py", "")
    found = stage(written(rewards={"own": {"reward": "mine.scores:sharp", "weight": 1.0}}), there)
    modules = ("deep/__init__.py", "deep/more.py", "other.py", "parts.py", "scores.py")
    assert found.files == ("helper.py", "late.py", *(f"mine/{name}" for name in modules), "mix.yaml")


def test_references_of_trust_go_up(here: Path, there: Path) -> None:
    write(here / "seen" / "a.png")
    rewards = {"aesthetic": {"weight": 1.0, "trust": {"reference": "seen"}}}
    assert stage(written(rewards=rewards), there).files == ("mix.yaml", "seen/a.png")


def test_references_from_elsewhere_stay_there(here: Path, there: Path, tmp_path: Path) -> None:
    """They may be large, and every node may have them."""
    write(tmp_path / "seen" / "a.png")
    rewards = {"aesthetic": {"weight": 1.0, "trust": {"reference": str(tmp_path / "seen")}}}
    assert stage(written(rewards=rewards), there).files == ("mix.yaml",)


def rare(images: Any) -> dict[str, Any]:
    return {"rare": {"reward": "centroid", "weight": 1.0, "options": {"images": images}}}


def test_pictures_of_a_reward_go_up_where_the_experiment_finds_them(
    here: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (here / "seen", tmp_path / "elsewhere", tmp_path / "other"):
        folder.mkdir()
        for name in ("a", "b"):
            Image.new("RGB", (8, 8), "red").save(folder / f"{name}.png")
        write(folder / "notes.txt")
    inside = [str(here / "seen" / "a.png"), "seen/b.png"]
    outside = [str(tmp_path / "elsewhere" / "a.png"), "../elsewhere/b.png", str(tmp_path / "other" / "a.png")]
    found = stage(written(rewards=rare(inside + outside)), there)
    assert len(found.files) == 1 + 5
    assert {"seen/a.png", "seen/b.png"} < set(found.files)
    assert found.notes == ()
    monkeypatch.chdir(there)
    again = load_experiment("mix.yaml", must_find_files=False).shared.rewards["rare"].options["images"]
    assert again[:2] == ["seen/a.png", "seen/b.png"]
    assert len(set(again)) == 5
    assert all(not Path(name).is_absolute() and Path(name).is_file() for name in again)


@pytest.mark.parametrize("is_outside", [False, True])
def test_a_folder_of_pictures_goes_up_with_them_alone(
    here: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_outside: bool
) -> None:
    folder = (tmp_path if is_outside else here) / "seen"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    write(folder / "large.bin")
    other = here / "b.png"
    Image.new("RGB", (8, 8), "blue").save(other)
    named = str(folder) if is_outside else "seen"
    found = stage(written(rewards=rare({"choice": [named, "b.png"]})), there)
    assert len(found.files) == 3
    monkeypatch.chdir(there)
    kind = load_experiment("mix.yaml", must_find_files=False).space["rewards.rare.options.images"]
    assert isinstance(kind, Choice)
    assert (kind.options[1], [path.name for path in Path(str(kind.options[0])).iterdir()]) == ("b.png", ["a.png"])


def test_weights_never_go_up(here: Path, there: Path, tmp_path: Path) -> None:
    write(here / "models" / "sd" / "model_index.json", "{}")
    head = write(tmp_path / "head.pth")
    rewards = {"aesthetic": {"weight": 1.0, "options": {"head": str(head)}}}
    with pytest.raises(ExperimentError, match=r"model\.base: weights and runs do not go up, got 'models/sd'"):
        stage(written(model={"base": "models/sd"}, rewards=rewards), there)
    found = stage(written(model={"base": str(here / "models" / "sd")}, rewards=rewards), there)
    assert found.files == ("mix.yaml",)
    assert found.notes == (
        f"rewards.aesthetic.options.head: {head} must be there on every node",
        f"model.base: {here / 'models' / 'sd'} must be there on every node",
    )


def test_what_is_too_large_does_not_go_up(here: Path, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MAX_MIB", 1e-5)
    write(here / "small.txt")
    write(here / "large.txt", "a very long prompt\n")
    with pytest.raises(ExperimentError, match=r"the largest is .*large\.txt; no more than 1e-05 MiB do"):
        stage(written(prompts={"train": "small.txt", "eval": "large.txt"}), there)
    assert list(there.iterdir()) == []
