"""The demo VLM as shipped: loads offline, answers, needs its picture; and its training script runs and resumes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokprune import demo
from tokprune.demo.asking import Asker
from tokprune.demo.loading import WEIGHTS, DemoScorer
from tokprune.demo.scenes import Example
from tools.demo.evaluation import accuracy, correct

N_TOKENS = 256


@pytest.fixture(scope="module")
def vlm():
    return demo.load()


@pytest.fixture(scope="module")
def scorer() -> DemoScorer:
    return demo.load_scorer()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return demo.held_out(126)


def test_import_is_light() -> None:
    code = "import sys, tokprune.demo; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 12e6


def test_loads_as_float32_in_evaluation_mode(vlm) -> None:
    model, processor = vlm
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert processor.tokenizer.padding_side == "left"


def test_auto_classes_load_the_folder(vlm) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS, local_files_only=True)
    assert model.dtype == torch.float32
    assert type(AutoProcessor.from_pretrained(WEIGHTS, local_files_only=True)) is type(vlm[1])


def test_prompt_holds_one_slot_per_patch(vlm, examples: list[Example]) -> None:
    model, processor = vlm
    inputs = Asker(model, processor).prepare(["What color is the star?"], [examples[0].image])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == N_TOKENS
    words = [w for w in processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) if w != "<image>"]
    assert " ".join(words) == "<s> user: what color is the star ? assistant:"


def test_answers_held_out_questions(vlm, examples: list[Example]) -> None:
    shares = accuracy(examples, correct(*vlm, examples))
    assert shares["micro"] >= 0.88
    assert shares["where"] >= 0.8


def test_cannot_answer_without_the_picture(vlm, examples: list[Example]) -> None:
    assert accuracy(examples, correct(*vlm, examples, seen="none"))["micro"] <= 0.45


def test_wrong_picture_does_not_help(vlm, examples: list[Example]) -> None:
    assert accuracy(examples, correct(*vlm, examples, seen="wrong"))["micro"] <= 0.45


def test_unknown_image_condition_is_refused(vlm, examples: list[Example]) -> None:
    with pytest.raises(ValueError, match="own"):
        correct(*vlm, examples, seen="blurred")  # type: ignore[arg-type]


def test_scorer_shares_the_tower(vlm, scorer: DemoScorer) -> None:
    model = vlm[0]
    ours, theirs = scorer.clip.vision_model.state_dict(), model.model.vision_tower.state_dict()
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_scorer_finds_what_the_text_names(vlm, scorer: DemoScorer) -> None:
    """The patch that answers best to a colour and a shape lies on that object, nearly always."""
    processor = vlm[1]
    scenes = [e.scene for e in demo.held_out(40, seed=3)]
    pixels = processor.image_processor([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
    patches = scorer.embed_image(pixels)  # (B, N, E)
    texts = scorer.embed_text([f"a {s.objects[0].color} {s.objects[0].shape}" for s in scenes])  # (B, E)
    assert patches.shape[:2] == (len(scenes), N_TOKENS)
    assert torch.allclose(patches.norm(dim=-1), torch.ones(patches.shape[:2]), atol=1e-4)
    assert torch.allclose(texts.norm(dim=-1), torch.ones(len(texts)), atol=1e-4)
    best = torch.einsum("bne,be->bn", patches, texts).argmax(1).tolist()
    hits = 0
    for scene, patch in zip(scenes, best, strict=True):
        x, y = 8 * (patch % 16) + 4, 8 * (patch // 16) + 4
        twins = [o for o in scene.objects if (o.color, o.shape) == (scene.objects[0].color, scene.objects[0].shape)]
        hits += any((x - o.x) ** 2 + (y - o.y) ** 2 < (o.radius + 6) ** 2 for o in twins)
    assert hits >= 0.85 * len(scenes)


def test_scorer_takes_everyday_text(scorer: DemoScorer) -> None:
    embedded = scorer.embed_text(["What color is the STAR?", "what color is the star ?", "xyzzy"])
    assert torch.allclose(embedded[0], embedded[1], atol=1e-6)
    assert torch.isfinite(embedded).all()
    with pytest.raises(TypeError, match="list"):
        scorer.embed_text("a star")


def test_missing_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tools\.demo\.train"):
        demo.load(folder=tmp_path)
