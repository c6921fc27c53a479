"""Scores from queries and keys against the attention maps that the models' own eager code computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokprune.runtime.probe as probe_module
from tests.adapters.probed import (
    TOLERANCE,
    call,
    compute_signals,
    eager_maps,
    required_blocks,
    run,
    seen_by,
    signals,
    tiny,
)
from tokprune.adapters.towers import tower_blocks, tower_of
from tokprune.errors import MissingSignalError, OptionError
from tokprune.runtime.probe import AttentionProbe, Projections
from tokprune.runtime.signal_blocks import block_index
from tokprune.runtime.signals import ROWS, block_values
from tokprune.testing import build, clip, picture


@pytest.mark.parametrize(
    "family", ["llava", "llava_onevision", "internvl", "aya_vision", "ovis2", "molmo2", "idefics3"]
)
def test_batched_towers_match_their_eager_attention(family: str) -> None:
    base, kwargs = call(family)
    count = len(tower_blocks(tower_of(base)))
    probe = seen_by(base, kwargs, list(range(count)))
    maps = eager_maps(base, kwargs)[:count]  # adapters behind the tower may attend as well
    for block, attention in enumerate(maps):
        seen = probe.projections(block)
        torch.testing.assert_close(seen.cls_row(), attention.mean(1)[:, 0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(seen.received(), attention.mean((1, 2)), atol=TOLERANCE, rtol=0)
    probe.remove()


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "video_llama_3", "minicpmv4_6"]
)
def test_packed_towers_match_their_eager_attention_in_every_segment(family: str) -> None:
    base, kwargs = call(family)
    count = len(tower_blocks(tower_of(base)))
    probe = seen_by(base, kwargs, list(range(count)))
    maps = iter(eager_maps(base, kwargs))
    for block in range(count):
        seen = probe.projections(block)
        assert seen.segments is not None
        expected = [next(maps).mean((1, 2))[0] for _ in seen.segments]
        if family == "minicpmv4_6" and block == base.config.vision_config.insert_layer_id:
            for _ in range(seen.q.shape[2] // 4):  # the merger's windows of 2 x 2
                next(maps)
        torch.testing.assert_close(seen.received()[0], torch.cat(expected), atol=TOLERANCE, rtol=0)
    assert next(maps, None) is None
    probe.remove()


def test_pixtral_images_do_not_see_each_other() -> None:
    base, kwargs = call("mistral3")
    probe = seen_by(base, kwargs, [0, 1])
    for block, attention in enumerate(eager_maps(base, kwargs)):
        first = int(kwargs["image_sizes"][0].prod()) // 16
        a, b = attention.mean(1)[0, :first, :first], attention.mean(1)[0, first:, first:]
        expected = torch.cat([a.mean(0), b.mean(0)])
        torch.testing.assert_close(probe.projections(block).received()[0], expected, atol=TOLERANCE, rtol=0)
    probe.remove()


def test_padded_patches_give_and_receive_nothing() -> None:
    base, _ = call("idefics3")
    tower: Any = base.vision_model
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    real = torch.zeros(2, 8, 8, dtype=torch.bool)
    real[0, :5, :6], real[1] = True, True
    probe = AttentionProbe(tower, [0]).install()
    with torch.no_grad():
        tower(pixel_values=pixels, patch_attention_mask=real)
        received = probe.projections(0).received()
        tower.set_attn_implementation("eager")
        attention = tower(pixel_values=pixels, patch_attention_mask=real, output_attentions=True).attentions[0]
        tower.set_attn_implementation("sdpa")
    probe.remove()
    flat = real.flatten(1)
    for i in range(2):
        expected = attention[i].mean(0)[flat[i]].mean(0)  # real queries only
        torch.testing.assert_close(received[i], expected * flat[i], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", sorted(ROWS))
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("additive", [True, False])
def test_no_score_depends_on_padding(kind: str, cls: bool, additive: bool) -> None:
    """Neither on padded tokens nor on other pictures of the sequence: what may not be attended to does not count."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=generator) for _ in range(3))
    part = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 3])  # two pictures, and padding that sees nothing but itself
    mask = (part[:, None] == part)[None, None]
    mask = mask.float().masked_fill(~mask, torch.finfo(torch.float32).min).where(~mask, 0.0) if additive else mask
    seen = Projections(q, k, v, 0.3, lambda x: x, mask=mask)
    values, _ = block_values(kind, seen, cls)
    for places in [slice(0, 4)] if cls else [slice(0, 4), slice(4, 7)]:
        own = Projections(q[:, :, places], k[:, :, places], v[:, :, places], 0.3, lambda x: x)
        wanted, _ = block_values(kind, own, cls)
        torch.testing.assert_close(values[:, places], wanted, atol=TOLERANCE, rtol=1e-5)


