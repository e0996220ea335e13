"""Inpainting through the training loop: it resumes, shares out, and evaluates as text to image does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rltune.config.experiment import RunConfig
from rltune.diffusion.chain import GradientPlan
from rltune.errors import UserError
from rltune.training.evaluation import beside_given
from rltune.training.setup import base_key, build_run
from tests.tiny_inpaint import sd_inpaint, sharp
from tests.training.runs import Make, adapters, metrics, train, train_in_processes

SIZE = 16


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of five prompts, two of them the same words, with images of noise."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for i, prompt in enumerate(["a cat", "a dog", "a cat", "a blue fish", "one fox"]):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"prompt": prompt, "image": f"{i}.png", "mask": "box 2 2 7 7" if i % 2 else "border 2 2 6 6"})
    (folder / "set.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "set.jsonl"


@pytest.fixture(scope="session")
def nine_channels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nine") / "pipeline"
    sharp(sd_inpaint()).save_pretrained(folder)
    return folder


@pytest.fixture
def make(make_config: Make, pictures: Path, nine_channels: Path) -> Make:
    def build(*, is_told: bool = False, **sections: Any) -> RunConfig:
        base = {"model": {"base": str(nine_channels)}} if is_told else {}
        asked: dict[str, Any] = {
            "task": "inpaint",
            "prompts": {"train": str(pictures), "eval": str(pictures)},
            "sampler": {"height": SIZE, "width": SIZE},
            "rewards": {"brightness": {}},
            "optim": {"steps": 2},
            "evaluate": {"every": 1, "prompts": 2, "images_per_prompt": 2, "judges": ["drift"]},
            **base,
        }
        for name, section in sections.items():
            asked[name] = {**asked.get(name, {}), **section} if isinstance(section, dict) else section
        return make_config(**asked)

    return build


POLICY = {"estimator": {"name": "ddpo", "k": None, "draw": None, "options": {}}, "sampler": {"eta": 1.0}}


@pytest.mark.long
@pytest.mark.parametrize(("is_told", "sections"), [(False, {}), (True, {}), (False, POLICY)])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    make: Make, is_told: bool, sections: dict[str, Any], tmp_path: Path
) -> None:
    config = make(is_told=is_told, **sections)
    whole = train(config, tmp_path / "whole")
    torch.manual_seed(99)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000001"
    resumed = train(config, tmp_path / "again", base_dir=tmp_path / "whole" / "base", resume_from=checkpoint)
    assert resumed.reports[-1] == whole.reports[-1]
    one, other = (adapters(tmp_path / name, 2) for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.reports[-1]["eval/drift"] > 0
    if not sections:
        assert whole.reports[-1]["gain/brightness"] > 0


@pytest.mark.long
def test_two_workers_take_the_steps_of_one(make: Make, tmp_path: Path) -> None:
    configs = {"plain": make(), "policy": make(**POLICY)}
    train_in_processes(configs, tmp_path / "2", 2)
    for name, config in configs.items():
        train(config, tmp_path / "1" / name)
        alone, shared = (adapters(tmp_path / count / name, 2) for count in "12")
        difference = max(float((alone[key] - shared[key]).abs().max()) for key in alone)
        assert difference < 2e-4  # Adam divides by what small gradients are, whose rounding is another
        for one, two in zip(metrics(tmp_path / "1" / name), metrics(tmp_path / "2" / name), strict=True):
            assert one["train/reward"] == pytest.approx(two["train/reward"], rel=1e-4, abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("is_told", [False, True])
def test_it_trains_in_bfloat16_too(make: Make, is_told: bool, tmp_path: Path) -> None:
    config = make(is_told=is_told, resources={"precision": "bf16"}, optim={"steps": 1})
    report = train(config, tmp_path).reports[-1]
    assert np.isfinite(report["eval/brightness"])


@pytest.mark.long
@pytest.mark.parametrize("name", ["drtune", "refl", "draft_lv"])
def test_one_step_at_a_time_gives_the_gradient_of_all_at_once(make: Make, name: str, tmp_path: Path) -> None:
    """What is given takes its part out of the gradient, whichever way it is computed."""
    plain = {"k": 2 if name == "drtune" else None, "draw": None, "options": {}}
    for mode in ("never", "serial"):
        config = make(estimator={"name": name, **plain, "checkpoint": mode}, optim={"steps": 1})
        train(config, tmp_path / mode, base_dir=tmp_path / "base")
    norms = [[row["grad_norm"] for row in metrics(tmp_path / mode)] for mode in ("never", "serial")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow
def test_the_gradient_is_of_what_is_drawn_alone(make: Make) -> None:
    """A sum over given latents does not depend on the adapters."""
    run = build_run(make())
    x = torch.randn(2, *run.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    chain = run.sampler.open(run.train_prompts[:2], x, None)
    assert chain.drawn_B1HW is not None
    for plan in (GradientPlan.last(4, 4), GradientPlan(frozenset({1}), scored=1)):
        (slope,) = torch.autograd.grad(((1 - chain.drawn_B1HW) * chain.run(plan)).sum(), x, retain_graph=True)
        assert not bool(slope.any())


@pytest.mark.slow
def test_grids_show_what_was_given_beside_the_result(make: Make, tmp_path: Path) -> None:
    config = make(optim={"steps": 1}, evaluate={"prompts": 3})
    train(config, tmp_path)
    grid = np.asarray(Image.open(tmp_path / "trial" / "samples" / "step-000001.png"))
    assert grid.shape == (3 * SIZE, 3 * SIZE, 3)  # a prompt a row: given, and two images
    run = build_run(config)
    results = np.zeros((6, SIZE, SIZE, 3), np.uint8)
    cells, columns = beside_given(results, run.eval_images.prompts, 2)
    assert columns == 3
    for row in range(3):
        assert np.array_equal(grid[row * SIZE : (row + 1) * SIZE, :SIZE], cells[3 * row])


def test_measurements_of_the_base_are_shared_by_pictures_and_not_by_paths(
    make: Make, make_config: Make, pictures: Path, tmp_path: Path
) -> None:
    key = base_key(make())
    for path in pictures.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sets = {"train": str(tmp_path / "set.jsonl"), "eval": str(tmp_path / "set.jsonl")}
    assert base_key(make(prompts=sets)) == key
    assert base_key(make(task="text_to_image")) != key
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "4.png")
    assert base_key(make(prompts=sets)) != key


def test_a_model_for_another_task_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"task: .*pipeline' fills images and draws none without, got text_to_image"):
        build_run(make(is_told=True, task="text_to_image"))
