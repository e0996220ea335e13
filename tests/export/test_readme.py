import html
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from rltune.export.readme import front_matter, plain, write_readme
from rltune.redaction import MASK
from rltune.training.figures import Figure

ODD = [
    '<script>alert("x")</script> & <img src=x onerror=y>',
    "a *bold* _snail_ | with `code` [link](https://x) # $1$ !",
    "---\nlicense: mit\n---",
    "\N{SNAIL} \N{OCTOPUS} 'quotes' \"double\": {a: b}",
    "x" * 10_000,
]
"""Prompts as people write them."""


def card(**fields: Any) -> dict[str, Any]:
    return {
        "rltune": "0.1.0",
        "run": "mix",
        "trial": "012",
        "base_model": "stabilityai/sdxl-turbo",
        "base_revision": "abc",
        "formats": {
            "diffusers": {"files": ["a.safetensors"], "reloaded": {"difference": 1e-6, "effect": 0.2, "bfloat16": 0.02}}
        },
        "effect": {"update": 0.0404, "image": 0.0279},
        "rewards": [
            {"name": "pickscore", "reward": "pickscore", "weight": 0.25, "licence": "MIT"},
            {"name": "clip_score", "reward": "clip_score", "weight": 0.0, "licence": "MIT"},
        ],
        "figures": [
            asdict(Figure("pickscore", 21.5, 0.5, gain=1.25, gain_half_width=0.1, base=20.25)),
            asdict(Figure("clip_score", 0.3, None, gain=-0.01, gain_half_width=None, base=0.31)),
        ],
        "measured_on": {"prompts": 16, "fresh_prompts": 16},
        "prompts": ["a snail"],
        "settings": {"optim.lr": 0.0012345678},
        "experiment": {"sampler": {"steps": 12, "negative": "", "eta": 0.0}},
        "command": "rltune train experiment.yaml",
        **fields,
    }


def written(folder: Path, family: str = "StableDiffusionXLPipeline", **fields: Any) -> str:
    write_readme(folder, card(**fields), family=family)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_base_model_library_tags_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for number in (1, 2, 10):
        (tmp_path / "samples" / f"{number}.png").touch()
    written(tmp_path, prompts=["a snail", "two", "three"])
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["base_model"] == "stabilityai/sdxl-turbo"
    assert data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"lora", "template:sd-lora", "stable-diffusion-xl", "reward-finetuning"} <= set(data["tags"])
    assert "license" not in data  # the base model's owner says it
    assert [row["output"]["url"] for row in data["widget"]] == ["samples/1.png", "samples/2.png", "samples/10.png"]
    assert [row["text"] for row in data["widget"]] == ["a snail", "two", "three"]


@pytest.mark.parametrize("base", ["builtin", "./models/mine", "/home/x/model", "FOLDER"])
def test_a_base_model_that_is_no_repository_is_not_named_to_the_hub(base: str, tmp_path: Path) -> None:
    """It would refuse the whole card."""
    base = str(tmp_path) if base == "FOLDER" else base
    data = yaml.safe_load(front_matter(card(base_model=base), [], family="other"))
    assert not {"base_model", "base_model_relation"} & data.keys()
    assert data.get("license") == ("apache-2.0" if base == "builtin" else None)


def test_figures_stand_with_their_intervals_roles_and_licences(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert "| pickscore | 20.25 | 21.5 ± 0.5 | +1.25 ± 0.1 | 0.25 | MIT |" in text
    assert "| clip\\_score | 0.31 | 0.3 | -0.01 | judge | MIT |" in text
    assert "Means over 16 prompts that were not trained on, 16 of which no trial was chosen by" in text
    assert "is 4.04% of them" in text
    assert "by 2.79% of the range" in text
    assert "in float32; in bfloat16 by up to 0.02" in text
    assert "| optim.lr | 0.001235 |" in text
    assert "| sampler.steps | 12 |" in text
    assert "`rltune train experiment.yaml`" in text


@pytest.mark.parametrize("prompt", ODD, ids=["html", "markdown", "front matter", "emoji", "long"])
def test_text_of_a_user_stays_text(prompt: str, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "1.png").touch()
    text = written(tmp_path, prompts=[prompt], run=prompt, settings={prompt: prompt})
    loaded = ModelCard.load(tmp_path / "README.md")
    shown = " ".join(prompt.split())
    shown = shown if len(shown) <= 300 else "x" * 296 + " ..."
    assert loaded.data.to_dict()["widget"][0]["text"] == shown
    assert "license" not in loaded.data.to_dict()
    assert len(text) < 10_000
    assert "<" not in loaded.text
    assert f"1. {plain(prompt)}\n" in loaded.text
    unescaped = html.unescape(re.sub(r"\\(.)", r"\1", plain(prompt)))
    assert unescaped == shown


def test_a_secret_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijk")
    text = written(tmp_path, settings={"rewards.x.url": "https://me:secret@host/?token=abc hf_abcdefghijk"})
    assert not {word for word in ("secret", "abcdefghijk", "token=abc") if word in text}
    assert MASK in text.replace("\\", "")
