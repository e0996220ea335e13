from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from rltune.builtin import autoencoder
from rltune.builtin.autoencoder import DECODER_STEPS, reconstruction_loss, refine_decoder, warm_start, whiten
from rltune.builtin.corpus import Corpus
from rltune.builtin.networks import make_f4_autoencoder, make_f8_autoencoder
from rltune.builtin.render import render
from rltune.builtin.scenes import make_scene
from rltune.builtin.workshop import Workshop

CPU = torch.device("cpu")


def pictures(count: int) -> torch.Tensor:
    return (render([make_scene(0, index) for index in range(count)]) * 255).to(torch.uint8)


def test_warm_start_copies_the_outer_levels_bit_by_bit() -> None:
    f4, f8 = make_f4_autoencoder(), make_f8_autoencoder()
    before = {name: value.clone() for name, value in f8.state_dict().items()}
    copied = warm_start(f8, f4)
    source, after = f4.state_dict(), f8.state_dict()
    assert torch.equal(after["encoder.conv_in.weight"], source["encoder.conv_in.weight"])
    assert torch.equal(after["decoder.conv_out.weight"], source["decoder.conv_out.weight"])
    inner, outer = "decoder.up_blocks.{}.resnets.0.conv1.weight", (3, 2)
    assert torch.equal(after[inner.format(outer[0])], source[inner.format(outer[1])])
    untouched = after.keys() - copied
    assert [name for name in untouched if not torch.equal(after[name], before[name])] == []
    assert "decoder.mid_block.resnets.0.conv1.weight" in untouched
    assert len(copied) > 80


@pytest.mark.long
def test_whitening_leaves_decoding_unchanged_and_makes_latents_white() -> None:
    torch.manual_seed(0)
    model = make_f8_autoencoder().eval()
    images = pictures(32)
    network_input = images.float() / 127.5 - 1
    with torch.no_grad():
        before = model.decode(model.encode(network_input).latent_dist.mean).sample
        whiten(model, images, CPU)
        posterior = model.encode(network_input).latent_dist
        after = model.decode(posterior.mean).sample
    # The fold multiplies by W and its inverse in float32; W's condition number is at most sqrt(16 / 4e-4) = 200.
    torch.testing.assert_close(after, before, rtol=0, atol=200 * 2**-23 * 16)
    latents_CN = posterior.mean.transpose(0, 1).flatten(1).double()
    covariance = torch.cov(latents_CN)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert latents_CN.mean(1).abs().max() < 1e-3
    # Directions below the floor keep less than unit variance; none has more.
    assert eigenvalues.max() < 1 + 1e-2
    assert (eigenvalues > 0.99).sum() >= 4


def test_whitening_gives_each_channel_one_posterior_variance() -> None:
    model = make_f8_autoencoder().eval()
    images = pictures(4)
    with torch.no_grad():
        whiten(model, images, CPU)
        std = model.encode(images.float() / 127.5 - 1).latent_dist.std
    assert torch.equal(std, std[:1, :, :1, :1].expand_as(std))


def test_the_loss_of_a_constant_error_is_known() -> None:
    error = torch.full((2, 3, 8, 8), 0.5)
    # L1 + L2 + no edges + 1.5 * (L1 of both means)
    assert reconstruction_loss(error).item() == 0.5 + 0.25 + 1.5 * (0.5 + 0.5)


@pytest.mark.long
def test_refining_trains_the_decoder_and_leaves_the_encoder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoder, "BATCH", 4)
    torch.manual_seed(0)
    model = make_f8_autoencoder().eval().requires_grad_(False)
    images = pictures(8)
    corpus = Corpus(images, (("",),) * 8, torch.zeros(8))
    network_input = images.float() / 127.5 - 1
    latents = model.encode(network_input).latent_dist.mean.half()

    def loss_of(decoder: AutoencoderKL) -> float:
        with torch.no_grad():
            return reconstruction_loss(decoder.decode(latents.float()).sample - network_input).item()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss_before = loss_of(model)
    shop = Workshop(tmp_path, scale=24 / DECODER_STEPS)
    refined = refine_decoder(shop, model, latents, corpus, corpus)
    after = refined.state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert {name.split(".")[0] for name in moved} == {"decoder", "post_quant_conv"}
    # Weights of every layer move; a bias that another layer takes out again may stay.
    assert {name for name in before if name.startswith("decoder") and name.endswith("weight")} <= moved
    # An untrained decoder paints gray; in two dozen steps it learns what colour a picture is: .68 of the loss is left.
    assert loss_of(refined) < 0.8 * loss_before
    assert not refined.training
    assert [name for name, value in refined.named_parameters() if value.requires_grad] == []
    assert shop.load_figures("decoder") is not None
