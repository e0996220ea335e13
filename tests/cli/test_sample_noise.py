"""``rltune sample --optimise noise``, from the words of the command to the picture and the table."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rltune.config.experiment import RunConfig
from tests.cli.conftest import Call
from tests.cli.test_sample import cells, export

Make = Callable[..., RunConfig]


@pytest.mark.long
def test_rows_with_the_noise_optimised_stand_below_the_others(
    make_config: Make, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_noise_reward.py").write_text(
        "def red(images, prompts, *, times=1.0):\n    return times * images[:, 0].mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    lora = export(make_config(), tmp_path / "lora", seed=1)
    words = ["sample", lora, "--prompt", "a snail", "--images", 2]
    assert call(*words, "-o", "plain.png")[0] == 0
    code, out, _ = call(
        *words, "-o", "noise.png", "--optimise", "noise", "--reward", "my_noise_reward:red", "--reward=brightness=0.5",
        "--option", "my_noise_reward:red.times=2.0", "--judge", "smoothness", "--optimise-steps", 3, "--k", 2,
        "--rate", 0.2,
    )  # fmt: skip
    assert code == 0
    told = " ".join(out.split())
    assert "noise.png: 4 rows (base, base + noise, lora, lora + noise), 2 images for each of" in told
    assert "3 steps of the noise, 0.2 of its norm each, through 2 of 4 sampling steps" in told
    assert "that of a standard normal 16.0" in told
    plain = cells(tmp_path / "plain.png", num_rows=2, num_images=2, size_px=16)
    shown = cells(tmp_path / "noise.png", num_rows=4, num_images=2, size_px=16)
    for image in range(2):
        for row in range(2):
            drawn, optimised = shown[0, 2 * row, image], shown[0, 2 * row + 1, image]
            assert (drawn == plain[0, row, image]).all()
            assert optimised[..., 0].mean() > drawn[..., 0].mean()
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert [line[0] for line in lines[1:7]] == ["base", "brightness", "smoothness", "lora", "brightness", "smoothness"]
    assert lines[1][1] == "my_noise_reward:red"
    assert float(lines[1][3]) > float(lines[1][2])
    assert "(judge)" in lines[3]


@pytest.mark.long
def test_the_built_in_model_is_judged_by_what_no_training_sees(tmp_path: Path, call: Call) -> None:
    code, out, _ = call(
        "sample", "--prompt", "a red star on a white background", "--images", 1, "--steps", 2, "-o",
        tmp_path / "a.png", "--optimise", "noise", "--reward", "aesthetic", "--optimise-steps", 1,
    )  # fmt: skip
    assert code == 0
    assert "faithful (judge)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimise", "prompt"], "--optimise: must be noise, got 'prompt'"),
        (["--optimise", "noise"], "--optimise noise: wants something to raise; give --reward NAME"),
        (["--reward", "aesthetic", "--k", "3"], "--reward, --k: nothing is optimised; give --optimise noise too"),
        (["--optimise", "noise", "--reward", "aesthetic=0"], "--reward: must be NAME or NAME=WEIGHT"),
        (["--optimise", "noise", "--reward", "aesthetic=x"], "got 'aesthetic=x'; write aesthetic=0.5"),
        (["--optimise", "noise", "--reward", "aesthetic", "--rate", "0"], "--rate: must be a positive number, got 0"),
        (["--optimise", "noise", "--reward", "aestetic"], "reward 'aestetic' is unknown; did you mean 'aesthetic'?"),
        (["--optimise", "noise", "--reward", "faithful"], "reward 'faithful': has no gradient"),
        (["--optimise", "noise", "--reward", "centroid"], "reward 'centroid': images must name"),
        (["--optimise", "noise", "--reward", "count", "--option", "of=stars"], "--option: must be REWARD.KEY=VALUE of"),
        (["--optimise", "noise", "--reward", "count", "--option", "count.at=1"], "option 'at' is unknown"),
    ],
)
def test_what_cannot_be_is_said_in_one_message(call: Call, tmp_path: Path, words: list[str], message: str) -> None:
    code, _, err = call("sample", "--prompt", "a red star", "-o", tmp_path / "a.png", *words)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "a.png").exists()
