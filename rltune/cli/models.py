"""``rltune models``: the weights that rltune knows of, which of them are on this machine, and fetching the others."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rltune.assets import BUILTIN_DIR
from rltune.cli.known_models import KNOWN_MODELS, KnownModel
from rltune.cli.tables import UNBOUNDED
from rltune.cli.terminal import console
from rltune.errors import RltuneError, RunError, UnknownNameError, UserError
from rltune.registry import suggest
from rltune.rewards.weights import WeightsFile, cache_dir, check_hub, explain, format_size

INDEX = "model_index.json"
"""What a folder or a repository of a diffusers pipeline has."""
SMALL_FILES = ("*.json", "*.txt", "*.model")
"""Configurations, vocabularies and indices of sharded weights."""
OTHER_VARIANTS = ("*.fp16*", "*.bf16*", "*.non_ema*", "*onnx*", "*openvino*", "*flax*")
"""The same weights again, of other precisions or for other programs."""
UNREAD = ("safety_checker",)
"""Components that rltune never loads."""


@dataclass(frozen=True)
class PublishedFile:
    """A file that rewards need, and which they are."""

    weights: WeightsFile
    rewards: tuple[str, ...]

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine."""
        return self.weights.find() is not None


@dataclass(frozen=True)
class BaseModel:
    """A diffusers pipeline on this machine."""

    name: str
    pipeline: str
    """Class of diffusers."""
    size_mb: float
    lacking: tuple[str, ...] = ()
    """Components without their weights: a download that was broken off."""


def show_models() -> None:
    """Print what weights there are: files of rewards, base models, and the families that can be trained."""
    from rltune.diffusion.families.base import FAMILIES
    from rltune.diffusion.outline import RENAMED

    families = FAMILIES.names()
    console.print(FileTable(published_files()))
    console.print()
    console.print(_base_table([_builtin(), *cached_base_models()], (*families, *RENAMED)))
    console.print()
    console.print(known_table(KNOWN_MODELS))
    console.print()
    for line in (
        "disk: in 16 bits. card: one image of 1024 px, bfloat16, blocks and tiles checkpointed; computed, not measured",
        "gated: the hub wants its licence accepted. Licences and gates were not verified: each model's page decides",
        f"base models that can be trained are of the class {', '.join(families)}",
        f"files of the Hugging Face hub are in {_hub_cache()}, others in {cache_dir()}",
        "to fetch what is not here: rltune models fetch REWARD, or OWNER/NAME of a base model",
    ):
        console.print(line, style="dim", soft_wrap=True)


def published_files() -> tuple[PublishedFile, ...]:
    """Return every published file that a registered reward needs, once each, in the order of the rewards."""
    from rltune.rewards.base import REWARDS

    files: dict[str, PublishedFile] = {}
    for name in REWARDS.names():
        for weights in REWARDS.card(name).weights:
            known = files.get(weights.source)
            rewards = (*known.rewards, name) if known is not None else (name,)
            files[weights.source] = PublishedFile(weights, rewards)
    return tuple(files.values())


