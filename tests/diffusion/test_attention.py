"""Layers of cross-attention with edited logits, against PyTorch's own attention; chains of small UNets with them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from rltune.diffusion import attention
from rltune.diffusion.attention import AttentionPlan, attention_layers, content_tokens, watch
from rltune.diffusion.blocks import checkpoint_blocks
from rltune.diffusion.chain import NO_GRADIENT, GradientPlan
from rltune.diffusion.mix import Mix
from rltune.diffusion.regulation import Words, bumps
from rltune.diffusion.sampler import Sampler
from rltune.errors import UserError
from tests.tiny import byte_tokenizer
from tests.tiny_families import family_of, flux, made, sd3, sdxl, stable_diffusion
from tests.toys import CPU, PROMPTS, Toy, draw, flat_gradient, make_sampler, make_table, reading_toy

T = 4
GUIDANCE = 3.0
EDITED = 3
"""Of the T steps."""


def layers_of(network: nn.Module, wanted: Any = "auto") -> tuple[str, ...]:
    return attention_layers(network, wanted, where="sampler.attention", base="toy")


def sampler_of(toy: Toy, *, num_steps: int = EDITED, guidance: float = GUIDANCE, **settings: Any) -> Sampler:
    plan = AttentionPlan(layers_of(toy.network), num_steps, iterations=3)
    return make_sampler(toy, make_table(T), guidance=guidance, attention=plan, **settings)


def drawn(sampler: Sampler, toy: Toy, images: range = range(2), prompts: tuple[str, ...] = PROMPTS) -> Tensor:
    with torch.no_grad():
        return sampler.latents([prompts[image] for image in images], draw(toy, images, 0), plan=NO_GRADIENT, noise=None)


# ---- one layer


def own_attention(layer: Any, hidden: Tensor, text: Tensor, bias: Tensor) -> Tensor:
    """By PyTorch's attention, with what is added to the logits as its mask."""
    query, key, value = (
        part.unflatten(2, (layer.heads, -1)).transpose(1, 2)
        for part in (layer.to_q(hidden), layer.to_k(text), layer.to_v(text))
    )
    seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return layer.to_out[0](seen.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_layer_attends_by_softmax_of_logits_and_edit_in_the_rows_of_prompts_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = nn.ModuleDict({"attn2": Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)}).to(dtype)
    layer = network["attn2"]
    hidden, text = torch.randn(4, 16, 8).to(dtype), torch.randn(4, 7, 6).to(dtype)  # two images, two rows each
    plain = layer(hidden, text)
    watch(network, ["attn2"])
    assert torch.equal(layer(hidden, text), plain)
    words = Words.of([[1, 3], [5]], CPU)
    heights = torch.randn(2, 2, 1, 2)  # one bump on 4 x 4 places
    plan = AttentionPlan(("attn2",), 1, strength=1.5)
    call = attention._Call(plan, words, (4, 4), attention._Found(hidden, {"attn2": heights.to(dtype)}), {})
    if dtype == torch.bfloat16:
        call.found.heights["attn2"] = heights  # type: ignore[union-attr]
    token = attention._CALL.set(call)
    try:
        found = layer(hidden, text)
    finally:
        attention._CALL.reset(token)
    bias = torch.zeros(4, 2, 16, 7)
    bump_P = bumps(4, 4, CPU)[:, 0]
    for image, places in enumerate([[1, 3], [5]]):
        for word, place in enumerate(places):
            bias[2 + image, :, :, place] = 1.5 * heights[image, :, 0, word, None] * bump_P
    expected = own_attention(layer, hidden, text, bias.to(dtype))
    # of float32 the heights are, and bfloat16 has 8 bits
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert (found[2:] - plain[2:]).abs().max() > 0.02
    torch.testing.assert_close(found[:2], plain[:2], rtol=tolerance, atol=tolerance)


# ---- which layers, which words


def unet(**config: Any) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(32,) * len(config["down_block_types"]), cross_attention_dim=8, **config
        )


def test_auto_names_the_paper_s_layers_in_stable_diffusion() -> None:
    cross, plain = ["CrossAttnDownBlock2D"], ["DownBlock2D"]
    up_cross, up_plain = ["CrossAttnUpBlock2D"], ["UpBlock2D"]
    stable = unet(down_block_types=cross * 3 + plain, up_block_types=up_plain + up_cross * 3)
    found = layers_of(stable)
    assert {".".join(name.split(".")[:2]) for name in found} == {"down_blocks.2", "up_blocks.1"}
    assert len(found) == 2 + 3
    assert layers_of(stable, ["down_blocks.2", "up_blocks.1"]) == found
    xl = unet(down_block_types=plain + cross * 2, up_block_types=up_cross * 2 + up_plain)
    assert {".".join(name.split(".")[:2]) for name in layers_of(xl)} == {"down_blocks.2", "up_blocks.0"}
    assert len(layers_of(xl, ["mid_block"])) == 1


@pytest.mark.parametrize("wanted", ["up_blocks.7", "down", "up_blocks.1.resnets"])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(wanted: str) -> None:
    network = reading_toy().network
    with pytest.raises(
        UserError, match=r"sampler\.attention\.layers: .*got '.*'; there is down_blocks\.0, up_blocks\.0"
    ):
        layers_of(network, [wanted])


