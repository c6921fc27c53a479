"""The tiny models: every family builds offline, is set by its seed, and runs as a user would run it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tokprune.errors import MissingExtraError, OptionError, install_line
from tokprune.testing import FAMILIES, TinyVLM, build, clip, picture

VIDEO = {
    "llava_next_video",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "internvl",
    "perception_lm",
    "glm4v",
    "video_llama_3",
    "minicpmv4_6",
    "molmo2",
}
SAMPLES = [
    ["Hello ", ("image", picture(60, 40, 1)), " what is this?"],
    ["A longer text before ", ("image", picture(40, 40, 2)), " and ", ("image", picture(40, 60, 3)), " compare them."],
]


def clips() -> list[list]:
    return [
        ["v ", ("video", clip(4, seed=1)), " what?"],
        ["a longer question about ", ("video", clip(4, seed=2)), " ok?"],
    ]


@pytest.fixture(scope="module")
def tiny():
    built: dict[str, TinyVLM] = {}

    def get(family: str) -> TinyVLM:
        if family not in built:
            built[family] = build(family)
        return built[family]

    return get


def placeholders(vlm: TinyVLM, ids: torch.Tensor) -> int:
    config = vlm.model.config
    wanted = {getattr(config, name, None) for name in ("image_token_id", "video_token_id", "image_patch_id")} - {None}
    return sum(int((ids == token).sum()) for token in wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_images_runs(tiny, family):
    vlm = tiny(family)
    inputs = vlm.inputs(SAMPLES)
    ids = inputs["input_ids"]
    assert not inputs["attention_mask"].bool().all(), "the two rows should differ in length"
    assert placeholders(vlm, ids) >= 3 * 12
    with torch.no_grad():
        logits = vlm.model(**inputs).logits
        new = vlm.model.generate(**inputs, max_new_tokens=2)
    assert logits.shape[:2] == ids.shape
    assert torch.isfinite(logits).all()
    assert logits[0, -1].std() > 0.1, "near-constant logits would hide mistakes"
    assert new.shape == (2, ids.shape[1] + 2)
    assert (new[:, ids.shape[1] :] < 256).all(), "only bytes may be generated"


@pytest.mark.parametrize("family", sorted(VIDEO))
def test_batch_of_clips_runs(tiny, family):
    vlm = tiny(family)
    assert vlm.spec.has_video
    batches = [clips()]
    if vlm.spec.mixes:
        batches.append([[*clips()[0], ("image", picture(60, 40, 1)), " and?"], clips()[1]])
    for samples in batches:
        inputs = vlm.inputs(samples)
        new = vlm.model.generate(**inputs, max_new_tokens=2)
        assert new.shape[1] == inputs["input_ids"].shape[1] + 2
    if not vlm.spec.mixes:
        with pytest.raises(OptionError, match="not both"):
            vlm.inputs([clips()[0], SAMPLES[0]])


def test_families_without_video_say_so(tiny):
    for family in set(FAMILIES) - VIDEO:
        with pytest.raises(OptionError, match="Allowed: image"):
            tiny(family).inputs(clips())


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_moves_the_padding_and_nothing_else(tiny, family):
    vlm = tiny(family)
    left, right = vlm.inputs(SAMPLES), vlm.inputs(SAMPLES, padding_side="right")
    for row in range(2):
        assert torch.equal(
            left["input_ids"][row][left["attention_mask"][row].bool()],
            right["input_ids"][row][right["attention_mask"][row].bool()],
        )
    short = int(left["attention_mask"].sum(1).argmin())
    assert left["attention_mask"][short, 0] == 0
    assert left["attention_mask"][short, -1] == 1
    assert right["attention_mask"][short, 0] == 1
    assert right["attention_mask"][short, -1] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_sets_all_weights(tiny, family):
    before = torch.random.get_rng_state()
    again, other = build(family), build(family, seed=1)
    assert torch.equal(before, torch.random.get_rng_state()), "building must not touch the caller's random state"
    state = tiny(family).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    weight = again.model.get_input_embeddings().weight
    assert not torch.equal(weight, other.model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_template_frames_the_turn(tiny, family):
    vlm = tiny(family)
    inputs = vlm.chat(SAMPLES)
    text = vlm.processor.tokenizer.decode(inputs["input_ids"][1][inputs["attention_mask"][1].bool()])
    assert "<|im_start|>user\n" in text
    assert text.endswith("compare them.<|im_end|>\n<|im_start|>assistant\n" + ("\n" if family == "paligemma" else ""))
    assert placeholders(vlm, inputs["input_ids"]) == placeholders(vlm, vlm.inputs(SAMPLES)["input_ids"])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_attention_and_dtype_are_the_asked_ones(tiny, family):
    eager = build(family, attn="eager")
    assert eager.model.config.get_text_config()._attn_implementation == "eager"
    with torch.no_grad():
        a = eager.model(**eager.inputs(SAMPLES)).logits[:, -1]
        b = tiny(family).model(**tiny(family).inputs(SAMPLES)).logits[:, -1]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    half = build(family, dtype=torch.bfloat16)
    inputs = half.inputs(SAMPLES[:1])
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert half.model(**inputs).logits.dtype == torch.bfloat16


def test_text_only_prompt(tiny):
    inputs = tiny("llava").inputs([["no picture"]])
    assert "pixel_values" not in inputs
    assert tiny("llava").model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_pictures_and_clips_are_seeded():
    assert np.array_equal(picture(30, 20, 5), picture(30, 20, 5))
    assert not np.array_equal(picture(30, 20, 5), picture(30, 20, 6))
    assert picture(30, 20).size == (30, 20)
    video = clip(3, 30, 20, seed=1)
    assert video.shape == (3, 20, 30, 3)
    assert video.dtype == np.uint8
    assert np.array_equal(video, clip(3, 30, 20, seed=1))
    assert not np.array_equal(video[0], video[1])


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'qwen2_5_vl'"):
        build("qwen2.5_vl")
    with pytest.raises(OptionError, match="padding_side 'middle'"):
        build("llava").inputs(SAMPLES, padding_side="middle")


@pytest.mark.parametrize(("family", "package"), [("llava", "torchvision"), ("fast_vlm", "timm")])
def test_missing_package_names_the_pip_line(monkeypatch, family, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a))
    with pytest.raises(MissingExtraError, match=package + ".*" + re.escape(install_line("vision"))):
        build(family)


def test_import_stays_light():
    code = "import sys, tokprune.testing; sys.exit('transformers' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