def cached_base_models() -> tuple[BaseModel, ...]:
    """Return the diffusers pipelines in the Hugging Face cache, by name."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(_hub_cache()).repos
    except CacheNotFound:
        return ()
    found = []
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        # the default branch is what a name stands for
        revisions = sorted(repo.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
        folder = revisions[-1].snapshot_path if revisions else None
        index = _read_index(folder / INDEX) if folder is not None else None
        if repo.repo_type == "model" and folder is not None and index is not None:
            found.append(
                BaseModel(repo.repo_id, _class_of(index), repo.size_on_disk / 1e6, tuple(_lacking(folder, index)))
            )
    return tuple(found)


def fetch_models(names: Sequence[str]) -> None:
    """Fetch the files of rewards and base models that are not here, telling what becomes of each.

    Args:
        names: Of registered rewards, ids of base models on the Hugging Face hub, or checkpoints in one file, whose
            settings are fetched.

    Raises:
        UnknownNameError: A name is neither; nothing was fetched.
        RunError: Something could not be fetched; the rest was.
    """
    for name in names:
        _check_name(name)
    failures: list[str] = []
    for name in dict.fromkeys(names):
        if _is_checkpoint(name):
            failures += _fetch_settings(Path(name))
        else:
            failures += _fetch_base(name) if "/" in name else _fetch_reward(name)
    if failures:
        raise RunError("not everything could be fetched\n" + "\n".join(f"  {failure}" for failure in failures))


def _check_name(name: str) -> None:
    from rltune.rewards.base import REWARDS

    if name == "builtin" or name in REWARDS.names() or _is_checkpoint(name):
        return
    if name.count("/") != 1 or not all(name.split("/")):
        raise UnknownNameError(
            f"{name!r} is no reward, and no base model on the Hugging Face hub, which has a name as in OWNER/NAME; "
            f"{suggest(name, REWARDS.names())}"
        )


def _fetch_reward(name: str) -> Iterator[str]:
    """Fetch every file of a reward, and give a message for each that could not be."""
    from rltune.rewards.base import REWARDS

    files = () if name == "builtin" else REWARDS.card(name).weights
    if not files:
        _say(f"{name}: needs no files, or they are in the package")
    for file in files:
        path = file.find()
        try:
            if path is not None:
                file.check(path)
                _say(f"{name}: {file.file} is here already, {path}")
                continue
            _say(f"{name}: fetching {file.file}, {file.size}, {file.licence}, from {file.origin}")
            _say(f"{name}: {file.file} fetched, {file.fetch()}")
        except RltuneError as error:
            yield f"{name}: {error}"


def _is_checkpoint(name: str) -> bool:
    return name.endswith(".safetensors") and Path(name).is_file()


def _fetch_settings(file: Path) -> Iterator[str]:
    """Fetch the settings and tokenizers that a checkpoint in one file is read with, and give a message if not."""
    from huggingface_hub import snapshot_download

    from rltune.diffusion.single_file import published_config, read_header

    repo = ""
    try:
        repo = published_config(read_header(file))
        if (refusal := check_hub(repo, INDEX)) is not None:
            raise refusal
        _say(f"{file}: fetching the settings of {repo}, without weights")
        _say(f"{file}: fetched, {snapshot_download(repo, allow_patterns=list(SMALL_FILES))}")
    except Exception as error:  # noqa: BLE001 - the hub, its transport and the disk raise their own kinds
        yield f"the settings of {file} could not be fetched{f' from {repo}' if repo else ''}: {explain(error, repo)}"


def _fetch_base(name: str) -> Iterator[str]:
    """Fetch what diffusers needs of a pipeline, and give a message if that does not work."""
    if any(model.name == name and not model.lacking for model in cached_base_models()):
        _say(f"{name}: is here already")
        return
    try:
        _download_base(name)
    except Exception as error:  # noqa: BLE001 - the hub, its transport and the disk raise their own kinds
        yield f"{name} could not be fetched: {explain(error, name)}"


def _download_base(name: str) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    from rltune.diffusion.families.base import FAMILIES
    from rltune.diffusion.outline import current_name

    if (refusal := check_hub(name, INDEX)) is not None:
        raise refusal
    try:
        path = Path(hf_hub_download(name, INDEX))
    except RemoteEntryNotFoundError as error:
        raise UserError(f"it has no {INDEX}, so it is no diffusers pipeline") from error
    index = _read_index(path)
    if index is None:
        raise UserError(f"its {INDEX} is not whole")
    FAMILIES.get(current_name(_class_of(index)))  # before gigabytes that nothing here could use
    allowed = [*SMALL_FILES, *(f"{component}/*.safetensors" for component in _components(index))]
    files = snapshot_download(name, allow_patterns=allowed, ignore_patterns=list(OTHER_VARIANTS), dry_run=True)
    bare = _without_weights(_components(index), [file.filename for file in files])
    if bare:
        raise UserError(f"its {', '.join(bare)} has no safetensors weights, and others are not fetched")
    size_mb = sum(file.file_size or 0 for file in files if file.will_download) / 1e6
    _say(f"{name}: fetching {sum(file.will_download for file in files)} files, {format_size(size_mb)}")
    folder = snapshot_download(name, allow_patterns=allowed, ignore_patterns=list(OTHER_VARIANTS))
    _say(f"{name}: fetched, {folder}")


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _read_index(path: Path) -> Mapping[str, Any] | None:
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) else None


def _class_of(index: Mapping[str, Any]) -> str:
    return str(index.get("_class_name", "unknown"))


def _components(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the folders of a pipeline that are read: ``[library, class]`` entries that are not null."""
    entries = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return tuple(name for name, value in entries.items() if value[0] and name[0] != "_" and name not in UNREAD)


