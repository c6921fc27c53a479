"""Made-up inputs run through models of every preset family, cut down to one layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tokprune
from tokprune.errors import OptionError
from tokprune.profiling.build import build_random
from tokprune.profiling.inputs import random_inputs
from tokprune.profiling.presets import Preset, preset

WIDTH = 64
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def cut(name: str) -> Preset:
    """The preset with one narrow LLM layer and a tower of two blocks; pictures, tiles and token ids as they are."""
    known = preset(name)
    config = dict(known.config)
    text = config["text_config"] | TEXT
    if "mrope_section" in text.get("rope_parameters", {}):
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [2, 3, 3]}
    vision = dict(config["vision_config"])
    if "num_hidden_layers" in vision:
        vision |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    else:
        vision["depth"] = 2
    for key, value in {"out_hidden_size": WIDTH, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}.items():
        if key in vision:
            vision[key] = value
    if "embed_dim" in vision:  # Qwen2-VL calls the LLM's width hidden_size
        vision["hidden_size"] = WIDTH
    return replace(known, config=config | {"text_config": text, "vision_config": vision})


CASES = [
    ("llava-1.5-7b", (336, 336), None),
    ("llava-next-7b", (336, 500), None),
    ("llava-onevision-7b", (384, 384), None),
    ("llava-onevision-7b", (384, 384), 2),
    ("qwen2-vl-7b", (112, 168), None),
    ("qwen2.5-vl-7b", (112, 168), None),
    ("qwen2.5-vl-7b", (112, 168), 4),
    ("qwen3-vl-4b", (256, 320), None),
    ("internvl3-8b", (448, 448), None),
    ("smolvlm-256m", (512, 512), None),
    ("gemma3-4b", (896, 896), None),
]


@pytest.mark.parametrize(("name", "size", "frames"), CASES)
def test_made_up_inputs_run_plain_and_pruned(name: str, size: tuple[int, int], frames: int | None) -> None:
    known = cut(name)
    model = build_random(known, "cpu", torch.float32)
    inputs = random_inputs(known, model, size, text=6, frames=frames)
    visual = known.count(size, frames)
    assert inputs["input_ids"].shape == (1, 6 + visual.placeholders)
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    with tokprune.apply(model, "random", ratio=0.1) as pruning:
        model.generate(**inputs, max_new_tokens=1)
        report = pruning.report()
    assert report.total == visual.tokens
    assert sum(s.separators for s in report.streams) == visual.separators


def test_batches_and_wrong_input() -> None:
    known = cut("smolvlm-256m")
    model = build_random(known, "cpu", torch.float32)
    inputs = random_inputs(known, model, (512, 512), text=7, batch=2)
    assert inputs["input_ids"].shape[0] == inputs["pixel_values"].shape[0] == 2
    assert torch.equal(inputs["input_ids"], random_inputs(known, model, (512, 512), text=7, batch=2)["input_ids"])
    with pytest.raises(OptionError, match="takes no videos"):
        random_inputs(preset("llava-next-7b"), model, frames=2)
    with pytest.raises(OptionError, match="text=1"):
        random_inputs(known, model, text=1)