def test_pictures_of_one_sequence_have_the_signals_that_they_have_alone() -> None:
    """Mistral 3 reads all pictures of a call as one sequence."""
    vlm, needs = tiny("mistral3"), [f"{kind}:-1" for kind in ("keys", "value_norm", *ROWS)]
    pictures = [picture(60, 40, 1), picture(40, 40, 2)]
    found = []
    for shown in (pictures, *([one] for one in pictures)):
        inputs = vlm.inputs([[part for one in shown for part in (("image", one), "b")]])
        kwargs = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
        found.append(signals(vlm.model.base_model, kwargs, *needs).values)
    for name, values in found[0].items():
        torch.testing.assert_close(values, torch.cat([one[name] for one in found[1:]]), atol=1e-5, rtol=1e-4)


def test_timm_rotary_tower_matches_its_own_softmax() -> None:
    base, kwargs = call("perception_lm")
    tower: Any = tower_of(base)
    found: list[Tensor] = []
    handles = []
    for block in tower.timm_model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda m, args, out: found.append(args[0].detach())))
    probe = seen_by(base, kwargs, [0, 1])
    for block, attention in enumerate(found):
        seen = probe.projections(block)
        torch.testing.assert_close(seen.cls_row(), attention.mean(1)[:, 0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(seen.received(), attention.mean((1, 2)), atol=TOLERANCE, rtol=0)
    for block in tower.timm_model.blocks:
        block.attn.fused_attn = True
    for handle in [*handles, probe]:
        handle.remove()


def test_query_and_key_norms_are_part_of_what_is_seen() -> None:
    vlm = build("internvl")
    base, kwargs = call("internvl", vlm)
    for layer in tower_blocks(tower_of(base)):
        attention: Any = layer.attention
        attention.q_norm, attention.k_norm = nn.LayerNorm(32), nn.LayerNorm(32)
        nn.init.normal_(attention.q_norm.weight), nn.init.normal_(attention.k_norm.weight)
    probe = seen_by(base, kwargs, [1])
    expected = eager_maps(base, kwargs)[1]
    torch.testing.assert_close(probe.projections(1).cls_row(), expected.mean(1)[:, 0], atol=TOLERANCE, rtol=0)


def test_the_other_scores_of_a_block_by_hand() -> None:
    """Single head, logits, values and keys, from the projections' weights and the input of the block."""
    base, kwargs = call("llava")
    attention: Any = tower_blocks(tower_of(base))[1].self_attn
    inputs: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda m, a, k: inputs.append(k["hidden_states"]), with_kwargs=True)
    needs = ("cls_logits:1", "cls_attention_1head:1", "value_attention:1", "value_norm:1", "keys:1", "cls_attention:1")
    values = signals(base, kwargs, *needs).values
    handle.remove()
    with torch.no_grad():
        q, k, v = (getattr(attention, f"{n}_proj")(inputs[0]) for n in "qkv")  # (2, 65, 32)
    qh, kh, vh = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
    logits = (qh[:, :, :1] @ kh.transpose(-1, -2) * 8**-0.5)[:, :, 0]
    expected = {
        "cls_logits:1": logits.mean(1)[:, 1:],
        "cls_attention:1": logits.softmax(-1).mean(1)[:, 1:],  # CLS takes its share and is dropped
        "cls_attention_1head:1": (q[:, :1] @ k.transpose(-1, -2) * 32**-0.5).softmax(-1)[:, 0, 1:],
        "value_attention:1": (vh[:, :, :1] @ vh.transpose(-1, -2)).softmax(-1).mean(1)[:, 0, 1:],
        "value_norm:1": vh.mean(1).abs().sum(-1)[:, 1:],  # heads averaged first
        "keys:1": kh.transpose(1, 2)[:, 1:],
    }
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value.flatten(0, 1), atol=TOLERANCE, rtol=1e-5)


