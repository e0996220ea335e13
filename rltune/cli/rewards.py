"""``rltune rewards`` and ``rltune rewards check``: what can be trained on, and proof that it works here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rltune.cli.show import first_line
from rltune.cli.terminal import console, marked
from rltune.errors import RltuneError, UserError


def show_rewards() -> None:
    """Print every reward with what it is, its scale and licence, and whether its weights are on this machine."""
    from rltune.rewards.base import REWARDS, Card, has_gradient

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("reward", "gradient", "weights", "what it says"):
        table.add_column(title)
    for name in REWARDS.names():
        card: Card = REWARDS.card(name)
        notes = "; ".join(part for part in (card.scale, card.licence if card.has_licence else "") if part)
        says = Group(first_line(REWARDS.get(name).__doc__), Text(notes, style="dim"))
        table.add_row(name, "yes" if has_gradient(name) else "no", _weights(card), says)
    console.print(table)
    console.print(
        "\nThose without gradient can be objectives and judges, or be trained on with ddpo, dpok or dag. A reward of "
        "your own: reward: module:function. Is it right here? rltune rewards check NAME",
        style="dim",
    )


def _weights(card: Any) -> Text:
    if not card.weights:
        return Text("built in" if card.is_shipped else "none", style="dim")
    from rltune.rewards.weights import format_size

    size = format_size(card.size_mb)
    return Text(f"{size}\nto fetch", style="yellow") if card.missing else Text(f"{size}\non disk", style="green")


def check_reward(
    name: str, *, images: Sequence[Path], prompts: Sequence[str], options: Sequence[str], device: str | None
) -> None:
    """Print what a reward does with images, and everything that training would stumble over.

    Raises:
        UserError: The reward, an option, an image or the number of prompts is wrong.
        RunError: Its weights are not on this machine.
        RltuneError: It does not do what training asks; what has been printed says why.
    """
    from rltune.training.checking import prove
    from rltune.training.quiet import quiet_libraries
    from rltune.training.rewards import build_reward, compares_images

    quiet_libraries()
    section, where = section_of(name, options), device_of(device)
    batch, texts = _batch(images, prompts, sees_group=compares_images(name, section))
    reward = build_reward(name, section).to(where)
    proof = prove(name, reward, batch.to(where), texts)

    shown = [f"{prompt} ({path.name})" for prompt, path in zip(texts, images, strict=True)] if images else texts
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("image", "score", f"metric{f', {reward.metric_unit}' if reward.metric_unit else ''}", "|gradient|"):
        table.add_column(title, justify="left" if title == "image" else "right")
    norms = proof.gradient_norms or (None,) * len(texts)
    for text, value, metric, norm in zip(shown, proof.scores, proof.metrics, norms, strict=True):
        table.add_row(text, f"{value:.4f}", f"{metric:.4f}", "none" if norm is None else f"{norm:.3g}")
    console.print(table)
    for label, fact in _facts(name, proof, batch, where).items():
        console.print(marked(f"{label:>12} ", "dim", fact), soft_wrap=True)
    if proof.faults:
        raise RltuneError(f"reward {name!r}: " + "; ".join(proof.faults))
    console.print(marked("ok ", "green", "finite, in its range, and no image moves another's score"))


def section_of(name: str, options: Sequence[str]) -> Any:
    """Return the settings of a reward that is asked for by its name or as ``module:name``; loads nothing.

    Raises:
        UserError: There is no such reward, or an option is wrong.
    """
    from rltune.config.sections import RewardConfig
    from rltune.rewards.base import REWARDS

    section = RewardConfig(options=read_options(options))
    if ":" in name:
        return section.model_copy(update={"reward": name})
    REWARDS.check(name, section.options)
    return section


def device_of(name: str | None) -> Any:
    """Return a torch device by its name: without one, cuda where it is there."""
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _facts(name: str, proof: Any, batch: Any, device: Any) -> dict[str, str]:
    low, high = proof.value_range
    height, width = batch.shape[-2:]
    size = f"{len(batch)} images of {width} x {height} on {device}"
    facts = {"range": f"{low:g} to {high:g}"}
    time = f"{proof.forward_ms:.3g} ms without gradient"
    if proof.backward_ms is not None:
        time += f", {proof.backward_ms:.3g} ms with it"
    facts["time"] = f"{time}: {size}"
    memory = f"weights {_size(proof.weights_bytes)}"
    if proof.activation_bytes is not None:
        memory += f", activations {_size(proof.activation_bytes)}"
    facts["memory"] = memory
    facts["independence"] = f"{proof.leak:.2g} (largest effect of other images; rounding is below 1e-4)"
    return facts


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Return ``key=value`` pairs as a mapping; values are YAML, as after ``--set``.

    Raises:
        UserError: A pair is not one.
    """
    from rltune.config.yamlfile import YamlError, read_yaml

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        try:
            if not equals or not key:
                raise ValueError
            options[key], _, _ = read_yaml(text)
        except (ValueError, YamlError) as error:
            raise UserError(f"--option: must be KEY=VALUE, got {pair!r}") from error
    return options


def _batch(images: Sequence[Path], prompts: Sequence[str], *, sees_group: bool) -> tuple[Any, list[str]]:
    """Return images ``(B, 3, H, W)`` and a prompt each: those given, or scenes of the built-in world."""
    import random

    from rltune.builtin.render import render
    from rltune.builtin.scenes import distinct_scenes

    if images:
        return read_images(images, prompts)
    scenes = distinct_scenes(0, 4, is_heldout=True)
    captions = [scene.caption(random.Random(i)) for i, scene in enumerate(scenes)]
    if sees_group:
        captions = [captions[0], captions[0], captions[2], captions[2]]
    if prompts and len(prompts) not in (1, 4):
        raise UserError(
            f"--prompt: without images there are 4 built-in scenes; give one prompt or 4, got {len(prompts)}"
        )
    return render(scenes), list(prompts) * (4 // len(prompts)) if prompts else captions


def read_images(images: Sequence[Path], prompts: Sequence[str]) -> tuple[Any, list[str]]:
    """Return image files as ``(B, 3, H, W)`` and a prompt each, of one for all or one for each.

    Raises:
        UserError: A file is no image, they differ in size, or the number of prompts is wrong.
    """
    import torch

    from rltune.rewards.references import read_image

    tensors = [read_image(path) for path in images]
    if len({tensor.shape for tensor in tensors}) > 1:
        sizes = ", ".join(dict.fromkeys(f"{tensor.shape[2]} x {tensor.shape[1]}" for tensor in tensors))
        raise UserError(f"--image: images must be of one size, got {sizes}; check one at a time")
    if len(prompts) not in (1, len(images)):
        raise UserError(f"--prompt: give one, or one an image ({len(images)}), got {len(prompts)}")
    return torch.stack(tensors), list(prompts) if len(prompts) == len(images) else list(prompts) * len(images)
