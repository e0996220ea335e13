"""``rltune models``: what is listed, and what becomes of what is asked for."""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import DryRunFileInfo

from rltune.cli import models
from rltune.cli.doctor import NOTE, OK, _reward_weights
from rltune.cli.known_models import KNOWN_MODELS
from rltune.cli.models import FileTable, PublishedFile, cached_base_models, published_files
from rltune.diffusion.families.base import FAMILIES
from rltune.diffusion.loading import load_model
from rltune.errors import RunError
from rltune.rewards.base import REWARDS
from rltune.rewards.weights import WeightsFile
from tests.cli.conftest import Call
from tests.cli.test_tables import render
from tests.original_layout import write_original

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def call(call: Call) -> Call:
    """Run ``rltune models`` in this process."""
    return lambda *arguments: call("models", *arguments)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache; the hub and other hosts are out of reach unless a test says otherwise."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was wanted")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RLTUNE_CACHE", str(tmp_path / "rltune"))
    for name in ("hf_hub_download", "snapshot_download", "get_hf_file_metadata"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr("requests.get", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "hub"


def cache(hub: Path, repo: str, files: dict[str, str]) -> Path:
    """Put files of a repository into the Hugging Face cache -> the folder of the snapshot."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for name, content in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(content)
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir(exist_ok=True)
    return snapshot


# ---- the list


def test_a_file_that_several_rewards_need_is_listed_once() -> None:
    files = published_files()
    assert len({file.weights.source for file in files}) == len(files)
    (clip,) = (file for file in files if file.weights.origin == "timm/vit_large_patch14_clip_224.openai")
    assert clip.rewards == ("clip_score", "laion_aesthetic")
    named = {name for file in files for name in file.rewards}
    assert named == {name for name in REWARDS.names() if REWARDS.card(name).weights}


LONG = PublishedFile(
    WeightsFile("sac+logos+ava1-l14-linearMSE.pth", "Apache-2.0", 3.7, repo="timm/vit_large_patch14_clip_224.openai"),
    ("object_count", "object_presence"),
)


@pytest.mark.parametrize("width", [80, 120])
def test_no_name_is_cut(width: int) -> None:
    lines = render(FileTable([*published_files(), LONG]), width)
    words = {word.rstrip(",") for line in lines for word in line.split()}
    for file in (*published_files(), LONG):
        assert {file.weights.file, file.weights.origin, *file.weights.licence.split(), *file.rewards} <= words
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)


def test_a_row_says_all_of_a_file(hub: Path) -> None:
    cache(hub, "a/b", {"w.pt": ""})
    file = PublishedFile(WeightsFile("w.pt", "MIT", 1972, repo="a/b"), ("x", "y"))
    other = PublishedFile(WeightsFile("v.pt", "MIT", 3, url="https://host.org/v.pt"), ("z",))
    wide = [" ".join(line.split()) for line in render(FileTable([file, other]), 100)]
    assert wide[1:] == ["w.pt 2.0 GB MIT yes a/b x, y", "v.pt 3 MB MIT no host.org z"]
    narrow = [" ".join(line.split()) for line in render(FileTable([file, other]), 42)]
    assert narrow[1:] == ["w.pt 2.0 GB yes x, y", "a/b MIT", "v.pt 3 MB no z", "host.org MIT"]


def test_base_models_in_the_cache_are_listed_with_what_they_lack(hub: Path, call: Call) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"], "safety_checker": ["x", "Y"]}
    other = {"_class_name": "PixArtSigmaPipeline", "vae": ["diffusers", "V"], "image_encoder": [None, None]}
    whole = {"unet/config.json": "{}", "unet/model.safetensors": "x" * 3_000_000}
    cache(hub, "good/whole", {"model_index.json": json.dumps(index), **whole})
    cache(hub, "bad/half", {"model_index.json": json.dumps(index), "unet/config.json": "{}"})
    cache(hub, "bad/nothing", {"model_index.json": json.dumps(index)})
    cache(hub, "of/another", {"model_index.json": json.dumps(other), "vae/config.json": "{}", "vae/a.bin": ""})
    cache(hub, "no/pipeline", {"config.json": "{}"})
    cache(hub, "no/index", {"model_index.json": "{not JSON"})
    found = {model.name: (model.pipeline, model.lacking) for model in cached_base_models()}
    assert found == {
        "good/whole": ("StableDiffusionPipeline", ()),
        "bad/half": ("StableDiffusionPipeline", ("unet",)),
        "bad/nothing": ("StableDiffusionPipeline", ("unet",)),
        "of/another": ("PixArtSigmaPipeline", ()),
    }
    code, out, _ = call()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "good/whole 3 MB StableDiffusionPipeline" in lines
    assert "bad/half < 1 MB StableDiffusionPipeline; lacks unet" in lines
    assert "of/another < 1 MB PixArtSigmaPipeline; not supported" in lines
    assert any(line.startswith("builtin (in the package)") for line in lines)
    assert f"files of the Hugging Face hub are in {hub}, others in {hub.parent / 'rltune'}" in lines
    (trained,) = [line for line in lines if line.startswith("base models that can be trained are of the class ")]
    assert {"StableDiffusionPipeline", "FluxPipeline"} <= set(re.findall(r"\w+", trained))


def test_published_models_are_listed_with_what_they_need(call: Call) -> None:
    out = call()[1]
    row = next(line for line in out.splitlines() if "stable-diffusion-3.5-medium" in line)
    assert row.split()[:6] == ["stabilityai/stable-diffusion-3.5-medium", "15.8", "GB", "12", "GiB", "gated"]
    assert "computed, not measured" in out
    assert "Licences and gates were not verified" in out
    families = {name for name in FAMILIES.names() if "Inpaint" not in name}
    assert families == {model.pipeline for model in KNOWN_MODELS}


def test_an_empty_machine_is_listed(call: Call) -> None:
    code, out, err = call()
    assert (code, err) == (0, "")
    assert "ImageReward.pt" in out
    assert "yes" not in out.split()


# ---- fetching files of rewards


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Files that are here, files that cannot be fetched, and what was fetched."""
    state: dict[str, Any] = {"here": set(), "unreachable": set(), "fetched": []}

    def find(file: WeightsFile) -> Path | None:
        return tmp_path / file.file if file.file in state["here"] else None

    def fetch(file: WeightsFile) -> Path:
        if file.file in state["unreachable"]:
            raise RunError(f"{file.file} could not be fetched: no way")
        state["fetched"].append(file.file)
        state["here"].add(file.file)
        return tmp_path / file.file

    monkeypatch.setattr(WeightsFile, "find", find)
    monkeypatch.setattr(WeightsFile, "fetch", fetch)
    monkeypatch.setattr(WeightsFile, "check", lambda file, path: None)
    return state


def test_every_file_of_a_reward_is_fetched_unless_it_is_here(
    call: Call, network: dict[str, Any], tmp_path: Path
) -> None:
    network["here"].add("vocab.txt")
    code, out, err = call("fetch", "imagereward")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "imagereward: fetching ImageReward.pt, 1.8 GB, Apache-2.0, from THUDM/ImageReward",
        f"imagereward: ImageReward.pt fetched, {tmp_path / 'ImageReward.pt'}",
        f"imagereward: vocab.txt is here already, {tmp_path / 'vocab.txt'}",
    ]
    assert network["fetched"] == ["ImageReward.pt"]


def test_a_file_that_two_rewards_need_is_fetched_once(call: Call, network: dict[str, Any]) -> None:
    assert call("fetch", "clip_score", "laion_aesthetic", "clip_score")[0] == 0
    assert network["fetched"] == ["open_clip_model.safetensors", "sac+logos+ava1-l14-linearMSE.pth"]


@pytest.mark.parametrize("name", ["brightness", "aesthetic", "builtin"])
def test_what_needs_no_files_is_said_so(call: Call, name: str) -> None:
    assert call("fetch", name) == (0, f"{name}: needs no files, or they are in the package\n", "")


def test_the_rest_is_fetched_when_something_cannot_be(call: Call, network: dict[str, Any]) -> None:
    network["unreachable"] = {"ImageReward.pt", "HPS_v2_compressed.pt"}
    code, _, err = call("fetch", "imagereward", "hpsv2", "pickscore")
    assert code == 1
    assert err.splitlines() == [
        "error not everything could be fetched",
        "  imagereward: ImageReward.pt could not be fetched: no way",
        "  hpsv2: HPS_v2_compressed.pt could not be fetched: no way",
    ]
    assert network["fetched"] == ["vocab.txt", "model.safetensors"]


def test_a_file_that_is_here_and_not_the_published_one_is_named(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rltune").mkdir()
    (tmp_path / "rltune" / "sac+logos+ava1-l14-linearMSE.pth").write_text("mine")
    code, out, err = call("fetch", "laion_aesthetic")
    assert code == 1
    assert "laion_aesthetic: fetching open_clip_model.safetensors" in out
    assert "is not the published sac+logos+ava1-l14-linearMSE.pth" in err


@pytest.mark.parametrize("name", ["imageward", "a/b/c", "/b", "a/", ""])
def test_an_unknown_name_stops_before_anything_is_fetched(call: Call, network: dict[str, Any], name: str) -> None:
    code, out, err = call("fetch", "imagereward", name)
    assert (code, out) == (2, "")
    assert err.startswith(f"error '{name}' is no reward, and no base model on the Hugging Face hub")
    assert "known: aesthetic, alignment" in err
    assert ("did you mean 'imagereward'?" in err) == (name == "imageward")
    assert network["fetched"] == []


def test_a_name_is_asked_for(call: Call) -> None:
    code, _, err = call("fetch")
    assert code == 2
    assert "Missing argument 'NAME" in err


# ---- fetching base models

SD = {"model_index.json": 1, "README.md": 1, "v1-5-pruned.safetensors": 7_000, "v1-5-pruned.ckpt": 7_000} | {
    f"{folder}/{file}": size
    for folder, files in {
        "scheduler": {"scheduler_config.json": 1},
        "tokenizer": {"vocab.json": 1, "merges.txt": 1},
        "feature_extractor": {"preprocessor_config.json": 1},
        "safety_checker": {"config.json": 1, "model.safetensors": 1200, "pytorch_model.bin": 1200},
        "unet": {
            "config.json": 1,
            "diffusion_pytorch_model.safetensors": 3440,
            "diffusion_pytorch_model.fp16.safetensors": 1720,
            "diffusion_pytorch_model.non_ema.safetensors": 3440,
            "diffusion_pytorch_model.bin": 3440,
        },
        "text_encoder": {"config.json": 1, "model.safetensors": 490, "model.fp16.safetensors": 245, "model.onnx": 490},
        "vae": {"config.json": 1, "diffusion_pytorch_model.safetensors": 335, "flax_model.msgpack": 335},
    }.items()
    for file, size in files.items()
}
"""Files of a repository like that of Stable Diffusion 1.5, 10^6 bytes."""
NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
}


@pytest.fixture
def repository(hub: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A repository on the hub that can be fetched: its files with sizes, its index, and what was downloaded."""
    state: dict[str, Any] = {"files": SD, "index": INDEX, "downloaded": None}

    def download(repo: str, file: str) -> str:
        assert (repo, file) == ("some/model", "model_index.json")
        return str(cache(hub, repo, {file: json.dumps(state["index"])}) / file)

    def matches(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    def snapshot(
        repo: str, *, allow_patterns: Sequence[str], ignore_patterns: Sequence[str], dry_run: bool = False
    ) -> Any:
        wanted = [
            name for name in state["files"] if matches(name, allow_patterns) and not matches(name, ignore_patterns)
        ]
        if dry_run:
            here = {"model_index.json"}
            return [
                DryRunFileInfo(COMMIT, size * 10**6, name, "", name in here, name not in here)
                for name, size in state["files"].items()
                if name in wanted
            ]
        state["downloaded"] = set(wanted)
        return str(cache(hub, repo, {name: "" for name in wanted if name != "model_index.json"}))

    monkeypatch.setattr(models, "check_hub", lambda repo, file: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return state


def test_what_diffusers_needs_of_a_base_model_is_fetched(call: Call, repository: dict[str, Any], hub: Path) -> None:
    code, out, err = call("fetch", "some/model")
    assert (code, err) == (0, "")
    assert repository["downloaded"] == NEEDED
    lines = out.splitlines()
    size = 3440 + 490 + 335 + len(NEEDED) - 4  # small files of 1 MB; the index is here by now
    assert lines[0] == f"some/model: fetching {len(NEEDED) - 1} files, {size / 1000:.1f} GB"
    assert lines[1].startswith(f"some/model: fetched, {hub}")
    assert call("fetch", "some/model") == (0, "some/model: is here already\n", "")


def test_shards_and_root_files_are_told_apart(call: Call, repository: dict[str, Any]) -> None:
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    small = {name: 1 for name in NEEDED if not name.endswith("unet/diffusion_pytorch_model.safetensors")}
    repository["files"] = small | dict.fromkeys([*shards, *half, index, "other_folder/model.safetensors"], 1)
    assert call("fetch", "some/model")[0] == 0
    assert repository["downloaded"] == {*small, *shards, index}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"index": {**INDEX, "_class_name": "PixArtSigmaPipeline"}},
            "pipeline class 'PixArtSigmaPipeline' is unknown; ",
        ),
        (
            {"files": {name: 1 for name in SD if not name.endswith("unet/diffusion_pytorch_model.safetensors")}},
            "its unet has no safetensors weights, and others are not fetched",
        ),
        ({"index": ["no index"]}, "its model_index.json is not whole"),
    ],
)
def test_a_base_model_that_could_not_be_used_is_not_fetched(
    call: Call, repository: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    repository.update(change)
    code, _, err = call("fetch", "some/model", "brightness")
    assert code == 1
    assert f"  some/model could not be fetched: {reason}" in err
    assert repository["downloaded"] is None


def test_a_gated_model_says_where_its_licence_is_accepted(
    call: Call, repository: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "check_hub", lambda repo, file: gated(repo))
    code, _, err = call("fetch", "some/model")
    assert code == 1
    assert err == (
        "error not everything could be fetched\n"
        "  some/model could not be fetched: its owner gives it to those who ask; "
        "accept its licence at https://huggingface.co/some/model, then run 'hf auth login' on this machine or set "
        "HF_TOKEN\n"
    )
    assert repository["downloaded"] is None


def gated(repo: str) -> Exception:
    import httpx2

    request = httpx2.Request("HEAD", f"https://huggingface.co/{repo}/resolve/main/model_index.json")
    return huggingface_hub.errors.GatedRepoError("401 Client Error.", response=httpx2.Response(401, request=request))


def test_the_settings_of_a_checkpoint_in_one_file_are_fetched_without_weights(
    call: Call, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, asked = write_original(tiny_pipeline, tmp_path / "my model.safetensors"), []

    def snapshot(repo: str, allow_patterns: list[str]) -> str:
        asked.append(repo)
        assert not any(fnmatch(name, pattern) for name in SD if "safetensors" in name for pattern in allow_patterns)
        assert any(fnmatch("tokenizer/merges.txt", pattern) for pattern in allow_patterns)
        return "/there"

    monkeypatch.setattr(models, "check_hub", lambda repo, file: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    code, out, err = call("fetch", str(file))
    assert (code, err, asked) == (0, "", ["stable-diffusion-v1-5/stable-diffusion-v1-5"])
    assert out == f"{file}: fetching the settings of {asked[0]}, without weights\n{file}: fetched, /there\n"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, err = call("fetch", str(file))
    assert code == 1
    assert "my model.safetensors is not whole, it has" in err


def test_a_base_model_without_a_network_is_named(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = call("fetch", "some/model", "brightness")
    assert code == 1
    assert out == "brightness: needs no files, or they are in the package\n"
    assert err == "error not everything could be fetched\n  some/model could not be fetched: HF_HUB_OFFLINE is set\n"


def test_a_fetched_base_model_loads_without_its_safety_checker(
    hub: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the library's own functions
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = cache(hub, "some/tiny", {})
    shutil.copytree(tiny_pipeline, folder, dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = INDEX["safety_checker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert [(model.name, model.lacking) for model in cached_base_models()] == [("some/tiny", ())]
    assert load_model("some/tiny").size_px == load_model(str(tiny_pipeline)).size_px


# ---- rltune doctor


def test_doctor_counts_the_rewards_that_wait_for_weights(network: dict[str, Any]) -> None:
    (finding,) = _reward_weights()
    waiting = {name for name in REWARDS.names() if REWARDS.card(name).weights}
    assert finding.mark == NOTE
    assert f"; {len(waiting)} more need published weights that are not: see 'rltune models'" in finding.what
    ready = finding.what.split(": ", 1)[1].split(";")[0].split(", ")
    assert ready == sorted(set(REWARDS.names()) - waiting)
    network["here"] = {file.weights.file for file in published_files()}
    (finding,) = _reward_weights()
    assert finding.mark == OK
    assert finding.what == f"rewards that are ready to use here: {', '.join(REWARDS.names())}"