def test_towers_without_cls_answer_with_what_tokens_receive() -> None:
    base, kwargs = call("gemma3")
    needs = ("cls_attention", "received_attention:-1", "cls_logits:-1", "cls_attention_1head:-1", "value_attention:-1")
    result = signals(base, kwargs, *needs)
    assert torch.equal(result.values["cls_attention"], result.values["received_attention:-1"])
    assert result.sources["cls_attention"] == "received attention of block 2, the tower has no [CLS]"
    assert result.sources["received_attention:-1"] == "received attention of block 2"
    probe = seen_by(base, kwargs, [2])
    seen = probe.projections(2)
    probe.remove()
    pooled = nn.AvgPool2d(2)

    def tokens(score: Tensor) -> Tensor:
        return pooled(score.unflatten(1, (8, 8))[:, None]).flatten()

    logits = seen.q @ seen.k.transpose(-1, -2) * seen.scale
    torch.testing.assert_close(result.values["cls_logits:-1"], tokens(logits.mean((1, 2))), atol=TOLERANCE, rtol=0)
    values = (seen.v @ seen.v.transpose(-1, -2)).softmax(-1).mean((1, 2))
    torch.testing.assert_close(result.values["value_attention:-1"], tokens(values), atol=TOLERANCE, rtol=0)
    q, k = (t.transpose(1, 2).flatten(2) for t in (seen.q, seen.k))
    one = (q @ k.transpose(-1, -2) * 32**-0.5).softmax(-1).mean(1)
    torch.testing.assert_close(result.values["cls_attention_1head:-1"], tokens(one), atol=TOLERANCE, rtol=0)


def test_windows_of_different_sizes_stay_comparable() -> None:
    """A column mean over all queries of the picture: edge windows with few queries do not look more attended."""
    base, kwargs = call("qwen2_5_vl")
    values = signals(base, kwargs, "received_attention:0", "received_attention:-1").values
    tokens = [int(n) // 4 for n in kwargs["image_grid_thw"].prod(1)]
    for name in values:
        for part, n in zip(values[name].split(tokens), tokens, strict=True):
            assert float(part.mean()) == pytest.approx(1 / (4 * n), rel=1e-5)  # everything received sums to 1
    spread = values["received_attention:0"].split(tokens)[0]
    assert float(spread.max() / spread.min()) < 20


def test_qwen_signals_leave_the_window_order() -> None:
    base, kwargs = call("qwen2_5_vl")
    result = signals(base, kwargs, "keys:0", "encoder_features")
    output = run(base, kwargs)
    window = base.visual.merger(output.last_hidden_state)
    raster = torch.cat(list(output.pooler_output))
    assert not torch.allclose(window, raster)
    order = torch.cdist(raster, window).argmin(1)  # where the tower holds each token
    blocks = output.last_hidden_state.unflatten(0, (-1, 4)).mean(1)
    torch.testing.assert_close(result.values["encoder_features"], blocks[order])


def test_query_chunks_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    base, kwargs = call("llava")
    probe = seen_by(base, kwargs, [3])
    whole = probe.projections(3).received()
    monkeypatch.setattr(probe_module, "_CHUNK", 2 * 4 * 65 * 7)  # seven queries at a time
    torch.testing.assert_close(probe.projections(3).received(), whole, atol=TOLERANCE, rtol=0)
    probe.remove()


def test_block_numbers() -> None:
    assert [block_index(s, 24) for s in ("8", "-1", "0", "0.348", " 22 ", -2, 0.5)] == [8, 23, 0, 8, 22, 22, 12]
    assert block_index("0.348", 12) == 4
    assert block_index("0.999", 1) == 0
    for spec, hint in (("24", "0.348"), ("-25", "has 24 blocks"), ("1.0", "relative depth"), ("last", "0 to 23")):
        with pytest.raises(OptionError, match=hint):
            block_index(spec, 24)


@pytest.mark.parametrize(
    ("family", "layer", "block"),
    [("llava", -2, 2), ("llava", -1, 3), ("llava", 1, 0), ("vipllava", [-3, 1], 1), ("vipllava", [1, -2], 0)],
)
def test_cls_attention_is_that_of_the_block_whose_output_is_selected(family: str, layer: Any, block: int) -> None:
    vlm = build(family)
    vlm.model.config.vision_feature_layer = layer
    base, kwargs = call(family, vlm)
    if isinstance(layer, list):
        base.multi_modal_projector = nn.Identity()  # made for another number of hidden states
    result = signals(base, kwargs, "cls_attention", f"cls_attention:{block}", "encoder_features")
    assert torch.equal(result.values["cls_attention"], result.values[f"cls_attention:{block}"])
    hidden = run(base, kwargs, output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[i][:, 1:] for i in (layer if isinstance(layer, list) else [layer])], -1)
    torch.testing.assert_close(result.values["encoder_features"], expected.flatten(0, 1))


