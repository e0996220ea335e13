"""Tokenizers, text encoders and an autoencoder of the true classes, the smallest that are one, without a download."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.tiny import byte_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def t5_tokenizer() -> T5TokenizerFast:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> Qwen2Tokenizer:
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=1024, additional_special_tokens=marks[1:])
    tokenizer.chat_template = CHAT
    return tokenizer


def with_first_token(tokenizer: Any, token: str) -> Any:
    """Put a token before every text, as Gemma's and Mistral's have it: a text without any would be masked whole."""
    marks = [(token, tokenizer.convert_tokens_to_ids(token))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=marks)
    return tokenizer


def gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS, "<", ">", ":"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return with_first_token(GemmaTokenizer(vocab=vocab, merges=[], model_max_length=300), "<bos>")


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Stands for the processor of text and images that FLUX.2 dev has."""
    marks = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *marks])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = CHAT
    return with_first_token(tokenizer, "<s>")


def clip_tokenizer() -> CLIPTokenizer:
    return byte_tokenizer(77)


def clip_config() -> CLIPTextConfig:
    size = len(clip_tokenizer())
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=32,
        hidden_act="gelu",
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


def t5_encoder(width: int) -> T5EncoderModel:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    kind = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), **sizes, **kind))


def qwen3_config(num_layers: int = 3) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
    )


def gemma2() -> Gemma2Model:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 8}
    return Gemma2Model(Gemma2Config(vocab_size=len(gemma_tokenizer()), **sizes, **heads))


def autoencoder(
    channels: int, *, scale: float, shift: float | None = None, has_quant: bool = True, blocks: int = 2
) -> AutoencoderKL:
    """Downsamples by 2 with two blocks, by 8 with four."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=has_quant,
        use_post_quant_conv=has_quant,
    )


def lively(pipeline: Any) -> Any:
    """Redraw every weight: networks begin with layers of zeros, behind which a prompt would not be seen."""
    generator = torch.Generator().manual_seed(7)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for parameter in component.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            norm = getattr(component, "bn", None)
            if norm is not None:
                norm.running_mean.normal_(std=0.1, generator=generator)
                norm.running_var.uniform_(0.5, 2.0, generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
