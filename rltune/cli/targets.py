"""What ``rltune evaluate`` is given: runs, LoRAs and base models, and the experiment that they share."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rltune.errors import UserError
from rltune.records import check_schema
from rltune.runs.addresses import is_address

if TYPE_CHECKING:
    from rltune.config.experiment import RunConfig
    from rltune.training.assessment import NoiseOf

CARD = "rltune.json"
INDEX = "model_index.json"


@dataclass(frozen=True)
class Origin:
    """Where an experiment is from: what it was measured on last, and how to load the base model again."""

    config: "RunConfig"
    prompts: Sequence[Any]
    """Those that its figures are of, as a card keeps them."""
    noise: "NoiseOf"
    only: tuple[str, ...] = ()
    """Rewards and judges that were asked for; all of the experiment's if left out."""
    stands_in: str = "."
    """Folder that its relative paths are meant from."""


@dataclass(frozen=True)
class Target:
    """One thing that is measured."""

    label: str
    path: Path | None = None
    """Of a LoRA file, or of a trial's checkpoint."""
    origin: Origin | None = None
    """None where a LoRA comes without a card, and of a base model."""
    is_checkpoint: bool = False
    base: str | None = None
    """Only of a base model."""


@dataclass(frozen=True)
class Asked:
    """What the options change of the experiment that targets come with."""

    base: str | None = None
    prompts: Path | None = None
    rewards: tuple[str, ...] = ()
    images: int | None = None
    sampler: dict[str, Any] = field(default_factory=dict)


def find_targets(names: Sequence[str], picks: Sequence[str], command: str) -> list[Target]:
    """Return what each name stands for: a run folder its picks, a LoRA itself, anything else a base model.

    Raises:
        UserError: A folder is none of these, or a pick is none of its run.
    """
    found: list[Target] = []
    for name in names:
        if is_address(name):
            found += _of_run(name, picks)
            continue
        path = Path(name)
        if (path / "results.jsonl").is_file():
            found += _of_run(path, picks)
        elif (path / INDEX).is_file() or not path.exists():
            if not path.exists() and (path.suffix == ".safetensors" or name.startswith((".", "/"))):
                raise UserError(f"{command}: {name}: no such file or folder; name a run, a LoRA or a base model")
            found.append(Target("base", base=name))
        else:
            found.append(_of_lora(path, command))
    return found


def _of_run(path: str | Path, picks: Sequence[str]) -> list[Target]:
    from rltune.export.card import measured_again
    from rltune.export.picks import pick_trial
    from rltune.runs.record import read_record, read_run, settled, standing_where_started, with_own_prompts

    folder, experiment = read_run(path)
    targets = []
    with standing_where_started(folder):
        for pick in picks or ("knee",):
            result = pick_trial(pick, folder, experiment)
            record = read_record(folder)
            config = with_own_prompts(settled(experiment.concrete(result.values), record), folder, record)
            told = measured_again(result, folder, config)
            origin = Origin(config, told["prompts"], told["noise"], stands_in=str(Path.cwd()))
            checkpoint = folder.path / result.checkpoint
            folder.bring(checkpoint)
            targets.append(Target(f"{folder.name}/{result.trial}", checkpoint, origin, is_checkpoint=True))
    return targets


def _of_lora(path: Path, command: str) -> Target:
    from rltune.cli.sample import lora_labels
    from rltune.diffusion.adapter_files import find_adapter_file

    (label,) = lora_labels([path])
    return Target(label, find_adapter_file(path).resolve(), _origin_of(path, command))


def _origin_of(path: Path, command: str) -> Origin | None:
    """Return what the card beside a LoRA says; None where there is none."""
    from rltune.config.experiment import RunConfig
    from rltune.runs.record import base_of
    from rltune.training.heldout import search_prompts

    card_file = (path if path.is_dir() else path.parent) / CARD
    if not card_file.is_file():
        return None
    try:
        card = json.loads(card_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{command}: {card_file} is damaged ({error}); export the LoRA again") from error
    check_schema(card, card_file)
    config = RunConfig.model_validate(card["experiment"])
    told = card.get("measured_again")
    precision = config.resources.precision if told is None else told["precision"]
    model = {"base": base_of(card_file.parent, config.model.base), "revision": card["base_revision"]}
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "resources": config.resources.model_copy(update={"precision": precision}),
        }
    )
    if told is None:  # of a version that did not keep them
        return Origin(config, search_prompts(config), "fresh")
    return Origin(config, told["prompts"], told["noise"])


def shared_origin(targets: Sequence[Target], asked: Asked, command: str) -> Origin:
    """Return the experiment that all targets are measured by: the first that comes with one, changed as asked.

    Raises:
        UserError: They have different base models, or no target says what rewards or prompts there are.
    """
    from rltune.config.experiment import RunConfig
    from rltune.config.sections import RewardConfig
    from rltune.runs.metrics import JUDGES
    from rltune.training.canvases import kept_form, prompt_set
    from rltune.training.heldout import distinct

    origins = [target.origin for target in targets if target.origin is not None]
    named = [asked.base, *(target.base for target in targets), *(origin.config.model.base for origin in origins)]
    bases = dict.fromkeys(base for base in named if base)
    if len(bases) > 1:
        raise UserError(f"{command}: these belong to different base models, {sorted(bases)}; measure them apart")
    if not bases:
        raise UserError(f"{command}: a LoRA without a card does not say whose it is; give --base")
    origin = origins[0] if origins else None
    if origin is None and not asked.rewards:
        raise UserError(f"{command}: nothing says what to measure; give --rewards, see 'rltune rewards'")
    config = origin.config if origin else RunConfig.model_validate({"rewards": {"brightness": {}}})
    config = config.model_copy(update={"model": config.model.model_copy(update={"base": next(iter(bases))})})
    if asked.rewards:
        sections = {name: config.rewards.get(name, RewardConfig()) for name in asked.rewards if name not in JUDGES}
        # nothing is trained, so that a reward without gradient is as good
        rewards = {name: section.model_copy(update={"weight": 0.0}) for name, section in sections.items()}
        judges = tuple(name for name in asked.rewards if name in JUDGES)
        update = {"rewards": rewards, "objectives": (), "constraints": {}}
        config = config.model_copy(update={**update, "evaluate": config.evaluate.model_copy(update={"judges": judges})})
    if asked.images is not None:
        evaluate = config.evaluate.model_copy(update={"images_per_prompt": asked.images})
        config = config.model_copy(update={"evaluate": evaluate})
    if asked.sampler:
        config = config.model_copy(update={"sampler": config.sampler.model_copy(update=asked.sampler)})
    if asked.prompts is None and origin is not None:
        return Origin(config, origin.prompts, origin.noise, asked.rewards, origin.stands_in)
    if asked.prompts is None and config.model.base != "builtin":
        raise UserError(f"{command}: nothing says what to draw; give --prompts, a file with one prompt a line")
    source = "builtin-heldout" if asked.prompts is None else str(asked.prompts)
    stands_in = "." if origin is None else origin.stands_in
    held = config.model_copy(update={"prompts": config.prompts.model_copy(update={"eval": source})})
    prompts = distinct(prompt_set(held, "eval").prompts)
    kept = kept_form(prompts if asked.prompts else prompts[: config.evaluate.prompts])
    return Origin(config, kept, "fresh", asked.rewards, stands_in)