def test_qwen_takes_the_last_block_that_sees_the_whole_picture() -> None:
    vlm = build("qwen2_5_vl")
    base, kwargs = call("qwen2_5_vl", vlm)
    base.visual.fullatt_block_indexes = [0, 1]
    assert "block 1," in signals(base, kwargs, "cls_attention").sources["cls_attention"]


class Scorer:
    """Embeds a patch as its mean colour."""

    def __init__(self, side: int = 8) -> None:
        self.side = side

    def embed_image(self, pixels: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pixels, self.side).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video", "internvl"])
def test_a_scorers_patch_embeddings_follow_the_tiles(family: str) -> None:
    """Every token's embedding is the mean colour of its own patches, in whatever tile they are."""
    from tokprune.adapters.families import EncoderCall, PlaceholderRun, family_of, stream_layouts

    base, kwargs = call(family)
    output = run(base, kwargs)
    result = compute_signals(base, "image", kwargs, output, None, ["clip_image"], scorer=Scorer())
    assert result.sources["clip_image"] == "patch embeddings of Scorer"
    units = family_of(base, kwargs).units(EncoderCall(base, "image", kwargs, output))
    runs = None if family != "internvl" else [PlaceholderRun(len(units) * 16)]
    unit, row = 0, 0
    for stream in stream_layouts(base, "image", kwargs, output, runs=runs):
        lay = stream.layout
        side = lay.grids[0][0]
        colour = nn.functional.adaptive_avg_pool2d(units[unit : unit + lay.num_groups], side)
        if family == "internvl":
            colour = colour.roll(1, 0)  # its thumbnail is the last tile
        expected = colour[lay.group, :, lay.row, lay.col]
        torch.testing.assert_close(result.values["clip_image"][row + stream.rows], expected, atol=1e-5, rtol=1e-5)
        unit, row = unit + lay.num_groups, row + stream.total
    assert unit == len(units)


def test_a_scorer_with_another_grid_is_resized() -> None:
    base, kwargs = call("llava")
    output = run(base, kwargs)
    result = compute_signals(base, "image", kwargs, output, None, ["clip_image"], scorer=Scorer(4))
    assert result.values["clip_image"].shape == (128, 3)
    assert result.sources["clip_image"].endswith("tower's grid")


def test_errors_say_what_to_do() -> None:
    base, kwargs = call("llava")
    with pytest.raises(OptionError, match="Did you mean 'cls_attention'"):
        required_blocks(base, ["cls_atention"])
    with pytest.raises(OptionError, match="takes no block"):
        required_blocks(base, ["encoder_features:3"])
    with pytest.raises(OptionError, match="does not exist"):
        required_blocks(base, ["keys:99"])
    with pytest.raises(MissingSignalError, match="pass a scorer"):
        compute_signals(base, "image", kwargs, run(base, kwargs), None, ["clip_image"])
    with pytest.raises(MissingSignalError, match="nothing was seen of block 0"):
        compute_signals(base, "image", kwargs, run(base, kwargs), None, ["keys:0"])
    qwen, packed = call("qwen2_vl")
    with pytest.raises(MissingSignalError, match="pictures"):
        compute_signals(qwen, "image", packed, run(qwen, packed), None, ["clip_image"], scorer=Scorer())


def test_videos_give_signals_too() -> None:
    vlm = tiny("qwen3_vl")
    inputs = vlm.inputs([["v ", ("video", clip(4, 48, 48, 1)), " what?"]])
    base: Any = vlm.model.base_model
    kwargs = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    needs = ["cls_attention"]
    with required_blocks(base, needs) as probe, torch.no_grad():
        output = base.get_video_features(**kwargs, return_dict=True)
        found = compute_signals(base, "video", kwargs, output, probe, needs).values["cls_attention"]
    frames = found.unflatten(0, (2, -1))
    torch.testing.assert_close(frames.sum(1), torch.full((2,), 0.25))  # a mean over the four patches of each token
