"""An exported folder into a repository of the Hugging Face hub, private unless it is asked to be public."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from rltune.config.kinds import NO_LORA
from rltune.errors import RunError, UserError
from rltune.export.card import CARD_FILE
from rltune.export.readme import REPO

LOGIN = "run 'hf auth login' on this machine or set HF_TOKEN; the token needs the right to write"


@dataclass(frozen=True)
class Pushed:
    """What was uploaded."""

    url: str
    files: tuple[str, ...]
    is_private: bool


def check_push(repo: str, kind: str = "lora") -> None:
    """Check, before anything is exported, that an upload can be tried.

    Args:
        repo: ``OWNER/NAME``.
        kind: Of adapter, ``model.adapter.kind``.

    Raises:
        UserError: It is no name of a repository, or this machine has no token, or no LoRA was trained.
    """
    if kind in NO_LORA:
        raise UserError(
            f"--push: the hub's pages are for LoRAs, which {kind} is not, got {repo!r}; export it without, and share "
            "the folder"
        )
    if REPO.fullmatch(repo) is None:
        raise UserError(f"--push: must be OWNER/NAME, got {repo!r}; name a repository of yours")
    if not get_token():
        raise UserError(f"--push: the hub wants to know who uploads to {repo!r}, and there is no token here; {LOGIN}")


def push_folder(folder: Path, repo: str, *, is_private: bool = True, api: Any = None) -> Pushed:
    """Upload every file of an exported folder, and make the repository if it is not there.

    One that is there keeps its visibility, and files of it that are not in the folder.

    Args:
        folder: With a card; files that were put beside it are not uploaded.
        repo: ``OWNER/NAME``.
        is_private: Of a new repository.
        api: The hub; that of ``huggingface_hub`` by default.

    Raises:
        UserError: The folder is no export.
        RunError: The hub refuses, or cannot be reached.
    """
    api = api or HfApi()
    files = exported_files(folder)
    try:
        url = str(api.create_repo(repo, private=is_private, exist_ok=True, repo_type="model"))
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=list(files),
            commit_message="LoRA exported by rltune",
            repo_type="model",
        )
        is_private = bool(api.repo_info(repo, repo_type="model").private)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(f"--push: {folder} was not uploaded to {repo!r} ({what}); {LOGIN}, and try again") from error
    return Pushed(url, files, is_private)


def exported_files(folder: Path) -> tuple[str, ...]:
    """Return what an export wrote into a folder, relative to it: files of its formats, card, experiment and samples.

    Raises:
        UserError: There is no card.
    """
    try:
        formats = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))["formats"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--push: {folder} has no card that says what is in it ({error}); export it again") from error
    named = [file for what in formats.values() for file in what["files"]]
    beside = ("README.md", CARD_FILE, "experiment.yaml", "samples.png", "base.png", "samples/*.png")
    found = {str(file.relative_to(folder)) for pattern in beside for file in folder.glob(pattern)}
    return tuple(sorted(found | {name for name in named if (folder / name).is_file()}))