@pytest.mark.parametrize("make", [flux, sd3])
def test_networks_without_such_layers_are_refused(make: Any) -> None:
    with pytest.raises(
        UserError, match=r"sampler\.attention: only UNets .*got 'toy', .*Stable Diffusion 1\.x or 2\.x, SDXL"
    ):
        layers_of(family_of(made(make)).network)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a cat", ["cat"]),
        ("a cat on the box.", ["cat", "box"]),
        ("on the, of", ["on", "the", ",", "of"]),  # nothing else is left
        ("", []),
        ("a cat and a dog in a very long box", ["cat", "dog"]),  # the rest is cut off
    ],
)
def test_words_are_the_tokens_that_say_what_is_in_the_picture(prompt: str, words: list[str]) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(prompt, padding="max_length", max_length=16, truncation=True).input_ids
    found = [tokenizer.convert_ids_to_tokens(ids[place]) for place in content_tokens(tokenizer, prompt)]
    assert "".join(found).replace("</w>", " ").split() == words


# ---- chains


def test_an_edit_changes_the_image_and_without_one_no_bit_is_another() -> None:
    toy = reading_toy()
    plain = drawn(make_sampler(toy, make_table(T), guidance=GUIDANCE), toy)
    assert (drawn(sampler_of(toy), toy) - plain).abs().max() > 1e-4
    assert torch.equal(drawn(sampler_of(toy, num_steps=0), toy), plain)
    assert torch.equal(drawn(make_sampler(toy, make_table(T), guidance=GUIDANCE), toy), plain)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_an_image_does_not_depend_on_its_batch(guidance: float) -> None:
    toy = reading_toy()
    sampler = sampler_of(toy, guidance=guidance)
    together = drawn(sampler, toy)
    for image in range(2):
        alone = drawn(sampler, toy, range(image, image + 1))
        torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-9, atol=1e-10)  # other sums in a batch


def test_merged_adapters_are_edited_as_those_beside_the_weights() -> None:
    toy = reading_toy()
    merged = drawn(sampler_of(toy), toy)
    chain = sampler_of(toy).open(PROMPTS[:2], draw(toy, range(2), 0), None)
    with torch.enable_grad():  # every step kept, none merged
        apart = replace(chain, sampler=replace(chain.sampler, num_kept=T)).run(GradientPlan.last(T, T))
    torch.testing.assert_close(merged, apart.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("has_blocks", [False, True])
def test_the_gradient_takes_the_edit_for_a_constant_however_steps_are_kept(has_blocks: bool) -> None:
    """In checkpoints, of steps or of blocks, the edit is that of the first time."""
    toy, gradients = reading_toy(), []
    for num_kept, is_checkpointed in ((T, False), (2, has_blocks), (T, has_blocks)):
        checkpoint_blocks(toy.network, enabled=is_checkpointed, is_told=True)
        x = sampler_of(toy, num_kept=num_kept).latents(
            PROMPTS[:2], draw(toy, range(2), 0), plan=GradientPlan.last(T, T), noise=None
        )
        gradients.append(flat_gradient(x.square().sum(), toy.parameters))
    assert float(gradients[0].norm()) > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-11, atol=1e-13)


def test_an_edit_is_searched_for_once_a_step_and_averaged_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found heights are 1, 2, .. in turn; a checkpoint and the base model, which see the same input, take those."""
    toy, counts = reading_toy(), {True: 0, False: 0}

    def counted(logits_BNPL: Tensor, words: Words, bumps_PG: Tensor, iterations: int) -> Tensor:
        counts[torch.is_grad_enabled()] += 1
        step = -(-counts[True] // len(layers_of(toy.network)))
        return logits_BNPL.new_full((*logits_BNPL.shape[:2], bumps_PG.shape[1], words.index_BW.shape[1]), step)

    monkeypatch.setattr(attention, "regulate", counted)
    chain = sampler_of(toy).open(PROMPTS[:2], draw(toy, range(2), 0), None)

    def observe(step: int, x: Tensor, f: Tensor) -> None:
        chain.predict_base(step, x.detach())

    chain.run(GradientPlan.last(T, T), observe=observe).sum().backward()
    assert counts == {True: EDITED * len(layers_of(toy.network)), False: 0}
    assert chain.attended is not None
    found = [chain.attended._found[step].heights for step in range(EDITED)]
    for expected, heights in zip((1, 0.25 * 1 + 0.75 * 2, 0.25 * 1.75 + 0.75 * 3), found, strict=True):
        for height in heights.values():
            assert (height == expected).all()


@pytest.mark.parametrize("make", [stable_diffusion, sdxl])
def test_pipelines_of_both_kinds_are_edited(make: Any) -> None:
    model = family_of(made(make))
    plan = AttentionPlan(layers_of(model.network), 2, iterations=3)
    shape = model.latent_shape(32, 32)
    toy: Any = model
    plain = make_sampler(toy, model.read_table(num_steps=3, eta=0.0, shape=shape), guidance=2.0)
    x_BCHW = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    images = []
    with torch.no_grad():
        for sampler in (plain, replace(plain, attention=plan), plain):
            images.append(sampler.latents(("a cat", "two red birds"), x_BCHW, plan=NO_GRADIENT, noise=None))
    assert images[1].isfinite().all()
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_adapters_that_share_a_step_are_refused() -> None:
    toy = reading_toy()
    with pytest.raises(UserError, match=r"sampler\.attention: .*share"):
        drawn(sampler_of(toy, mix=Mix(("default",), (1.0,))), toy)
