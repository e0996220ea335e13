"""Prompts are embedded once, by groups that do not depend on which are asked for, and held in bounded memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rltune.diffusion import embeddings
from rltune.diffusion.embeddings import PromptEmbeddings, in_a_file
from rltune.diffusion.families import turns
from rltune.diffusion.families.base import FAMILIES, Conditioning, stack
from rltune.errors import StorageError
from tests import tiny_families

CPU = torch.device("cpu")
PROMPTS = tuple(f"prompt {i}" for i in range(100))


class Encoder:
    """Embeds a prompt as its number and its place among those that were embedded together; notes the calls."""

    collate = staticmethod(stack)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.calls: list[list[str]] = []
        self.dtype = dtype

    def encode_prompts(self, prompts: list[str]) -> list[Conditioning]:
        self.calls.append(list(prompts))
        rows = [[float(prompt.split()[1]), float(i % 4)] for i, prompt in enumerate(prompts)]
        return [{"text": torch.tensor(row, dtype=self.dtype).expand(3, 2)} for row in rows]

    def encode_negative(self, prompt: str) -> Conditioning | None:
        return {"text": torch.zeros(3, 2)} if prompt == "" else None


class Ragged(Encoder):
    """Prompt i has i % 3 + 1 tokens and a mask."""

    def encode_prompts(self, prompts: list[str]) -> list[Conditioning]:
        lengths = [int(prompt.split()[1]) % 3 + 1 for prompt in prompts]
        rows = super().encode_prompts(prompts)
        return [
            {"text": row["text"][:length], "mask": torch.ones(length, dtype=torch.bool)}
            for row, length in zip(rows, lengths, strict=True)
        ]


def make(monkeypatch: pytest.MonkeyPatch, encoder: Encoder, **settings: Any) -> PromptEmbeddings:
    monkeypatch.setattr(embeddings, "ENCODE_BATCH", 4)
    monkeypatch.setattr(embeddings, "GROUPS_AT_A_TIME", 2)
    return PromptEmbeddings(encoder, PROMPTS[:10], **settings)  # type: ignore[arg-type]


def test_a_group_is_embedded_when_one_of_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder()
    kept = make(monkeypatch, encoder)
    assert encoder.calls == []
    assert kept.get(["prompt 5", "prompt 4"], CPU)["text"][:, 0].tolist() == [[5, 1], [4, 0]]
    assert encoder.calls == [[f"prompt {i}" for i in (4, 5, 6, 7)]]
    kept.add(["prompt 7"])
    assert len(encoder.calls) == 1


@pytest.mark.parametrize("order", [range(10), (9, 0, 5), (5, 9, 0, 1)])
def test_an_embedding_does_not_depend_on_what_is_asked_for_first(monkeypatch: pytest.MonkeyPatch, order: Any) -> None:
    """How a row rounds depends on the rows beside it."""
    encoder = Encoder()
    kept = make(monkeypatch, encoder)
    for number in order:
        kept.add([PROMPTS[number]])
    whole = kept.get(PROMPTS[:10], CPU)["text"]
    assert whole[:, 0].tolist() == [[i, i % 4] for i in range(10)]


def test_no_group_is_cut_by_a_shorter_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder()
    kept = make(monkeypatch, encoder)  # groups 0..3, 4..7, 8..9
    kept.add([*PROMPTS[:10], *PROMPTS[20:25]])  # and 20..23, 24
    assert [len(call) for call in encoder.calls] == [8, 2, 5]
    assert kept.get(PROMPTS[20:25], CPU)["text"][:, 0].tolist() == [[20, 0], [21, 1], [22, 2], [23, 3], [24, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_they_are_kept_as_the_encoder_gives_them(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    kept = make(monkeypatch, Encoder(dtype))
    assert kept.get(["prompt 3"], CPU)["text"].dtype == torch.promote_types(dtype, torch.float32)
    assert kept.rows(["prompt 3"])[0]["text"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_memory_is_not_to_hold_lies_in_a_file_and_is_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    in_memory, in_file = make(monkeypatch, Encoder(dtype)), make(monkeypatch, Encoder(dtype), max_bytes=200)
    assert torch.equal(in_memory.get(PROMPTS[:10], CPU)["text"], in_file.get(PROMPTS[:10], CPU)["text"])
    maps = Path("/proc/self/maps").read_text()
    # a group is 48 or 96 bytes
    assert maps.count(str(tmp_path)) == (0 if dtype == torch.bfloat16 else 1)
    assert list(tmp_path.iterdir()) == []  # it has no name


@pytest.mark.parametrize("max_bytes", [2**30, 0])
def test_prompts_of_any_length_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch, max_bytes: int) -> None:
    kept = make(monkeypatch, Ragged(), max_bytes=max_bytes)
    rows = kept.rows([PROMPTS[5], PROMPTS[3], PROMPTS[4]])
    assert [row["text"].tolist() for row in rows] == [[[5, 1]] * 3, [[3, 3]], [[4, 0]] * 2]
    assert [row["mask"].tolist() for row in rows] == [[True] * 3, [True], [True] * 2]


def test_a_negative_prompt_may_be_something_else_than_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder()
    kept = make(monkeypatch, encoder)
    assert kept.negative("")["text"].tolist() == [[0, 0]] * 3
    assert encoder.calls == []
    assert torch.equal(kept.negative("prompt 4")["text"], kept.rows(["prompt 4"])[0]["text"])


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match="no space left on device"):
        in_a_file(torch.zeros(3))


@pytest.mark.parametrize("is_large", [True, False])
def test_large_encoders_are_never_on_a_device_together_with_the_network(
    monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    monkeypatch.setattr(turns, "LARGE_ENCODERS", 0 if is_large else 2**40)
    pipeline = tiny_families.flux()
    model = FAMILIES.get("FluxPipeline")(pipeline)
    places: dict[str, str] = {}
    crowded: list[dict[str, str]] = []

    def follow(name: str) -> Callable[[Any], None]:
        def to(device: Any) -> None:
            places[name] = str(device)
            if places["transformer"] == places["text_encoder_2"] == "cuda":
                crowded.append(dict(places))

        return to

    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        places[name] = "cpu"
        getattr(pipeline, name).to = follow(name)
    model.to(torch.device("cuda"))
    with model.encoders_here():
        assert places["text_encoder"] == places["text_encoder_2"] == "cuda"
        assert places["transformer"] == places["vae"] == ("cpu" if is_large else "cuda")
    assert places == {"transformer": "cuda", "vae": "cuda", "text_encoder": "cpu", "text_encoder_2": "cpu"}
    assert bool(crowded) != is_large
