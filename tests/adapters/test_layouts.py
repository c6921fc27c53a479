"""Layouts against the models themselves: what a layout says about a token must be what the encoder did with the picture."""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tokprune.adapters.base import get_adapter
from tokprune.adapters.families import FAMILIES as LISTED
from tokprune.adapters.families import (
    EncoderCall,
    PlaceholderRun,
    StreamLayout,
    arrange,
    family_of,
    placeholder_runs,
    stream_layouts,
)
from tokprune.adapters.families.geometry import canvas_from_pixels, canvas_from_shape, scaled_grid
from tokprune.adapters.families.idefics import SmolVLM
from tokprune.adapters.towers import tower_of
from tokprune.errors import MissingSignalError
from tokprune.runtime.signals import SignalSet, compute_signals, required_blocks
from tokprune.testing import FAMILIES, TinyVLM, build, clip, picture

Samples = list[list[Any]]
VIDEO = ("llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "glm4v")
VIDEO += ("perception_lm", "video_llama_3", "minicpmv4_6", "molmo2")
CASES = [(family, "image") for family in FAMILIES] + [(family, "video") for family in VIDEO]


@functools.cache
def tiny(family: str) -> TinyVLM:
    return build(family)


@dataclass
class Encoded:
    """One encoder call of a tiny model and what the runtime would know about it."""

    vlm: TinyVLM
    modality: str
    kwargs: dict[str, Any]
    output: Any
    runs: list[PlaceholderRun]
    signals: SignalSet

    @property
    def base(self) -> Any:
        return self.vlm.model.base_model

    @property
    def features(self) -> Tensor:
        return torch.cat([f.reshape(-1, f.shape[-1]) for f in self.output.pooler_output])

    @property
    def call(self) -> EncoderCall:
        return EncoderCall(self.base, self.modality, self.kwargs, self.output)

    def layouts(self, **changes: Any) -> list[StreamLayout]:
        more = {"runs": self.runs, "decode": self.vlm.processor.tokenizer.decode} | changes
        return stream_layouts(self.base, self.modality, self.kwargs, self.output, **more)


@torch.no_grad()
def encode(vlm: TinyVLM, samples: Samples, needs: tuple[str, ...] = (), **options: Any) -> Encoded:
    """Run the encoder on a batch of prompts, as generate() does."""
    inputs, base, adapter = vlm.inputs(samples), vlm.model.base_model, get_adapter(vlm.model)
    modality = "video" if "pixel_values_videos" in inputs else "image"
    name, argument = adapter.family.encoder(adapter.base, modality) or ("", "")
    function = getattr(base, name)
    kwargs = {k: v for k, v in inputs.items() if k in inspect.signature(function).parameters}
    if argument:
        kwargs = {argument: inputs[{"image": "pixel_values", "video": "pixel_values_videos"}[modality]]}
    kwargs |= options
    probe = required_blocks(base, needs)
    output = function(**kwargs, return_dict=True)
    signals = compute_signals(base, modality, kwargs, output, probe, needs)
    probe.remove()
    columns = adapter.placeholders(inputs, {modality: output})[modality]
    return Encoded(vlm, modality, kwargs, output, placeholder_runs(inputs["input_ids"], columns), signals)


def prompts(pictures: list[Any], kind: str) -> Samples:
    """The first picture in a prompt of its own, the others together in a second."""
    parts = [(kind, p) for p in pictures]
    rows = [parts[:1], parts[1:]] if len(parts) > 1 else [parts]
    return [["look ", *(x for part in row for x in (part, " and ")), "what?"] for row in rows]


def media(family: str, kind: str) -> list[Any]:
    if kind == "video":
        return [clip(4, 48, 48, 1), clip(4, 48, 48, 2)]
    size = 3 if family == "minicpmv4_6" else 1  # its pictures are cut only when they are larger
    # LLaVA-OneVision pads pictures that share a prompt to squares: what is square has no padding to reckon with.
    last = (40, 40) if family == "llava_onevision" else (100 * size, 28 * size)
    return [picture(60 * size, 40 * size, 1), picture(40, 40, 2), picture(*last, 3)]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_streams_partition_the_rows(family: str, kind: str) -> None:
    pictures = media(family, kind)
    encoded = encode(tiny(family), prompts(pictures, kind))
    streams = encoded.layouts()
    assert sum(s.total for s in streams) == encoded.features.shape[0] == sum(r.length for r in encoded.runs)
    assert len(streams) == len(pictures)
    for stream in streams:
        lay, n = stream.layout, len(stream.rows)
        assert stream.note == ""
        assert torch.equal(torch.cat([stream.rows, stream.separators]).sort().values, torch.arange(stream.total))
        assert len(lay.group) == len(lay.row) == len(lay.col) == len(stream.line) == n
        assert len(stream.separators) == len(stream.separator_line)
        assert (lay.kind == "video") == (kind == "video")
        assert (lay.kind == "tiles") == (lay.num_groups > 1 and kind == "image") == lay.thumbnail
        assert sum(lay.group_sizes) == n
        grids = torch.tensor(lay.grids)[lay.group]
        assert ((lay.row >= 0) & (lay.row < grids[:, 0]) & (lay.col >= 0) & (lay.col < grids[:, 1])).all()
        place = (lay.group * 1000 + lay.row) * 1000 + lay.col
        assert (place.diff() > 0).all()  # groups ascend, raster inside, no token twice
        if lay.canvas is not None:
            assert lay.canvas[0] * lay.canvas[1] + 1 == lay.num_groups
        assert set(stream.separator_line.tolist()) <= set(stream.line.tolist())


def silence(tower: nn.Module) -> None:
    """Let attention add nothing: every patch is then encoded from its own pixels alone."""
    for module in tower.modules():
        if any(isinstance(getattr(module, name, None), nn.Module) for name in ("qkv", "q_proj")):
            for name in ("out_proj", "o_proj", "proj", "projection_layer"):
                out = getattr(module, name, None)
                if isinstance(out, nn.Linear):
                    nn.init.zeros_(out.weight)
                    if out.bias is not None:
                        nn.init.zeros_(out.bias)


def painted(content: Any, v: float, u: float) -> Any:
    """The picture with a square around (v, u), shares of its height and width, inverted."""
    pixels = np.array(content)
    h, w = pixels.shape[-3:-1]
    half = max(0.06 * min(h, w), 2.0)
    box = (slice(round(v * h - half), round(v * h + half)), slice(round(u * w - half), round(u * w + half)))
    pixels[(..., *box, slice(None))] = 255 - pixels[(..., *box, slice(None))]
    return Image.fromarray(pixels) if pixels.ndim == 3 else pixels


def centre(weight: Tensor, at: Tensor, size: float) -> float:
    """Where on an axis of `size` cells the changed tokens lie, as a share."""
    weight = weight * (weight > 0.25 * weight.max())
    return float((weight * (at + 0.5)).sum() / weight.sum() / size)


def spots(stream: StreamLayout, change: Tensor) -> list[tuple[float, float, float, float]]:
    """(v, u, cell height, cell width) of the change in the thumbnail, if any, and in the canvas or grid."""
    lay, out = stream.layout, []
    views = [lay.group == 0, lay.group > 0] if lay.thumbnail else [torch.ones_like(lay.group, dtype=torch.bool)]
    for view in views:
        group, row, col = lay.group[view], lay.row[view], lay.col[view]
        if lay.thumbnail and bool((group > 0).any()):
            assert lay.canvas is not None
            h, w = lay.grids[1]
            row = row + (group - 1) // lay.canvas[1] * h
            col = col + (group - 1) % lay.canvas[1] * w
        row, col = row - row.min(), col - col.min()  # unpadding leaves the picture's part of the canvas
        height, width = int(row.max()) + 1, int(col.max()) + 1
        found = change[view]
        out.append((centre(found, row, height), centre(found, col, width), 1 / height, 1 / width))
    return out


@functools.cache
def silenced(family: str) -> TinyVLM:
    vlm = replace(tiny(family), model=copy.deepcopy(tiny(family).model))
    silence(tower_of(vlm.model.base_model))
    return vlm


@pytest.mark.parametrize("place", [(0.28, 0.2), (0.6, 0.8)])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "fast_vlm"])
def test_a_painted_spot_changes_the_token_the_layout_names(family: str, place: tuple[float, float]) -> None:
    """Features and signals both: the token that changes lies where the picture changed, in thumbnail and tiles alike."""
    vlm = silenced(family)
    crops = family in ("llava", "vipllava")  # their processors cut the middle out
    before = [picture(64, 64, 1)] if crops else media(family, "image")
    after = [painted(content, *place) for content in before]
    clean, dirty = (encode(vlm, prompts(p, "image"), ("keys:0", "encoder_features")) for p in (before, after))
    start = 0
    for stream in clean.layouts():
        rows = start + stream.rows
        start += stream.total
        pairs = [(clean.features, dirty.features)]
        pairs += [(clean.signals.values[name], dirty.signals.values[name]) for name in clean.signals.values]
        for one, two in pairs:
            change = (one[rows] - two[rows]).flatten(1).abs().sum(1)
            assert float(change.max()) > 0
            for v, u, height, width in spots(stream, change):
                assert v == pytest.approx(place[0], abs=0.75 * height + 0.03)
                assert u == pytest.approx(place[1], abs=0.75 * width + 0.03)


