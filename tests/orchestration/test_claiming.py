"""A run's record at its first start, and what of it another start may change. No model is loaded."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from rltune.config.load import Experiment, load_experiment
from rltune.errors import RunError, UserError
from rltune.orchestration.claiming import Claim, claim_run
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.record import (
    base_folder,
    leaves,
    read_record,
    read_run,
    settings_of,
    with_own_prompts,
    with_recorded_defaults,
)
from rltune.training import pins as pins_module
from tests.run_folders import SEARCHED, experiment, result, write_run

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FIXED: dict[str, Any] = {"rewards": {"brightness": {}}, "optim": {"steps": 10}}


def claim(folder: RunFolder, asked: Experiment, *, precision: str = "fp32") -> Claim:
    return claim_run(folder, asked, precision=precision)


def run(tmp_path: Path) -> RunFolder:
    """Return a run folder in which the base model has been measured."""
    folder = RunFolder(tmp_path / "mix")
    (folder.base_dir / "key").mkdir(parents=True)
    (folder.base_dir / "key" / "base.json").touch()
    return folder


def claimed(tmp_path: Path, **sections: Any) -> RunFolder:
    folder = run(tmp_path)
    claim(folder, experiment(**sections))
    return folder


def test_a_claim_writes_the_experiment_with_its_origin(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    text = folder.experiment_file.read_text()
    assert text.startswith("# rltune ")
    assert "# ray " in text
    assert load_experiment(folder.experiment_file).raw == experiment().raw


@pytest.mark.slow
def test_the_same_experiment_claims_its_folder_again(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    claim(folder, experiment())
    claim(folder, experiment(name="another-file"))  # the folder's name decides
    claim(folder, experiment(resources={"workers": 2, "concurrent": 3}))
    claim(folder, experiment(track=["tensorboard"]))
    claim(folder, experiment(track=[]))
    claim(folder, experiment(stop={"hours": 2, "stalled_trials": 5}))
    claim(folder, experiment(search={**SEARCHED["search"], "prune": True, "grace": 5, "reduction": 2}))


@pytest.mark.parametrize("search", [{"trials": 9}, {"trials": 4}, {}, None])
@pytest.mark.parametrize("before", [{"trials": 2}, {}, None])
def test_more_trials_of_the_same_search_are_a_resume(tmp_path: Path, before: Any, search: Any) -> None:
    folder = claimed(tmp_path, search=before)
    claim(folder, experiment(search=search))
    assert load_experiment(folder.experiment_file).shared.search == experiment(search=search).shared.search


def test_a_search_section_may_be_added_for_more_trials(tmp_path: Path) -> None:
    without = {name: section for name, section in SEARCHED.items() if name != "search"}
    folder = run(tmp_path)
    claim(folder, experiment(without))
    claim(folder, experiment(without, search={"trials": 30}))


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"optim": {**SEARCHED["optim"], "steps": 20}}, "optim.steps was 10 and is 20 now"),
        (
            {"optim": {**SEARCHED["optim"], "lr": {"log_float": [1e-4, 2e-2]}}},
            r"optim.lr.log_float was .* and is .* now",
        ),
        ({"search": {**SEARCHED["search"], "seed": 1}}, "search.seed was 0 and is 1 now"),
        ({"objectives": ["brightness"]}, "objectives was .* now"),
        ({"seed": 7}, "seed was 0 and is 7 now"),
        ({"constraints": {"diversity": {"min_ratio_to_base": 0.5}}}, "constraints.diversity is new"),
        ({"rewards": {"brightness": {}}}, "rewards.smoothness is not there any more"),
        ({"prompts": {"train": ["a cat"]}}, "prompts.train was 'builtin' and is .* now"),
        ({"resources": {"precision": "bf16"}}, "resources.precision was 'fp32' and is 'bf16' now"),
        ({"resources": {"prefix_precision": "bf16"}}, "resources.prefix_precision was 'same' and is 'bf16' now"),
        ({"resources": {"compile": True}}, "resources.compile was false and is true now"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_another_experiment_is_refused_and_the_first_one_stays(
    tmp_path: Path, sections: dict[str, Any], what: str
) -> None:
    folder = claimed(tmp_path)
    before = {file.name: file.read_bytes() for file in (folder.experiment_file, folder.resolved_file)}
    message = rf"started with other settings than mix\.yaml has now; give another --name, .*: (.*; )?{what}"
    with pytest.raises(UserError, match=message):
        claim(folder, experiment(**sections))
    assert {file.name: file.read_bytes() for file in (folder.experiment_file, folder.resolved_file)} == before


def test_a_claim_leaves_its_argument_as_it_was(tmp_path: Path) -> None:
    asked = experiment()
    folder = claimed(tmp_path)
    claim(folder, asked)
    assert asked.raw == experiment().raw


# ---- what is recorded


def test_the_record_has_every_setting_and_what_it_comes_to(tmp_path: Path) -> None:
    record = claim(run(tmp_path), experiment(FIXED, estimator={"name": "draft"}), precision="bf16").record
    settings = leaves(record.settings)
    assert settings["optim.lr"] == 1e-3
    assert settings["resources.precision"] == record.precision == "bf16"  # what auto comes to on a GPU
    assert settings["objectives"] == ["brightness"]
    assert settings["estimator.k"] == 1  # DRaFT's own default, which no section has
    assert record.versions.keys() >= {"rltune", "python", "torch", "ray", "git"}
    assert record.work_dir == str(Path.cwd())
    assert [(row.setting, row.source) for row in record.prompts] == [
        ("prompts.train", "builtin"),
        ("prompts.eval", "builtin-heldout"),
    ]


def test_a_second_start_rewrites_neither_record_nor_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = claimed(tmp_path)
    record, header = folder.resolved_file.read_bytes(), folder.experiment_file.read_text().splitlines()[:3]
    monkeypatch.setattr("rltune.__version__", "9.9")
    claim(folder, experiment(search={**SEARCHED["search"], "trials": 9}))
    assert folder.resolved_file.read_bytes() == record
    assert folder.experiment_file.read_text().splitlines()[:3] == header
    assert read_run(folder.path)[1].num_trials == 9


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {**FIXED["optim"], "weight_decay": 1e-4, "betas": [0.9, 0.999]}},
        {"estimator": {"name": "alignprop", "draw": "uniform", "std": 5.0}},
        {"rewards": {"brightness": {"reward": "brightness", "weight": 1.0}}},
        {"objectives": ["brightness"], "sampler": {"steps": 20}, "mixture": None},
        {"resources": {"precision": "fp32", "prefix_precision": "same", "compile": False}},
        {"prompts": {"eval": "builtin-heldout"}},
    ],
    ids=lambda sections: next(iter(sections)),
)
def test_a_default_that_is_written_out_is_no_other_setting(tmp_path: Path, sections: dict[str, Any]) -> None:
    folder = run(tmp_path)
    claim(folder, experiment(FIXED))
    claim(folder, experiment(FIXED, **sections))
    claim(folder, experiment(FIXED))  # nor is one that is left out again


def test_defaults_of_an_estimator_and_a_reward_are_settings_too(tmp_path: Path) -> None:
    """Their numbers are from the signatures: k 3 and early_stop 0.4, quality 95."""
    plain = {**FIXED, "rewards": {"compressibility": {}}, "estimator": {"name": "drtune"}}
    folder = run(tmp_path)
    claim(folder, experiment(plain))
    written = {"name": "drtune", "k": 3, "options": {"early_stop": 0.4}}
    claim(folder, experiment(plain, estimator=written, rewards={"compressibility": {"options": {"quality": 95}}}))
    with pytest.raises(UserError, match=r"rewards\.compressibility\.options\.quality was 95 and is 90 now"):
        claim(folder, experiment(plain, rewards={"compressibility": {"options": {"quality": 90}}}))
    claim(folder, experiment(plain))  # what is written out counts as asked
    content = json.loads(folder.resolved_file.read_text())
    content["settings"]["estimator"]["options"]["early_stop"] = 0.25
    folder.resolved_file.write_text(json.dumps(content))
    assert claim(folder, experiment(plain)).experiment.shared.estimator.options == {"early_stop": 0.25}


def test_auto_precision_on_other_hardware_is_another_setting(tmp_path: Path) -> None:
    folder = run(tmp_path)
    claim(folder, experiment(FIXED), precision="bf16")
    with pytest.raises(UserError, match=r"resources\.precision was 'bf16' and is 'fp32' now"):
        claim(folder, experiment(FIXED), precision="fp32")
    resumed = claim(folder, experiment(FIXED, resources={"precision": "bf16"}), precision="fp32")
    assert resumed.config_of(experiment(FIXED).shared).resources.precision == "bf16"


def with_older_defaults(folder: RunFolder, **values: Any) -> None:
    """Make a record what a version with these defaults would have written."""
    content = json.loads(folder.resolved_file.read_text())
    for path, value in values.items():
        section, name = path.split("__")
        assert content["settings"][section][name] != value
        content["settings"][section][name] = value
    folder.resolved_file.write_text(json.dumps(content))


def test_a_default_that_has_changed_since_is_gone_on_with_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run(tmp_path)
    claim(folder, experiment(FIXED))
    with_older_defaults(folder, optim__weight_decay=0.25, estimator__std=2.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # the same again: what was gone on with is not taken for what is asked
            resumed = claim(folder, experiment(FIXED))
    assert resumed.experiment.shared.optim.weight_decay == 0.25
    assert resumed.experiment.shared.estimator.std == 2.0
    assert "optim.weight_decay is 0.25, the default of rltune" in caplog.text
    assert read_run(folder.path)[1].shared.optim.weight_decay == 0.25  # a reader too
    with pytest.raises(UserError, match=r"optim\.weight_decay was 0\.25 and is 0\.0001 now"):
        claim(folder, experiment(FIXED, optim={**FIXED["optim"], "weight_decay": 1e-4}))


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_setting_of_a_shipped_experiment_can_be_written_out(file: Path, tmp_path: Path) -> None:
    asked = load_experiment(file, must_find_files=False)
    settings = settings_of(asked)
    (tmp_path / "all.yaml").write_text(json.dumps(settings))  # JSON is YAML
    again = load_experiment(tmp_path / "all.yaml", must_find_files=False)
    assert settings_of(again) == settings
    assert (again.space, again.shared) == (
        asked.space,
        asked.shared.model_copy(update={"objectives": asked.shared.objective_names}),
    )


# ---- what is named


def prompts_file(path: Path, *prompts: str) -> str:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return str(path)


def test_an_edited_prompt_file_is_refused_and_one_that_is_gone_is_not_needed(tmp_path: Path) -> None:
    source = prompts_file(tmp_path / "train.txt", "a cat", "a dog")
    asked = experiment(FIXED, prompts={"train": source})
    folder = run(tmp_path)
    first = claim(folder, asked)
    (tmp_path / "train.txt").write_text("# a comment is no prompt\na cat\n\na dog\n")
    claim(folder, asked)
    prompts_file(tmp_path / "train.txt", "a cat", "a dig")
    with pytest.raises(UserError, match=r"prompts\.train: '.*train\.txt' held 2 prompts, and holds 2 now that are not"):
        claim(folder, asked)
    (tmp_path / "train.txt").unlink()
    resumed = claim(folder, asked)
    config = with_own_prompts(resumed.experiment.shared, folder, resumed.record)
    assert config.prompts.train == ("a cat", "a dog")
    assert resumed.key_of(config) == first.record.base_key
    moved = prompts_file(tmp_path / "moved.txt", "a cat", "a dog")
    claim(folder, experiment(FIXED, prompts={"train": moved}))
    claim(folder, experiment(FIXED, prompts={"train": ["a cat", "a dog"]}))


def test_prompts_that_are_searched_are_kept_one_by_one(tmp_path: Path) -> None:
    cats, dogs = prompts_file(tmp_path / "cats.txt", "a cat"), prompts_file(tmp_path / "dogs.txt", "a dog")
    asked = experiment(FIXED, prompts={"train": {"choice": [cats, dogs]}})
    found = claim(run(tmp_path), asked)
    for source, prompt in ((cats, "a cat"), (dogs, "a dog")):
        config = with_own_prompts(asked.concrete({"prompts.train": source}), found.folder, found.record)
        assert config.prompts.train == (prompt,)
    keys = {found.key_of(asked.concrete({"prompts.train": source})) for source in (cats, dogs)}
    assert len(keys) == 2  # the calibration is on training prompts


def test_the_runs_own_prompts_are_as_they_were_written(tmp_path: Path) -> None:
    folder = run(tmp_path)
    found = claim(folder, experiment(FIXED))
    copy = folder.prompts_dir / "eval.json"
    copy.write_text(copy.read_text().replace("red", "blue", 1))
    with pytest.raises(RunError, match=r"eval\.json: the run's prompts were altered; bring them back"):
        with_own_prompts(found.experiment.shared, folder, found.record)


def base_model(folder: Path, weights: bytes = b"weights") -> str:
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "weights.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("once")
    return str(folder)


def test_a_base_model_whose_weights_were_replaced_is_refused(tmp_path: Path) -> None:
    asked = experiment(FIXED, model={"base": base_model(tmp_path / "base")})
    folder = run(tmp_path)
    claim(folder, asked)
    (tmp_path / "base" / "README.md").write_text("more")
    claim(folder, asked)
    file = tmp_path / "base" / "unet" / "weights.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(b"heights")  # as long, and as old to whom does not look closely
    os.utime(file, ns=times)
    message = r"mix: what this run was started with has changed, .*model\.base: '.*base' is not what it was \(unet/wei"
    with pytest.raises(UserError, match=message):
        claim(folder, asked)
    file.write_bytes(b"weights")
    (tmp_path / "base").rename(tmp_path / "moved")
    claim(folder, experiment(FIXED, model={"base": str(tmp_path / "moved")}))
    with pytest.raises(UserError, match=r"model\.base: '.*base' is not there any more, it was .*base"):
        claim(folder, asked)


def test_files_that_have_not_changed_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = experiment(FIXED, model={"base": base_model(tmp_path / "base")})
    folder = run(tmp_path)
    claim(folder, asked)
    monkeypatch.setattr(pins_module, "_known", {})  # as a new process
    monkeypatch.setattr("hashlib.file_digest", None)
    claim(folder, asked)


def test_own_code_that_was_edited_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pinned_scores.py").write_text("import pinned_help\ndef red(images, prompts): return images[:, 0]\n")
    (tmp_path / "pinned_help.py").write_text("WEIGHT = 1\n")
    (tmp_path / "pinned_other.py").write_text("")
    asked = experiment({"rewards": {"red": {"reward": "pinned_scores:red"}}})
    folder = run(tmp_path)
    claim(folder, asked)
    (tmp_path / "pinned_other.py").write_text("WEIGHT = 3\n")
    claim(folder, asked)
    (tmp_path / "pinned_help.py").write_text("WEIGHT = 2\n")
    with pytest.raises(
        UserError, match=r"rewards\.red\.reward: 'pinned_scores:red' is not what it was \(pinned_help\.p"
    ):
        claim(folder, asked)


def test_own_code_that_is_mended_before_anything_was_measured_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "failing_scores.py"
    code.write_text("def red(images, prompts): return None\n")
    asked = experiment({"rewards": {"red": {"reward": "failing_scores:red"}}})
    folder = run(tmp_path)
    (measured,) = folder.base_dir.glob("*/base.json")
    measured.unlink()
    first = claim(folder, asked)
    code.write_text("def red(images, prompts): return images[:, 0]\n")
    mended = claim(folder, asked)
    kept = read_record(folder)
    assert kept is not None
    digests = [[pin.digest for pin in record.pins] for record in (first.record, mended.record, kept)]
    assert digests[0] != digests[1] == digests[2]
    measured.touch()
    claim(folder, asked)
    code.write_text("def red(images, prompts): return images[:, 1]\n")
    with pytest.raises(UserError, match="is not what it was"):
        claim(folder, asked)


def test_references_and_weights_of_options_are_pinned(tmp_path: Path) -> None:
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "a.png").write_bytes(b"picture")
    (tmp_path / "head.safetensors").write_bytes(b"head")
    reward = {
        "trust": {"reference": str(tmp_path / "refs")},
        "options": {"weights": str(tmp_path / "head.safetensors")},
    }
    asked = experiment({"rewards": {"aesthetic": reward}})
    folder = run(tmp_path)
    claim(folder, asked)
    (tmp_path / "refs" / "b.png").write_bytes(b"another")
    (tmp_path / "head.safetensors").write_bytes(b"foot")
    with pytest.raises(UserError) as error:
        claim(folder, asked)
    for what in (r"options.weights: ", r"trust.reference: ", "(b.png)"):
        assert what in str(error.value)


# ---- readers


def test_a_front_is_read_by_the_key_that_the_run_recorded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [result(BASE_TRIAL, 0.5, 0.0), result("001", 0.75, 0.25)])
    record = read_record(folder)
    assert record is not None
    base_folder(folder, record).rename(folder.base_dir / "another-key")
    content = json.loads(folder.resolved_file.read_text())
    folder.resolved_file.write_text(json.dumps(content | {"base_key": "another-key"}))
    moved = folder.path.rename(tmp_path / "renamed")
    assert read_front(*read_run(moved)) is not None


def test_a_run_of_an_older_version_is_read_but_not_resumed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [result(BASE_TRIAL, 0.5, 0.0), result("001", 0.75, 0.25)])
    folder.resolved_file.unlink()
    assert read_front(*read_run(folder.path)) is not None
    with pytest.raises(
        UserError, match=r"started by an older rltune, .* can be read, but not gone on with: give another"
    ):
        claim(folder, experiment())
    (folder.base_dir / "other").mkdir()
    (folder.base_dir / "other" / "base.json").touch()
    with pytest.raises(RunError, match=r"several measurements of the base model are in .*; keep the one that trial"):
        read_front(*read_run(folder.path))


def test_a_record_of_another_version_is_read_as_far_as_it_can_be(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    content = json.loads(folder.resolved_file.read_text())
    content["settings"]["optim"]["a_setting_to_come"] = 1
    content["pins"][0]["a_field_to_come"] = 1
    folder.resolved_file.write_text(json.dumps(content | {"a_field_to_come": 1}))
    claim(folder, experiment())
    assert with_recorded_defaults(experiment(), read_record(folder))[1] == {"resources.precision": "fp32"}
    folder.resolved_file.write_text(json.dumps(content | {"schema": 2}))
    with pytest.raises(
        UserError, match=r"resolved\.json: was written by a newer rltune, got schema 2 .*; update rltune"
    ):
        read_run(folder.path)
