"""``README.md`` of an exported LoRA: what ``rltune.json`` says, for people and for the Hugging Face site.

All of it is made from the card. Text of a user (prompts, names, settings) is escaped: it is neither HTML nor Markdown.
"""

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from rltune.diffusion.conditioning import MIX_FILE
from rltune.export.conditioning import script
from rltune.redaction import redact

README_FILE = "README.md"
LONGEST = 300
"""Characters of a prompt that are shown; ``rltune.json`` has the whole of it."""
REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""``OWNER/NAME`` of the hub."""
MARKS = re.compile(r"([\\`*_\[\]|~#$!])")
FAMILY_TAGS = {
    "StableDiffusionPipeline": ["stable-diffusion"],
    "StableDiffusionXLPipeline": ["stable-diffusion-xl"],
    "StableDiffusion3Pipeline": ["sd3"],
    "FluxPipeline": ["flux"],
}
"""As the training scripts of diffusers tag their LoRAs."""


def write_readme(folder: Path, card: Mapping[str, Any], *, family: str) -> None:
    """Write the README of an exported folder.

    Args:
        folder: Of the LoRA; pictures that are there are shown.
        card: What ``card_of`` returned.
        family: Class of the base model's pipeline.
    """
    images = sorted((folder / "samples").glob("*.png"), key=lambda file: int(file.stem))
    body = "\n".join(_body(card, family=family, has_base=(folder / "base.png").is_file()))
    front = front_matter(card, [f"samples/{file.name}" for file in images], family=family)
    text = f"---\n{front}\n---\n\n{body}\n"
    (folder / README_FILE).write_text(text, encoding="utf-8")


def front_matter(card: Mapping[str, Any], images: Sequence[str], *, family: str) -> str:
    """Return the YAML that the Hugging Face site reads.

    A base model that is no repository of the hub is left out, since the site refuses it there, and so is the licence
    of any but the built-in model's: a LoRA is bound by its base model's, which its owner's page states.
    """
    base, prompts = card["base_model"], card["prompts"]
    kind = [] if "conditioning" in card else ["lora", "template:sd-lora"]
    is_repo = REPO.fullmatch(base) is not None and not Path(base).exists()
    data = ModelCardData(
        license="apache-2.0" if base == "builtin" else None,
        library_name="diffusers",
        pipeline_tag="image-to-image" if card.get("pictures") else "text-to-image",
        base_model=base if is_repo else None,
        tags=["diffusers", *kind, *FAMILY_TAGS.get(family, []), "reward-finetuning", "rltune"],
        widget=[
            {"text": shortened(prompt), "output": {"url": image}}
            for prompt, image in zip(prompts, images, strict=False)
        ],
    )
    if is_repo:
        data["base_model_relation"] = "adapter"
    return data.to_yaml()


def shortened(text: str) -> str:
    """Return a text on one line, without secrets, and no longer than is shown."""
    line = " ".join(redact(text).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 4]} ..."


def plain(text: object) -> str:
    """Return a user's text so that Markdown and HTML show it as it is."""
    return MARKS.sub(r"\\\1", html.escape(shortened(str(text))))


def _body(card: Mapping[str, Any], *, family: str, has_base: bool) -> Iterator[str]:
    base, soup, mix = card["base_model"], card.get("soup"), card.get("conditioning")
    title = ", ".join(filter(None, [card["run"], card["trial"] if soup else f"trial {card['trial']}"]))
    revision = f", revision {plain(card['base_revision'])}" if card["base_revision"] else ""
    by = f"rltune {plain(card['rltune'])}"
    trained = ", ".join(plain(row["name"]) for row in card["rewards"] if row["weight"])
    how = f"mixed by {by} of {len(soup['weights'])} LoRAs, not trained" if soup else f"trained by {by} on {trained}"
    if soup and soup["method"] == "basis":
        how = f"the sum of {len(soup['weights'])} LoRAs that were trained together by {by}"
    yield f"# {('Prompt mix' if mix['numbers'] else 'Words') if mix else 'LoRA'} {plain(title)}\n"
    what, more = "A LoRA", "It has no trigger word: prompts are those of the base model."
    if mix:
        what = f"{mix['numbers']} numbers"
        more = (
            "Each is of a sampling step, at which the network is told (1 - lambda) of the embedding of the prompt, and "
            f'lambda of that of "{plain(mix["styled"])}". The weights stay those of the base model.'
        )
    if mix and not mix["numbers"]:
        what, how = "Words", f"chosen by {by} by {trained}"
        more = f'A prompt is written as "{plain(mix["styled"])}". Nothing was trained.'
    yield f"{what} for {plain(base)}{revision}, {how}. {more}\n"
    yield f"![samples with {'it' if mix else 'the LoRA'}](samples.png)\n"
    if has_base:
        yield "The base model's images of the same prompts and noise:\n\n![samples of the base model](base.png)\n"
    use = f"{card['strength']}." if mix or "basis" in card else "load it at weight 1: its scale is in the weights."
    yield f"## Use\n\n{use[0].upper()}{use[1:]}\n"
    for name, what in card["formats"].items():
        yield f"- {plain(name)}: {', '.join(f'`{file}`' for file in what['files'][:3])}"
    yield (
        '\n```python\npipeline.load_lora_weights("FOLDER OR REPOSITORY")\n```\n'
        if "diffusers" in card["formats"]
        else ""
    )
    if mix and mix["numbers"] and family == "StableDiffusionPipeline":
        yield f"In diffusers alone:\n\n```python\n{redact(script(base, MIX_FILE))}\n```\n"
    yield from _measured(card)
    yield from _effect(card)
    yield "## Sample prompts\n"
    yield from (f"{i}. {plain(prompt)}" for i, prompt in enumerate(card["prompts"], 1))
    yield from _mixed(card) if soup else _settings(card)


