"""``rltune sample``: one grid, a row of blocks per model, the same noise in every row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rltune.cli.arguments import at_home
from rltune.cli.noise import Wish
from rltune.cli.terminal import console
from rltune.errors import UserError
from rltune.records import check_schema

if TYPE_CHECKING:
    from rltune.config.experiment import RunConfig

NUM_DEFAULT_PROMPTS = 4
DEFAULT_OUTPUT = Path("samples.png")
NOTHING = Wish(None)


Repeated = list[str] | None


def sample(
    loras: Annotated[
        list[Path] | None, typer.Argument(help="LoRA folders or files; none: the base model.", callback=at_home)
    ] = None,
    prompts: Annotated[
        Repeated, typer.Option("--prompt", help="What to draw; repeatable. Else held-out prompts.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.", callback=at_home)] = Path(
        "samples.png"
    ),
    base: Annotated[
        str | None, typer.Option(help="Base model; that of the first LoRA's run if left out.", callback=at_home)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; the run's, else the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; the run's, else the model's.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt; the run's, else none.")] = None,
    base_steps: Annotated[
        int | None, typer.Option(min=0, help="First steps left to the base model; the run's, else 0.")
    ] = None,
    attention: Annotated[
        float | None, typer.Option(min=0, max=10, help="Strength of sampler.attention; the run's, else 0, off.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image to fill, for inpainting.", callback=at_home)] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Where to fill it, white, of the same size; else at random.", callback=at_home)
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise, the same for every row.")] = 0,
    optimise: Annotated[str | None, typer.Option(help="noise: rows whose x_T is optimised besides.")] = None,
    rewards: Annotated[Repeated, typer.Option("--reward", help="To raise: NAME or NAME=WEIGHT. Repeatable.")] = None,
    options: Annotated[Repeated, typer.Option("--option", help="Of a reward: NAME.KEY=VALUE. Repeatable.")] = None,
    judges: Annotated[Repeated, typer.Option("--judge", help="Reward to measure alone. Repeatable.")] = None,
    optimise_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the noise; 20 if left out.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=0, help="Length of one, of the noise's norm; 0.1 if left out.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Last sampling steps with gradient; else all.")] = None,
) -> None:
    """Draw an image grid: the base model beside LoRAs, same prompts and same seeds."""
    sample_grid(
        loras or [],
        prompts or [],
        output,
        base=base,
        num_steps=steps,
        guidance=guidance,
        negative=negative,
        num_base_steps=base_steps,
        attention=attention,
        image=image,
        mask=mask,
        num_images=images,
        seed=seed,
        wish=Wish(optimise, rewards or (), options or (), judges or (), optimise_steps, rate, k),
    )


def sample_grid(
    loras: Sequence[Path],
    prompts: Sequence[str],
    output: Path,
    *,
    base: str | None,
    num_steps: int | None,
    guidance: float | None,
    negative: str | None = None,
    num_base_steps: int | None = None,
    attention: float | None = None,
    image: Path | None = None,
    mask: Path | None = None,
    num_images: int,
    seed: int,
    wish: Wish = NOTHING,
) -> None:
    """Draw the base model and each LoRA on the same prompts and noise, and write one labelled PNG.

    Where ``wish`` says so, a row under each has the same with the noise optimised.

    Raises:
        UserError: ``output`` cannot be written; a LoRA cannot be read, or was trained on another base model; no step is
            left to the LoRAs, or the base model's attention cannot be edited.
    """
    from rltune.canvas import Canvas
    from rltune.cli.output_file import check_output, save_picture
    from rltune.diffusion.adapter_files import find_adapter_file
    from rltune.diffusion.outline import find_pipeline
    from rltune.orchestration.inspection import check_reach
    from rltune.training.grids import labelled_grid
    from rltune.training.quiet import quiet_libraries

    wish.check()
    check_output(output)
    quiet_libraries()
    files = [find_adapter_file(path) for path in loras]
    cards = [_read_card(path) for path in loras]
    bases = {card["base_model"] for card in cards if card} | ({base} if base else set())
    if len(bases) > 1:
        raise UserError(f"sample: the LoRAs belong to different base models, {sorted(bases)}; sample them apart")
    card = next((card for card in cards if card), None)
    update = {"steps": num_steps, "guidance": guidance, "negative": negative, "base_steps": num_base_steps}
    config = _config_of(card, files, base, {name: value for name, value in update.items() if value is not None})
    if attention is not None:
        config = _with_attention(config, attention)
    shown = _asked(config, prompts, image, mask, card or {})
    if any(isinstance(prompt, Canvas) for prompt in shown):
        config = config.model_copy(update={"task": "inpaint"})
    if find_pipeline(config.model.base, config.model.revision, config.model.config) is None:
        check_reach(config.model.base)  # in a second, where the hub's library would try for 40
    models = ["base", *lora_labels(loras)]
    rows, labels = _rows(config, files, shown, models, wish, num_images=num_images, seed=seed)
    labels = [*(["given"] if config.task == "inpaint" else []), *labels]
    written = save_picture(labelled_grid(rows, labels, shown, num_images=num_images), output)
    console.print(f"{written}: {len(rows)} rows ({', '.join(labels)}), {num_images} images for each of", soft_wrap=True)
    for prompt in shown:
        console.print(f"  {prompt}", soft_wrap=True)


def _rows(
    config: "RunConfig",
    files: Sequence[Path],
    prompts: Sequence[str],
    labels: Sequence[str],
    wish: Wish,
    *,
    num_images: int,
    seed: int,
) -> tuple[list[Any], list[str]]:
    """Return the rows of the grid and what they are called; print what was gained where noise is optimised."""
    from rltune.cli.noise import aim_of, show_pairs
    from rltune.training.grids import draw_rows, given_row
    from rltune.training.noise_rows import paired_rows

    if wish.kind is None:
        return draw_rows(config, files, prompts, num_images=num_images, seed=seed), list(labels)
    aim = aim_of(wish, config.model.base, prompts)
    pairs = list(paired_rows(config, files, prompts, aim, num_images=num_images, seed=seed))
    show_pairs(pairs, labels, aim)
    rows = [row.pixels_NHW3 for pair in pairs for row in (pair.drawn, pair.optimised)]
    names = [name for label in labels for name in (label, f"{label} + noise")]
    return [*given_row(prompts, rows[0].shape[1:3], num_images), *rows], names


def _asked(config: Any, prompts: Sequence[str], image: Path | None, mask: Path | None, card: Any) -> list[str]:
    """Return the prompts to draw: those asked for, else the card's, else the first held-out ones; with their pictures.

    Raises:
        UserError: There is a picture without a prompt, or a mask without a picture, or the prompts cannot be read.
    """
    from rltune.training.canvases import BUILTIN, canvas_of, check_pictures, prompt_set

    if mask is not None and image is None:
        raise UserError(f"sample: --mask is of an image, got {str(mask)!r} alone; give --image too")
    if image is not None and not prompts:
        raise UserError(
            f"sample: --image needs a prompt for what is to be drawn, got {str(image)!r} alone; give --prompt"
        )
    rows: Sequence[dict[str, Any]] = []
    if image is not None:
        rows = [{"prompt": prompt, "image": str(image), "mask": str(mask) if mask else ""} for prompt in prompts]
    elif config.task == "inpaint" and prompts and config.model.base != "builtin":
        raise UserError(f"sample: this fills images, got --prompt {prompts[0]!r} alone; give --image too")
    elif config.task == "inpaint" and prompts:
        rows = [{"prompt": prompt, "image": BUILTIN} for prompt in prompts]
    elif config.task == "inpaint":
        rows = card.get("pictures", [])
    if rows:
        masks, where = config.prompts.masks, "sample: --image"
        shown: list[str] = [canvas_of(row, Path.cwd(), where=where, index=i, masks=masks) for i, row in enumerate(rows)]
        check_pictures(shown)
        return shown
    # a card has the run's own prompts: the file they were in may be another by now, or elsewhere
    told = card.get("prompts") if config.task != "inpaint" else None
    return list(prompts or (told or prompt_set(config, "eval").prompts)[:NUM_DEFAULT_PROMPTS])


def _with_attention(config: "RunConfig", strength: float) -> "RunConfig":
    """Return the experiment with another strength of the edit of cross-attention."""
    edit = config.sampler.attention.model_copy(update={"strength": strength})
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"attention": edit})})


def lora_labels(paths: Sequence[Path]) -> list[str]:
    """Return what each LoRA is called: its folder or file, with as many folders above as tell all of them apart."""
    from rltune.diffusion.conditioning import MIX_FILE
    from rltune.diffusion.lora_files import WEIGHT_FILE

    parts = []
    for path in paths:
        whole = path.resolve()
        if whole.suffix == ".safetensors":  # an export's file is called the same in every folder
            whole = whole.parent if whole.name == WEIGHT_FILE else whole.with_suffix("")
        if whole.name == MIX_FILE:
            whole = whole.parent
        parts.append(whole.parts)
    for depth in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels) | {"base"}) == len(set(parts)) + 1:
            return labels
    return [str(path) for path in paths]


def _config_of(
    card: dict[str, Any] | None, files: Sequence[Path], base: str | None, update: dict[str, Any]
) -> "RunConfig":
    """Return the experiment that LoRAs come from, or defaults for those that come without one, sampled as is asked.

    Raises:
        UserError: No step is left to the LoRAs.
    """
    from rltune.config.experiment import RunConfig
    from rltune.runs.record import base_of

    # without a card nothing is scored, so the reward does not matter
    config = RunConfig.model_validate(card["experiment"] if card else {"rewards": {"brightness": {}}})
    sampler = config.sampler.model_copy(update=update)
    if sampler.steps is not None and sampler.base_steps >= sampler.steps:
        raise UserError(
            f"sample: --base-steps must leave the LoRA some of the {sampler.steps} steps, got {sampler.base_steps}"
        )
    own = next((base_of(path.parent, config.model.base) for path in files), config.model.base)
    model = config.model.model_copy(update={"base": base, "config": None, "drop": ()} if base else {"base": own})
    return config.model_copy(update={"sampler": sampler, "model": model})


def _read_card(path: Path) -> dict[str, Any] | None:
    card = (path if path.is_dir() else path.parent) / "rltune.json"
    if not card.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(card.read_text())
    except ValueError as error:
        raise UserError(f"sample: {card} is damaged ({error}); export the LoRA again, or delete this file") from error
    check_schema(content, card)
    return content
