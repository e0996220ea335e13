"""Uploads to a hub that is made up; what the real one is called with is ``huggingface_hub``'s."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from rltune.errors import RunError, UserError
from rltune.export import push
from rltune.export.push import check_push, exported_files, push_folder


class Hub:
    """Takes what ``HfApi`` takes."""

    def __init__(self, *, private: bool = True, fault: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.private, self.fault = private, fault

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        if self.fault is not None:
            raise self.fault
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))

    def repo_info(self, repo_id: str, **options: Any) -> Any:
        return type("Info", (), {"private": self.private})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.safetensors", "README.md", "samples.png", "samples/1.png", "fused/unet/x.bin", "notes.txt", ".env"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    formats = {"diffusers": {"files": ["a.safetensors"]}, "fused": {"files": ["fused/unet/x.bin"]}}
    (tmp_path / "rltune.json").write_text(json.dumps({"formats": formats}))
    return tmp_path


FILES = ("README.md", "a.safetensors", "fused/unet/x.bin", "rltune.json", "samples.png", "samples/1.png")


def test_what_the_export_wrote_is_uploaded_and_nothing_else(folder: Path) -> None:
    hub = Hub()
    pushed = push_folder(folder, "me/snail", api=hub)
    assert pushed.files == exported_files(folder) == FILES
    assert (pushed.url, pushed.is_private) == ("https://huggingface.co/me/snail", True)
    (_, made), (_, sent) = hub.calls
    assert made == {"repo_id": "me/snail", "private": True, "exist_ok": True, "repo_type": "model"}
    assert (sent["repo_id"], sent["folder_path"], sent["repo_type"]) == ("me/snail", str(folder), "model")
    assert sent["allow_patterns"] == list(FILES)


def test_a_repository_is_public_where_it_is_asked_to_be_or_was_before(folder: Path) -> None:
    hub = Hub(private=False)
    assert not push_folder(folder, "me/snail", is_private=False, api=hub).is_private
    assert hub.calls[0][1]["private"] is False
    assert not push_folder(folder, "me/snail", api=hub).is_private  # what is there keeps its visibility


@pytest.mark.parametrize("repo", ["snail", "me/", "me/snail/x", "me/sn ail", "", "../me"])
def test_what_is_no_repository_is_said_before_anything(repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "get_token", lambda: "hf_x")
    with pytest.raises(UserError, match=r"^--push: must be OWNER/NAME, got "):
        check_push(repo)
    check_push("me/snail")


def test_a_missing_token_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"^--push: .* 'me/snail', and there is no token here; run 'hf auth login' "):
        check_push("me/snail")


@pytest.mark.parametrize("fault", [OfflineModeIsEnabled("offline\nmore"), ConnectionError("no route")])
def test_a_hub_that_is_not_there_is_one_message(folder: Path, fault: Exception) -> None:
    with pytest.raises(
        RunError, match=rf"^--push: {folder} was not uploaded to 'me/snail' \((offline|no route)\); run"
    ):
        push_folder(folder, "me/snail", api=Hub(fault=fault))


def test_a_folder_without_a_card_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no card that says what is in it"):
        push_folder(tmp_path, "me/snail", api=Hub())