def _measured(card: Mapping[str, Any]) -> Iterator[str]:
    on, roles = card["measured_on"], {row["name"]: row for row in card["rewards"]}
    yield "## What it measured\n"
    trained = "with it" if "conditioning" in card else "LoRA"
    yield f"| reward or judge | base model | {trained} | gain | weight in training | licence of its weights |"
    yield "|---|---|---|---|---|---|"
    for figure in card["figures"]:
        row = roles.get(figure["name"], {"weight": 0.0, "licence": ""})
        weight = "in its LoRAs" if row["weight"] is None else _short(row["weight"]) if row["weight"] else "judge"
        base = "" if figure["base"] is None else f"{figure['base']:.4g}"
        yield (
            f"| {plain(figure['name'])} | {base} | {interval(figure['value'], figure['half_width'])} | "
            f"{interval(figure['gain'], figure['gain_half_width'], sign='+')} | {weight} | "
            f"{plain(row['licence']) or 'none'} |"
        )
    fresh = f", {on['fresh_prompts']} of which no trial was chosen by" if on["fresh_prompts"] else ""
    yield (
        f"\nMeans over {on['prompts']} prompts that were not trained on{fresh}, with 95 % intervals by Student's t "
        "over prompts. Gains are paired with the base model by prompt and noise.\n"
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def interval(value: float, half: float | None, *, sign: str = "") -> str:
    """Return a mean and its interval, as text."""
    return f"{value:{sign}.4g}" if half is None else f"{value:{sign}.4g} ± {half:.2g}"


def _effect(card: Mapping[str, Any]) -> Iterator[str]:
    effect = card["effect"]
    yield "## How strong it is\n"
    pixels = f"moves the colour of a pixel by {effect['image']:.2%} of the range on average, in the samples.\n"
    weights = f"What it adds to the weights of its layers is {effect['update'] or 0:.2%} of them (root mean square)."
    yield f"It {pixels}" if effect["update"] is None else f"{weights} At strength 1 it {pixels}"
    for name, what in card["formats"].items():
        halves = {key: value for key, value in what["reloaded"].items() if key not in ("difference", "effect")}
        said = "".join(f"; in {key} by up to {value:.2g}" for key, value in halves.items())
        yield (
            f"- {plain(name)}: loaded into a fresh pipeline, it differs from the trained adapter by up to "
            f"{what['reloaded']['difference']:.1g} in float32{said} (RGB in [0, 1])"
        )
    yield ""


WAYS = {
    "exact": "Its update is the sum of theirs by these weights.",
    "basis": "It is the sum, by these weights, of LoRAs that were trained together, one for each reward.",
    "factors": "Its factors are the sums of theirs by these weights, as AlignProp mixes LoRAs.",
}


def _mixed(card: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a soup was made of."""
    soup, known = card["soup"], card["soup"].get("settings", {})
    paths = list(dict.fromkeys(path for settings in known.values() for path in settings))
    yield f"\n## How it was made\n\n{WAYS[soup['method']]}\n"
    yield "| " + " | ".join(["LoRA", "weight", *(plain(path) for path in paths)]) + " |"
    yield "|---" * (len(paths) + 2) + "|"
    for name, weight in soup["weights"].items():
        settings = known.get(name, {})
        values = (plain(_short(settings[path])) if path in settings else "" for path in paths)
        yield f"| {' | '.join([plain(name), _short(weight), *values])} |"
    if soup["error"]:
        yield f"\nIt was reduced to a lower rank, and lacks {soup['error']:.2g} of that update.\n"
    yield "\n`rltune.json` has every figure and the prompts.\n"


def _settings(card: Mapping[str, Any]) -> Iterator[str]:
    sampler = {name: value for name, value in card["experiment"]["sampler"].items() if value not in (None, "", 0)}
    yield "\n## How it was made\n\n| setting | value |\n|---|---|"
    rows = {**card["settings"], **{f"sampler.{name}": value for name, value in sampler.items()}}
    yield from (f"| {plain(name)} | {plain(_short(value))} |" for name, value in rows.items())
    yield (
        f"\n`experiment.yaml` has all of them: `{card['command']}` trains it again. `rltune.json` has every figure, "
        "the prompts and the versions of all libraries.\n"
    )
