"""What is known to be wrong before anything starts is said before anything starts, all of it, and without weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import GatedRepoError

from rltune.config.load import load_experiment
from rltune.diffusion import quantise
from rltune.diffusion.loading import load_model
from rltune.errors import ExperimentError, RunError, UserError
from rltune.orchestration import inspection
from rltune.orchestration.claiming import claim_run
from rltune.orchestration.inspection import Faults, Inputs, inspect_experiment
from rltune.rewards.weights import WeightsFile
from rltune.runs.layout import RunFolder
from rltune.training.prompts import cut_in_words
from tests.tiny import hollow
from tests.tiny_families import PIPELINES, made

Inspect = Callable[..., Inputs]


@pytest.fixture
def inspect(tmp_path: Path) -> Inspect:
    def run(text: str, **settings: bool) -> Inputs:
        (tmp_path / "x.yaml").write_text(text)
        experiment = load_experiment(tmp_path / "x.yaml", must_find_files=False)
        faults = Faults()
        inputs = inspect_experiment(experiment, RunFolder(tmp_path / "run"), faults, **settings)
        faults.raise_any(experiment.source)
        return inputs

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub was asked for; it cannot be reached. No published weights are here."""
    asked: list[str] = []

    def check_hub(repo: str, file: str) -> None:
        asked.append(f"{repo}/{file}")
        raise RunError("no way to the hub")

    monkeypatch.setattr(inspection, "check_hub", check_hub)
    monkeypatch.setattr(inspection, "is_offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(WeightsFile, "find", lambda file: None)
    return asked


def faults_of(inspect: Inspect, text: str, **settings: bool) -> list[str]:
    with pytest.raises(ExperimentError) as raised:
        inspect(text, **settings)
    return [str(fault) for fault in raised.value.faults]


ALL_WRONG = """
model: {base: /no/such/model}
prompts: {train: no/such.csv, eval: [one, two]}
evaluate: {prompts: 3, judges: [pickscore]}
estimator: {options: {kk: 1}}
rewards:
  brightness: {options: {gain: 2}, trust: {reference: no/references}}
  imagereward: {options: {weights: no/weights.pt}}
  clip_score: {options: {model: ./no/model}}
track: [wandb]
"""


def test_every_fault_is_found_at_once(inspect: Inspect, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rltune.training.tracking.find_spec", lambda name: None)
    found = faults_of(inspect, ALL_WRONG)
    expected = [
        "track: wandb is not installed",
        "estimator 'alignprop': option 'kk' is unknown",
        "reward 'brightness': option 'gain' is unknown",
        "rewards.brightness.trust.reference: no such file or folder, got 'no/references'",
        "rewards.imagereward.options.weights: no such file, got 'no/weights.pt'",
        "rewards.clip_score.options.model: no such folder, got './no/model'",
        "rewards: not on this machine: model.safetensors of yuvalkirstain/PickScore_v1 (3.9 GB)",
        "prompts.train: prompts cannot be read (No such file or directory), got 'no/such.csv'",
        "evaluate.prompts: 3 prompts are wanted, but prompts.eval holds 2",
        "model.base: no such folder, got '/no/such/model'",
    ]
    assert [fault[: len(text)] for fault, text in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize("ways", ["no way", "offline"])
def test_weights_that_cannot_come_are_a_fault(
    inspect: Inspect, asked: list[str], monkeypatch: pytest.MonkeyPatch, ways: str
) -> None:
    monkeypatch.setattr(inspection, "is_offline", lambda: ways == "offline")
    (fault,) = faults_of(inspect, "rewards: {imagereward: }")
    assert fault.endswith(
        "rltune models fetch imagereward, where there is a network "
        + ("(HF_HUB_OFFLINE is set)" if ways == "offline" else "(no way to the hub)")
    )


def test_weights_that_may_still_come_are_told_of(
    inspect: Inspect, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "check_hub", lambda repo, file: None)
    inputs = inspect("rewards: {a: {reward: {choice: [brightness, imagereward]}}}\nmodel: {base: me/mine}")
    assert set(inputs.missing) == {"imagereward"}
    assert inputs.cut == {}


def test_a_model_of_the_hub_that_cannot_come_is_a_fault(inspect: Inspect, asked: list[str]) -> None:
    (fault,) = faults_of(inspect, "rewards: {brightness: }\nmodel: {base: me/mine}")
    assert fault == (
        "model.base: no such folder, and not in the Hugging Face cache, got 'me/mine'; run 'rltune models fetch "
        "me/mine' where there is a network, or name a folder (no way to the hub)"
    )
    assert asked == ["me/mine/model_index.json"]


def test_a_gated_model_is_a_fault_with_the_way_to_it(
    inspect: Inspect, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = httpx2.Request("HEAD", "https://huggingface.co/me/mine/resolve/main/model_index.json")
    refusal = GatedRepoError("401 Client Error.", response=httpx2.Response(401, request=request))
    monkeypatch.setattr(inspection, "check_hub", lambda repo, file: refusal)
    (fault,) = faults_of(inspect, "rewards: {brightness: }\nmodel: {base: me/mine}")
    way = (
        "accept its licence at https://huggingface.co/me/mine, then run 'hf auth login' on this machine or set HF_TOKEN"
    )
    assert fault == f"model.base: 'me/mine' cannot be had: its owner gives it to those who ask; {way}"

    def load_config(*_: object, **__: object) -> None:
        raise OSError("me/mine is not a local folder and is not a valid model identifier") from refusal

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", load_config)
    with pytest.raises(UserError, match=f"^model.base: 'me/mine' is given to those who have asked for it; {way}$"):
        load_model("me/mine")


def test_this_machines_caches_say_nothing_of_a_cluster_that_is_attached_to(inspect: Inspect, asked: list[str]) -> None:
    text = "rewards: {imagereward: }\nmodel: {base: me/mine}\n"
    assert inspect(text, is_attached=True).missing
    assert not asked
    assert faults_of(inspect, text + "prompts: {train: no.txt}", is_attached=True)[0].startswith("prompts.train: ")


@pytest.fixture
def pipeline(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """The tiny pipeline with a decoder that enlarges by 16, and without a byte of weights."""
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    hollow(folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    config |= {"block_out_channels": [8] * 5, "down_block_types": ["DownEncoderBlock2D"] * 5}
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"up_block_types": ["UpDecoderBlock2D"] * 5}))
    return folder


@pytest.mark.slow
def test_what_a_base_model_cannot_do_is_found_at_every_value_that_may_be_tried(
    inspect: Inspect, pipeline: Path
) -> None:
    text = f"""
model: {{base: {pipeline}, lora: {{targets: [to_q, to_z, attn1], start: no/lora}}}}
sampler: {{height: {{choice: [32, 40]}}, width: 32}}
rewards: {{brightness: }}
prompts: {{train: {{choice: [builtin, no.txt]}}, eval: [one, two]}}
evaluate: {{prompts: 2}}
"""
    faults = faults_of(inspect, text)
    assert [fault.split(";")[0] for fault in faults] == [
        "prompts.train: prompts cannot be read (No such file or directory), got 'no.txt'",
        "sampler.height/width: image sides must be multiples of 16 px, got 40 x 32",
        "model.lora.targets: no layer is called so, got 'to_z'",
        "model.lora.targets: an adapter cannot go to a Attention, got 'attn1'",
        "model.lora.start: no/lora: no such file or folder",
    ]


def test_a_library_that_is_needed_here_is_a_fault_at_every_value(
    inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "find_spec", lambda _: None)
    text = "rewards: {brightness: }\nmodel: {quantise: {choice: [none, int8]}}"
    (fault,) = faults_of(inspect, text)
    assert fault == (
        "model.quantise: int8 needs torchao, which is not installed; run 'pip install \"rltune[quantise]\"', or write "
        "none"
    )
    inspect(text, is_attached=True)  # the nodes' libraries are not known here


def test_what_is_fixed_for_loras_is_looked_at_though_words_come_first(inspect: Inspect) -> None:
    lora = "{targets: [to_q, to_z], start: no/lora}"
    text = f"rewards: {{brightness: }}\nmodel: {{adapter: {{kind: {{choice: [prompt, lora]}}}}, lora: {lora}}}"
    faults = faults_of(inspect, text)
    assert [fault.split(";")[0] for fault in faults] == [
        "model.lora.targets: no layer is called so, got 'to_z'",
        "model.lora.start: no/lora: no such file or folder",
    ]


@pytest.mark.slow
def test_a_base_with_nothing_to_round_is_a_fault_before_anything_starts(inspect: Inspect, tmp_path: Path) -> None:
    made(PIPELINES["z_image"]).save_pretrained(tmp_path / "model")
    text = f"rewards: {{brightness: }}\nmodel: {{base: {tmp_path / 'model'}, quantise: {{choice: [none, nf4, int8]}}}}"
    (fault,) = faults_of(inspect, text, is_attached=True)  # so that this machine needs no library for it
    assert fault == (
        "model.quantise: nf4 rounds linear layers, with rows of whole blocks of 64 numbers, and the network has none; "
        "write none"
    )


def test_a_folder_that_is_no_whole_pipeline_is_a_fault(inspect: Inspect, pipeline: Path) -> None:
    shutil.rmtree(pipeline / "tokenizer")
    (fault,) = faults_of(inspect, f"rewards: {{brightness: }}\nmodel: {{base: {pipeline}}}")
    assert fault.startswith("model.base: tokenizer of ")


def test_half_a_model_in_the_cache_is_a_fault_only_where_the_rest_cannot_come(
    inspect: Inspect, pipeline: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file, **_: str(pipeline / file))
    text = "rewards: {brightness: }\nmodel: {base: me/mine}"
    (fault,) = faults_of(inspect, text)
    assert "unet of 'me/mine' cannot be read (FileNotFoundError: it has no weights); run 'rltune models fetch" in fault
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(pipeline))
    (pipeline / "models--me--mine" / "blobs").mkdir(parents=True)
    (pipeline / "models--me--mine" / "blobs" / "1234.incomplete").touch()
    (fault,) = faults_of(inspect, text)
    assert "(FileNotFoundError: it has no weights); its download was broken off, run 'rltune models fetch me/" in fault
    monkeypatch.setattr(inspection, "check_hub", lambda repo, file: None)
    inspect(text)


def test_what_a_text_encoder_does_not_read_is_told_of(inspect: Inspect, pipeline: Path) -> None:
    long = "two lobsters in a row"  # 14 letters are read
    text = f"rewards: {{brightness: }}\nmodel: {{base: {pipeline}}}\nevaluate: {{prompts: 2}}\n"
    inputs = inspect(text + f"prompts: {{train: [a cat, {long}], eval: [{long}, {long} of them]}}")
    assert list(inputs.cut) == [long, f"{long} of them"]
    # one that is in both sets is two prompts
    assert cut_in_words(inputs.cut, ["a cat", long, long, f"{long} of them"]) == (
        "3 of 4 prompts are longer than the text encoder reads: of 'two lobsters in a row' it does not see 'row'"
    )
    assert cut_in_words({}, ["a cat"]) == ""


def test_prompts_that_a_run_has_copies_of_are_those_that_count(inspect: Inspect, tmp_path: Path) -> None:
    prompts = tmp_path / "gone.txt"
    prompts.write_text("a copy\n")
    text = f"rewards: {{brightness: }}\nprompts: {{train: {prompts}}}"
    inspect(text)
    claim_run(RunFolder(tmp_path / "run"), load_experiment(tmp_path / "x.yaml"), precision="fp32")
    prompts.unlink()
    assert inspect(text).prompts["prompts.train"].prompts == ("a copy",)


def test_a_run_that_cannot_be_started_from_is_a_fault_beside_others(inspect: Inspect) -> None:
    faults = faults_of(inspect, "rewards: {brightness: }\nprompts: {train: no.txt}\nsearch: {warm_start: nowhere}")
    assert [fault.split(", got")[0] for fault in faults] == [
        "search.warm_start: not a run folder, it has no experiment.yaml",
        "prompts.train: prompts cannot be read (No such file or directory)",
    ]


def test_steps_that_a_schedule_does_not_have_are_a_fault(inspect: Inspect) -> None:
    (fault,) = faults_of(inspect, "rewards: {brightness: }\nsampler: {steps: {choice: [20, 1000]}}")
    assert fault.startswith("sampler: 'builtin': 1000 steps begin at timestep 1000 of a schedule that ends at 999")
