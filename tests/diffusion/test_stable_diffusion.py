"""The family against diffusers' own pipeline on the same weights."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from rltune.diffusion.chain import run_chain
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import Conditioning
from rltune.diffusion.loading import load_model
from rltune.diffusion.sampler import guided_denoiser
from rltune.errors import UserError

PROMPTS = ["a cat", "two red birds on a blue ground, which is far more text than this encoder can take"]


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 4.0])  # who wants none writes 0
@pytest.mark.parametrize("fixture", ["tiny_pipeline", "tiny_v_pipeline"])
def test_images_are_those_of_diffusers_own_pipeline(
    fixture: str, guidance: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        PROMPTS, latents=latents, num_inference_steps=6, guidance_scale=guidance, height=16, width=16, output_type="pt"
    ).images

    model = load_model(str(folder))
    embeddings = PromptEmbeddings(model)
    cpu = torch.device("cpu")
    denoise = guided_denoiser(model, embeddings.rows(PROMPTS), embeddings.negative(""), cpu, guidance_scale=guidance)
    with torch.no_grad():
        ours = model.decode(run_chain(denoise, latents, model.read_table(num_steps=6, eta=0.0, shape=(4, 8, 8))))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # float32 over six steps


def test_sizes_follow_from_the_model(tiny_pipeline: Path) -> None:
    model = load_model(str(tiny_pipeline))
    assert model.size_px == (16, 16)
    assert model.latent_shape(16, 24) == (4, 8, 12)
    with pytest.raises(ValueError, match="multiples of 2 px, got 16 x 17"):
        model.latent_shape(16, 17)


def test_base_weights_are_frozen(tiny_pipeline: Path) -> None:
    model = load_model(str(tiny_pipeline))
    for part in (model.pipeline.unet, model.pipeline.vae, model.pipeline.text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_prompts_are_embedded_once(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(tiny_pipeline))
    seen: list[str] = []
    encode = model.encode_prompts

    def spy(prompts: list[str]) -> list[Conditioning]:
        seen.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(model, "encode_prompts", spy)
    embeddings = PromptEmbeddings(model)
    embeddings.add(["a", "b", "a"])
    first = embeddings.rows(["b", "a", "c"])
    assert seen == ["a", "b", "c"]
    assert torch.equal(first[1]["text"], embeddings.rows(["a"])[0]["text"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_embeddings_are_the_encoder_s_own_numbers(tiny_pipeline: Path, dtype: torch.dtype) -> None:
    model = load_model(str(tiny_pipeline), dtype=dtype)
    (embedded,) = model.encode_prompts(["a cat"])
    assert embedded["text"].dtype == dtype
    given = PromptEmbeddings(model).get(["a cat"], torch.device("cpu"))
    assert given["text"].dtype == torch.float32  # latents are, around it
    assert torch.equal(given["text"][0], embedded["text"].float())


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.base: .* has no model_index\.json"):
        load_model(str(tmp_path))


def test_an_unknown_pipeline_class_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(UserError, match=r"is a PixArtAlphaPipeline, which .*give one of .*StableDiffusionPipeline"):
        load_model(str(tmp_path))


def test_weights_that_are_not_here_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"'someone/some-model' is neither a folder here .*rltune models fetch someone/some-model"
    ):
        load_model("someone/some-model")