@pytest.mark.parametrize("family", VIDEO)
def test_a_painted_frame_changes_the_frame_the_layout_names(family: str) -> None:
    vlm, place, frame = silenced(family), (0.28, 0.75), 3
    before = media(family, "video")
    after = [content.copy() for content in before]
    for content in after:
        content[frame] = painted(content[frame], *place)
    clean, dirty = (encode(vlm, prompts(p, "video"), ("keys:0",)) for p in (before, after))
    start = 0
    for stream in clean.layouts():
        rows = start + stream.rows
        start += stream.total
        lay = stream.layout
        for one, two in (
            (clean.features, dirty.features),
            (clean.signals.values["keys:0"], dirty.signals.values["keys:0"]),
        ):
            change = (one[rows] - two[rows]).flatten(1).abs().sum(1)
            per_frame = torch.zeros(lay.num_groups).index_add(0, lay.group, change)
            assert int(per_frame.argmax()) == frame * lay.num_groups // 4
            assert float(per_frame.sort().values[:-1].sum()) < 1e-3 * float(per_frame.max())
            h, w = lay.grids[0]
            assert centre(change, lay.row, h) == pytest.approx(place[0], abs=0.75 / h + 0.03)
            assert centre(change, lay.col, w) == pytest.approx(place[1], abs=0.75 / w + 0.03)


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
    """Above the anyres_max limit the canvas is resized: fewer tokens than patches, each at the patch that holds its point."""
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
    """With the strategy "full" [CLS] reaches the LLM: no candidate, kept with its image, and no patch is shifted by it."""
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
    streams = encoded.layouts(runs=[run.length for run in encoded.runs])
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