def _lacking(folder: Path, index: Mapping[str, Any]) -> Iterator[str]:
    for component in _components(index):
        inside = folder / component
        names = [f"{component}/{path.name}" for path in inside.iterdir()] if inside.is_dir() else []
        if not names or _without_weights((component,), names, (".safetensors", ".bin")):
            yield component


def _without_weights(
    components: Sequence[str], files: Collection[str], endings: tuple[str, ...] = (".safetensors",)
) -> tuple[str, ...]:
    """Return the components that have the configuration of a network among ``files``, and not its weights."""
    return tuple(
        component
        for component in components
        if f"{component}/config.json" in files
        and not any(file.startswith(f"{component}/") and file.endswith(endings) for file in files)
    )


def _builtin() -> BaseModel:
    size_mb = sum(path.stat().st_size for path in (BUILTIN_DIR / "weights").rglob("*") if path.is_file()) / 1e6
    return BaseModel("builtin (in the package)", "StableDiffusionPipeline", size_mb)


@dataclass(frozen=True)
class FileTable:
    """Files of rewards, one row each; where they do not fit beside each other, the facts of a file in two lines."""

    files: Sequence[PublishedFile]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = self._wide()
        width = Measurement.get(console, options.update_width(UNBOUNDED), wide).minimum
        yield wide if width <= options.max_width else self._narrow()

    def _wide(self) -> Table:
        table = _table("file", "size", "licence", "here", "from", "rewards")
        for file in self.files:
            weights = file.weights
            table.add_row(
                weights.file, weights.size, weights.licence, _yes(file.is_here), weights.origin, ", ".join(file.rewards)
            )
        return table

    def _narrow(self) -> Table:
        table = _table("file, from", "size, licence", "here", "rewards")
        for file in self.files:
            weights = file.weights
            table.add_row(
                _two_lines(weights.file, weights.origin),
                _two_lines(weights.size, weights.licence),
                _yes(file.is_here),
                ", ".join(file.rewards),
            )
        return table


def _table(*titles: str) -> Table:
    """Return a table of which the last column alone is wrapped: a name that is cut is no name."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, no_wrap=title != titles[-1], justify="right" if title == "size" else "left")
    return table


def _base_table(models: Sequence[BaseModel], families: Sequence[str]) -> Table:
    table = _table("base model", "size", "class")
    for model in models:
        notes = [] if model.pipeline in families else ["not supported"]
        notes += [f"lacks {', '.join(model.lacking)}"] if model.lacking else []
        table.add_row(model.name, format_size(model.size_mb), "; ".join([model.pipeline, *notes]))
    return table


def known_table(models: Sequence[KnownModel]) -> Table:
    """Return a table of published base models and what they need."""
    table = _table("published, licence", "disk", "card", "hub")
    for model in models:
        gate = Text("gated", style="yellow") if model.is_gated else Text("open")
        named = _two_lines(model.name, model.licence)
        table.add_row(named, format_size(1000 * model.size_gb), f"{model.card_gib} GiB", gate)
    return table


def _yes(is_so: bool) -> Text:
    return Text("yes", style="green") if is_so else Text("no", style="yellow")


def _two_lines(first: str, second: str) -> Text:
    return Text.assemble(first, "\n", (second, "dim"))
