"""Where each family puts its tokens: tiles, thumbnails, newlines, frames and their times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.adapters.encoded import encode, media, prompts, tiny
from tests.adapters.probed import compute_signals, required_blocks
from tokprune.adapters.families import (
    PlaceholderRun,
    family_of,
    stream_layouts,
)
from tokprune.adapters.families.idefics import SmolVLM
from tokprune.errors import MissingSignalError
from tokprune.testing import picture

SIZES = [(60, 40), (40, 60), (100, 28), (28, 100), (64, 64), (33, 61), (200, 31)]


@pytest.mark.parametrize("family", ["llava_next", "llava_next_video", "llava_onevision"])
@pytest.mark.parametrize("size", SIZES)
def test_anyres_tokens_are_the_patches_the_layout_names(family: str, size: tuple[int, int]) -> None:
    """feature[token] == projector(hidden[tile, row, column]) exactly, and newline rows are the newline embedding."""
    vlm = tiny(family)
    encoded = encode(vlm, prompts([picture(*size)], "image"), ("encoder_features",), output_hidden_states=True)
    (stream,), base, features = encoded.layouts(), encoded.base, encoded.features
    hidden = encoded.output.hidden_states[base.config.vision_feature_layer]
    if base.config.vision_feature_select_strategy == "default":
        hidden = hidden[:, 1:]
    lay = stream.layout
    with torch.no_grad():
        patch = hidden[lay.group, lay.row * lay.grids[0][1] + lay.col]
        torch.testing.assert_close(features[stream.rows], base.multi_modal_projector(patch), atol=2e-6, rtol=1e-5)
    assert torch.equal(encoded.signals.values["encoder_features"][stream.rows], patch)
    assert (encoded.signals.values["encoder_features"][stream.separators] == 0).all()
    assert (features[stream.separators] == base.image_newline).all()
    # Every line of the canvas is closed by its own newline.
    last = torch.stack([stream.rows[stream.line == line].max() for line in stream.separator_line])
    assert torch.equal(last + 1, stream.separators)
    assert (lay.group[stream.line == 0] == 0).all()


def test_onevision_shrinks_large_canvases() -> None:
    """Above the anyres_max limit the canvas is resized: fewer tokens than patches, each at the patch that holds its
    point."""
    options = {"vision_aspect_ratio": "anyres_max_1"}
    encoded = encode(tiny("llava_onevision"), prompts([picture(64, 64)], "image"), **options)
    (stream,) = encoded.layouts(runs=None)
    lay = stream.layout
    tiles = lay.group > 0
    side = lay.grids[0][0]
    assert 0 < int(tiles.sum()) < 4 * side * side
    assert int(tiles.sum()) == int(2 * side // 2.0) ** 2  # 16 x 16 patches shrunk to the size of one tile
    rows = lay.row[tiles] + (lay.group[tiles] - 1) // 2 * side
    assert rows.unique().tolist() == [2 * i for i in range(side)]  # centres at 2i + 0.5, floored


def test_onevision_leaves_several_images_untiled_and_ends_videos_with_one_newline() -> None:
    streams = encode(tiny("llava_onevision"), prompts(media("", "image"), "image")).layouts()
    assert [s.layout.kind for s in streams] == ["tiles", "image", "image"]
    assert streams[1].separators.tolist() == [64]
    assert (streams[1].line == 0).all()
    encoded = encode(tiny("llava_onevision"), prompts(media("", "video"), "video"))
    for i, stream in enumerate(encoded.layouts()):
        row = encoded.features[i * stream.total + int(stream.separators)]
        assert torch.equal(row, encoded.base.image_newline)
        assert (stream.line == stream.separator_line).all()


def test_llava_keeps_cls_apart_when_the_model_hands_it_on() -> None:
    """With the strategy "full" [CLS] reaches the LLM: no candidate, kept with its image, and no patch is shifted by
    it."""
    vlm = tiny("llava")
    inputs = vlm.inputs([["a", ("image", picture()), "b"]])
    base: Any = vlm.model.base_model
    kwargs = {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1), "vision_feature_select_strategy": "full"}
    needs = ["cls_attention", "encoder_features"]
    probe = required_blocks(base, needs)
    with torch.no_grad():
        output = base.get_image_features(**kwargs, return_dict=True, output_hidden_states=True)
    signals = compute_signals(base, "image", kwargs, output, probe, needs)
    probe.remove()
    streams = stream_layouts(base, "image", kwargs, output)
    assert [s.total for s in streams] == [65, 65]
    assert streams[0].rows.tolist() == list(range(1, 65))
    assert streams[0].separators.tolist() == [0]
    hidden = output.hidden_states[-2]
    assert torch.equal(signals.values["encoder_features"].unflatten(0, (2, 65))[:, 1:], hidden[:, 1:])
    assert signals.values["cls_attention"][[0, 65]].tolist() == [0, 0]


def test_internvl_puts_the_thumbnail_first() -> None:
    encoded = encode(tiny("internvl"), prompts([picture(60, 40), picture(100, 28)], "image"))
    first, second = encoded.layouts()
    assert first.layout.thumbnail
    assert first.layout.canvas == (2, 2)
    assert second.layout.canvas == (1, 4)
    assert first.rows[:16].tolist() == list(range(64, 80))  # the last tile in the encoder's order
    assert first.rows[16:].tolist() == list(range(64))


def test_internvl_needs_only_lengths_of_runs() -> None:
    encoded = encode(tiny("internvl"), prompts([picture(60, 40), picture(40, 40)], "image"))
    streams = encoded.layouts(runs=[PlaceholderRun(run.length) for run in encoded.runs])
    assert [s.layout.num_groups for s in streams] == [5, 1]
    assert family_of(encoded.base).reads_runs
    assert not family_of(tiny("llava").model.base_model).reads_runs


@pytest.mark.parametrize("family", ["internvl", "aya_vision", "cohere2_vision", "idefics3", "ovis2", "minicpmv4_6"])
def test_tiles_are_streams_of_their_own_when_the_prompt_is_not_known(family: str) -> None:
    encoded = encode(tiny(family), prompts(media(family, "image"), "image"))
    streams = encoded.layouts(runs=None)
    assert sum(s.total for s in streams) == encoded.features.shape[0]
    assert len(streams) > 3
    assert all("without the prompt" in s.note and s.layout.num_groups == 1 for s in streams)
    assert streams[0].layout.grids[0][0] > 1  # still a grid


def test_internvl_frames_are_pictures_when_ids_cannot_be_read() -> None:
    encoded = encode(tiny("internvl"), prompts(media("", "video"), "video"))
    assert [s.layout.kind for s in encoded.layouts(decode=None)] == ["image"] * 8
    assert [s.layout.kind for s in encoded.layouts()] == ["video"] * 2


def test_smolvlm_frames_make_a_video_with_the_times_of_the_prompt() -> None:
    texts = ["a 2 s video.\n\nFrame from 00:00:<f><g>", "<f>\nFrame from 00:01:<f><g>", "<f> and <f><g>"]
    texts += ["<f> video.\n\nFrame from 01:05:<f><g>"]
    call: Any = SimpleNamespace(decode=lambda ids: texts[ids[0]])
    runs = [PlaceholderRun(16, 0, (i, 99)) for i in range(4)]
    found = list(SmolVLM().pictures(call, runs, 16))
    assert [(p.count, p.video, p.seconds) for p in found] == [(2, True, (0, 1)), (1, False, None), (1, True, (65,))]
    call.decode = None
    assert [p.count for p in SmolVLM().pictures(call, runs, 16)] == [1, 1, 1, 1]


def test_llava_with_a_pixtral_tower_has_a_grid_of_each_pictures_own() -> None:
    hf = pytest.importorskip("transformers")
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "head_dim": 8, "image_size": 48, "patch_size": 4}
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    base = hf.LlavaModel(hf.LlavaConfig(vision_config=vision, text_config=text, **options)).eval()
    kwargs = {"pixel_values": torch.rand(2, 3, 32, 48), "image_sizes": torch.tensor([[32, 24], [16, 48]])}
    needs = ["cls_attention", "encoder_features"]
    with required_blocks(base, needs) as probe, torch.no_grad():
        output = base.get_image_features(**kwargs, return_dict=True)
        values = compute_signals(base, "image", kwargs, output, probe, needs).values
        again = base.multi_modal_projector(values["encoder_features"])
    assert [s.layout.grids for s in stream_layouts(base, "image", kwargs, output)] == [((8, 6),), ((4, 12),)]
    torch.testing.assert_close(again, torch.cat(list(output.pooler_output)))
    torch.testing.assert_close(torch.stack([v.sum() for v in values["cls_attention"].split(48)]), torch.ones(2))


def test_qwen_timestamps_come_from_the_processor() -> None:
    encoded = encode(tiny("qwen2_5_vl"), prompts(media("", "video"), "video"))
    assert encoded.layouts()[0].layout.timestamps is None
    encoded.kwargs["second_per_grid_ts"] = [1.0, 0.5]
    assert encoded.layouts()[1].layout.timestamps == (0.0, 0.5)


def test_molmo2_is_a_low_and_a_full_resolution_grid() -> None:
    encoded = encode(tiny("molmo2"), prompts([picture(100, 28)], "image"))
    (stream,) = encoded.layouts()
    a, b, c, d = encoded.kwargs["image_grids"][0].tolist()
    assert stream.layout.grids == ((a, b), (c, d))
    assert stream.layout.thumbnail
    assert stream.layout.canvas == (1, 1)


def test_convolutional_towers_say_what_they_cannot_give() -> None:
    vlm = tiny("fast_vlm")
    with pytest.raises(MissingSignalError, match=r"fast_vlm cannot give 'cls_attention'.*divprune"):
        required_blocks(vlm.model.base_model, ["cls_attention"])
    encoded = encode(vlm, prompts([picture(64, 64), picture(32, 32)], "image"), ("encoder_features",))
    assert encoded.layouts()[0].layout.grids == ((4, 4),)
    with torch.no_grad():
        again = vlm.model.base_model.multi_modal_projector(encoded.signals.values["encoder_features"])
    torch.testing.assert_close(again, encoded.features)