class Strange:
    """A base model of an unlisted type."""

    def __init__(self, **vision: Any) -> None:
        self.config = SimpleNamespace(model_type="strange_vlm", vision_config=SimpleNamespace(**vision))


def strange(n: int, pixels: Tensor | None, items: int = 2, **kwargs: Any) -> list[StreamLayout]:
    given = {} if pixels is None else {"pixel_values": pixels}
    output = SimpleNamespace(pooler_output=torch.zeros(items, n, 3))
    return stream_layouts(Strange(), "image", given | kwargs, output)  # type: ignore[arg-type]


def test_unlisted_models_get_a_grid_or_a_line_with_a_note() -> None:
    square, wide = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 16, 32)
    assert strange(64, square)[0].layout.grids == ((8, 8),)
    assert strange(32, wide)[1].layout.grids == ((4, 8),)
    for found in (strange(63, square), strange(64, None), strange(64, torch.zeros(3, 3, 32, 32))):
        assert [s.layout.grids for s in found] == [((1, len(s.rows)),) for s in found]
        assert all("geometry of strange_vlm unknown" in s.note for s in found)
    grid = torch.tensor([[1, 8, 16]])
    assert strange(32, None, 1, image_grid_thw=grid)[0].layout.grids == ((4, 8),)


def test_a_contradiction_ends_in_lines_not_in_wrong_places() -> None:
    encoded = encode(tiny("qwen2_vl"), prompts([picture()], "image"))
    encoded.output.pooler_output = [encoded.features[:-1]]
    (stream,) = encoded.layouts()
    assert stream.layout.grids == ((1, stream.total),)
    assert "geometry of qwen2_vl unknown" in stream.note


def test_placeholder_runs_see_what_stands_between() -> None:
    ids = torch.tensor([[0, 5, 9, 9, 6, 9, 7], [5, 9, 9, 9, 1, 1, 9]])
    assert placeholder_runs(ids, ids == 9) == [
        PlaceholderRun(2, 0, (0, 5)),
        PlaceholderRun(1, 0, (6,)),
        PlaceholderRun(3, 1, (5,)),
        PlaceholderRun(1, 1, (1, 1)),
    ]
    assert placeholder_runs(ids, ids == 3) == []


@pytest.mark.parametrize("canvas", [(1, 6), (6, 1), (2, 3), (3, 2)])
def test_the_canvas_is_read_off_the_pixels(canvas: tuple[int, int]) -> None:
    whole = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    big = nn.functional.interpolate(whole[None], (canvas[0] * 32, canvas[1] * 32), mode="bilinear")[0]
    small = nn.functional.interpolate(whole[None], (32, 32), mode="bilinear")[0]
    tiles = big.unflatten(1, (canvas[0], 32)).unflatten(3, (canvas[1], 32)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    assert canvas_from_pixels(tiles, small) == (canvas, True)


def test_an_even_picture_has_no_clear_canvas() -> None:
    shape, clear = canvas_from_pixels(torch.zeros(6, 3, 8, 8), torch.zeros(3, 8, 8))
    assert shape in ((2, 3), (3, 2))
    assert not clear


def test_shapes() -> None:
    assert canvas_from_shape(2, (4, 4), (3, 6)) == (1, 2)
    assert canvas_from_shape(2, (4, 4), (6, 3)) == (2, 1)
    assert scaled_grid((27, 27), 196) == (14, 14)  # odd sides are rounded up
    assert scaled_grid((16, 32), 128) == (8, 16)
    assert scaled_grid((16, 32), 63) is None


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


def test_arrange_refuses_patches_that_do_not_fit() -> None:
    encoded = encode(tiny("llava"), [["a", ("image", picture()), "b"]])
    assert arrange(encoded.call, torch.arange(64.0)).tolist() == list(range(64))
    with pytest.raises(Exception, match="values were made for 64 rows"):
        arrange(encoded.call, torch.zeros(128, 2))


def test_every_family_of_the_matrix_is_listed() -> None:
    assert set(FAMILIES) <= set(LISTED)
