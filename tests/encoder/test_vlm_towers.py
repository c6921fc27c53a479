"""Encoder-stage methods inside VLMs: the tower's output still fits the connector and equals a dense forward without
hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.encoder.all_towers import hooks, written_out
from tests.published.bipartite import unmerge
from tokprune.adapters.hf_tower_kinds import block_order
from tokprune.errors import OptionError
from tokprune.ops.merge import bipartite_matching, merge_weighted
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import TinyVLM, build, clip, picture

close = torch.testing.assert_close
ALL = (
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "gemma3",
    "idefics3",
    "aya_vision",
    "ovis2",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def two_images(tiny: TinyVLM) -> Any:
    return tiny.inputs([["a ", ("image", picture(60, 40)), "?"], ["b ", ("image", picture(40, 72, seed=1)), "!"]])


def encode(tiny: TinyVLM, inputs: Any, modality: str = "image") -> Any:
    """What the LLM would receive, and DeepStack planes, if any."""
    names = {
        "image": ("pixel_values", "image_grid_thw", "image_sizes"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    kwargs = {k: inputs[k] for k in names[modality] if k in inputs}
    return getattr(tiny.model.base_model, f"get_{modality}_features")(**kwargs, return_dict=True)


def rows(features: Any) -> Tensor:
    return torch.cat([f.reshape(-1, f.shape[-1]) for f in features])


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_nothing_merged_is_bit_identical_and_removal_leaves_no_trace(family: str) -> None:
    tiny = build(family)
    inputs = two_images(tiny)
    plain = tiny.model(**inputs).logits
    before = hooks(tiny.model)
    with apply_encoder(tiny.model, "tome", r=0):
        assert torch.equal(tiny.model(**inputs).logits, plain)
    with apply_encoder(tiny.model, "tome", ratio=0.4):
        assert not torch.allclose(tiny.model(**inputs).logits, plain)
    assert torch.equal(tiny.model(**inputs).logits, plain)
    assert hooks(tiny.model) == before


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("method", ["tome", "evit", "zerotprune", "ats"])
@torch.no_grad()
def test_members_of_a_group_reach_the_llm_as_one(family: str, method: str) -> None:
    """Where the connector works patch by patch (or unit by unit), all places of a group carry the same feature."""
    tiny = build(family)
    inputs = two_images(tiny)
    with apply_encoder(tiny.model, method, ratio=0.4) as pruning:
        features = encode(tiny, inputs)
    trace = pruning.trace
    assert trace.assign.shape == trace.survivor.shape
    used = trace.assign >= 0
    assert (trace.assign[trace.survivor] >= 0).all()
    if method == "tome":
        assert used.all()
        assert torch.equal(trace.size.sum(), torch.tensor(float(trace.assign.numel())))
    if family in ("llava_next", "llava_onevision"):  # unpads and adds newlines: no plain order
        return
    flat = rows(features.pooler_output).view(*trace.assign.shape, -1)
    assign, flat = (t[None] if trace.assign.ndim == 1 else t for t in (trace.assign, flat))
    for group, values in zip(assign, flat, strict=True):
        for number in group.unique().tolist():
            same = values[group == number]
            close(same, same[:1].expand_as(same), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@torch.no_grad()
def test_clip_tower_of_llava_equals_a_dense_forward(family: str) -> None:
    tiny = build(family)
    inputs = two_images(tiny)
    seen: dict[str, Tensor] = {}
    pruning = apply_encoder(tiny.model, "tome", r=9)
    first = pruning.encoder.tower.blocks[0].block
    handles = [
        first.register_forward_pre_hook(
            lambda m, a, kw: seen.update(x=a[0] if a else kw["hidden_states"]), with_kwargs=True
        ),
        tiny.model.base_model.multi_modal_projector.register_forward_pre_hook(lambda m, a: seen.update(selected=a[0])),
    ]
    encode(tiny, inputs)
    assert [h.remove() for h in handles]
    pruning.remove()
    depth = pruning.encoder.tower.depth
    assert depth == len(pruning.encoder.tower.blocks) - 1  # vision_feature_layer=-2
    blocks = [p.block for p in pruning.encoder.tower.blocks[:depth]]
    close(seen["selected"], written_out(None, seen["x"], 9, 1, blocks)[-1][:, 1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_internvl_merges_whole_units() -> None:
    tiny = build("internvl")
    inputs = tiny.inputs([["a ", ("image", picture(70, 30)), "?"]])  # several tiles
    seen: dict[str, Tensor] = {}
    pruning = apply_encoder(tiny.model, "tome", r=3)
    blocks = [p.block for p in pruning.encoder.tower.blocks]
    watch = blocks[0].register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    got = rows(encode(tiny, inputs).pooler_output)
    assert watch.remove() is None
    pruning.remove()
    x = seen["x"]
    order = block_order(2, x.shape[1] - 1)
    head, units = x[:, :1], x[:, 1:][:, order].unflatten(1, (-1, 4))  # (T, 1, C), (T, U, 4, C)
    size, maps = torch.ones(*units.shape[:2], 1), []
    for block in blocks:
        a = block.attention
        x = torch.cat([head, units.flatten(1, 2)], 1)
        h = block.layernorm_before(x)
        q, k, v = (
            t.unflatten(2, (a.num_heads, -1)).transpose(1, 2)
            for t in (a.q_norm(a.q_proj(h)), a.k_norm(a.k_proj(h)), a.v_proj(h))
        )
        weight = torch.cat([torch.ones(len(x), 1), size[..., 0].repeat_interleave(4, 1)], 1)
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + weight.log()[:, None, None]
        x = x + block.lambda_1 * a.projection_layer((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        metric = k.mean(1)[:, 1:].unflatten(1, (-1, 4)).mean(2)
        matching = bipartite_matching(metric, 3)
        merged, size = merge_weighted(matching, x[:, 1:].unflatten(1, (-1, 4)).flatten(2), size)
        maps.append(matching)
        x = torch.cat([x[:, :1], merged.unflatten(2, (4, -1)).flatten(1, 2)], 1)
        x = x + block.lambda_2 * block.mlp(block.layernorm_after(x))
        head, units = x[:, :1], x[:, 1:].unflatten(1, (-1, 4))
    wide = units.flatten(2)
    for matching in reversed(maps):
        wide = unmerge(matching, wide)
    grid = torch.empty(len(x), 64, units.shape[-1])
    grid[:, order] = wide.unflatten(2, (4, -1)).flatten(1, 2)
    model = tiny.model.base_model
    shuffled = model.pixel_shuffle(model.vision_tower.layernorm(grid).view(len(x), 8, 8, -1), scale_factor=0.5)
    expected = model.multi_modal_projector(shuffled.flatten(1, 2))
    close(got, rows(expected), atol=1e-5, rtol=1e-5)


def dense_qwen(
    tower: Any, calls: list[dict[str, Any]], frames: list[int], r: int, looks: list[dict[str, Tensor]] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Rows (S, C) that leave each block under ToMe of units, at full length; attention by a mask over all pairs.

    calls: what each block was given without any pruning. frames: units of each frame, in order. looks: gets, per block,
    its attention (H, S, S), keys (S, H, hd), the frame of each token, and the row (unit) of every original unit.
    """

    def segments(cu: Tensor) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(cu) - 1), (cu[1:] - cu[:-1]).long() // 4)

    x = calls[0]["x"]
    cos, sin = calls[0]["position_embeddings"]
    frame = torch.repeat_interleave(torch.arange(len(frames)), torch.tensor(frames))
    place, group = torch.arange(len(frame)), torch.arange(len(frame))
    size, outs = torch.ones(len(frame)), []
    for block, call in zip(tower.blocks, calls, strict=True):
        a = block.attn
        tokens = (place[:, None] * 4 + torch.arange(4)).flatten()
        q, k, v = a.qkv(block.norm1(x)).unflatten(1, (3, a.num_heads, -1)).unbind(1)
        keys = k.mean(1)

        def turn(t: Tensor, rows: Tensor = tokens) -> Tensor:
            low, high = t.chunk(2, -1)
            return t * cos[rows][:, None] + torch.cat([-high, low], -1) * sin[rows][:, None]

        segment = segments(call["cu_seqlens"])[place].repeat_interleave(4)
        logits = torch.einsum("qhd,khd->hqk", turn(q), turn(k)) * a.scaling + size.repeat_interleave(4).log()
        logits = logits.masked_fill(segment[:, None] != segment, -torch.inf)
        if looks is not None:
            seen = {"attention": logits.softmax(-1), "keys": k, "group": group}
            looks.append({**seen, "frame": frame[place].repeat_interleave(4)})
        x = x + a.proj(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v).flatten(1))
        units, metric = x.view(len(place), -1), keys.view(len(place), 4, -1).mean(1)
        keep = torch.ones(len(place), dtype=torch.bool)
        total, count = units * size[:, None], size.clone()
        target = torch.arange(len(place))
        for f in range(len(frames)):
            ids = (frame[place] == f).nonzero()[:, 0]
            matching = bipartite_matching(metric[ids][None], r)
            to = ids[matching.rep[0][matching.assign[0]]]
            gone = to != ids
            keep[ids[gone]] = False
            total.index_add_(0, to[gone], (units * size[:, None])[ids[gone]])
            count.index_add_(0, to[gone], size[ids[gone]])
            target[ids] = to
        row = keep.cumsum(0) - 1
        group = row[target[group]]
        x = (total / count[:, None])[keep].view(-1, x.shape[1])
        place, size = place[keep], count[keep]
        x = x + block.mlp(block.norm2(x))
        outs.append(x.view(len(place), -1)[group].view(-1, x.shape[1]))
    return x, outs


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("what", ["images", "clip"])
@torch.no_grad()
def test_packed_towers_equal_a_dense_forward(family: str, what: str) -> None:
    """Images of different sizes in one call, or a clip: windows, frames, DeepStack and the merger see the right
    rows."""
    tiny = build(family)
    if what == "images":
        inputs, modality = two_images(tiny), "image"
    else:
        inputs, modality = tiny.inputs([["v ", ("video", clip(6, 48, 40)), "?"]]), "video"
    tower = tiny.model.base_model.visual
    calls: list[dict[str, Any]] = []
    watch = [
        b.register_forward_pre_hook(
            lambda m, a, kw: calls.append({**kw, "x": a[0] if a else kw["hidden_states"]}), with_kwargs=True
        )
        for b in tower.blocks
    ]
    encode(tiny, inputs, modality)
    assert [h.remove() for h in watch]
    grid = inputs["image_grid_thw" if modality == "image" else "video_grid_thw"]
    frames = [int(h * w) // 4 for t, h, w in grid.tolist() for _ in range(t)]
    assert len(frames) > 1
    _, outs = dense_qwen(tower, calls, frames, r=3)
    with apply_encoder(tiny.model, "tome", r=3) as pruning:
        got = encode(tiny, inputs, modality)
    merged = tower.merger(outs[-1])
    if pruning.encoder.tower.grids is not None:
        order = pruning.encoder.tower.grids(grid, {})
        merged = torch.empty_like(merged).index_copy_(0, order, merged)
    close(rows(got.pooler_output), merged, atol=1e-5, rtol=1e-5)
    if family == "qwen3_vl":
        for plane, index, module in zip(
            got.deepstack_features, tower.deepstack_visual_indexes, tower.deepstack_merger_list, strict=True
        ):
            close(rows(plane) if isinstance(plane, (list, tuple)) else plane, module(outs[index]), atol=1e-5, rtol=1e-5)
    left = [max(n - 3 * len(tower.blocks), 0) for n in frames]
    assert pruning.trace.survivor.split(frames)[0].sum() == left[0] or frames[0] < 24


@pytest.mark.parametrize("family", PACKED)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours(family: str) -> None:
    tiny = build(family)
    both = two_images(tiny)
    one = tiny.inputs([["a ", ("image", picture(60, 40)), "?"]])
    with apply_encoder(tiny.model, "tome", ratio=0.4):
        together, alone = encode(tiny, both), encode(tiny, one)
    close(rows(together.pooler_output[:1]), rows(alone.pooler_output), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_flash_kernels_get_borders_of_the_rows_that_are_left() -> None:
    """The packed borders that a block receives add up to its rows, with the longest segment beside them where it was
    given."""
    tiny = build("qwen2_5_vl")
    calls: list[dict[str, Any]] = []
    with apply_encoder(tiny.model, "tome", ratio=0.3):
        watch = [
            b.attn.register_forward_pre_hook(
                lambda m, a, kw: calls.append({**kw, "x": a[0] if a else kw["hidden_states"]}), with_kwargs=True
            )
            for b in tiny.model.base_model.visual.blocks
        ]
        encode(tiny, two_images(tiny))
        assert [h.remove() for h in watch]
    assert len({len(c["x"]) for c in calls}) > 1
    for call in calls:
        assert call["cu_seqlens"][-1] == len(call["x"]) == len(call["position_embeddings"][0])
        assert call["cu_seqlens"].diff().gt(0).all()
        assert call["cu_seqlens"].dtype == torch.int32


@torch.no_grad()
def test_generation_runs_with_the_encoder_stage_alone() -> None:
    for family in ("llava", "qwen2_5_vl"):
        tiny = build(family)
        with apply_encoder(tiny.model, "tome", ratio=0.5):
            assert tiny.model.generate(**two_images(tiny), max_new_tokens=3).shape[0] == 2


@torch.no_grad()
def test_padded_batches_are_refused() -> None:
    tiny = build("idefics3")
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), "?"]])
    inputs["pixel_attention_mask"] = torch.ones_like(inputs["pixel_values"][:, :, 0]).bool()
    inputs["pixel_attention_mask"][:, :, :8] = False
    with apply_encoder(tiny.model, "tome", ratio=0.5), pytest.raises(Exception, match="equal size"):
        tiny.model(**inputs)


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_merge_maps_lie_on_the_grid(family: str) -> None:
    """Cells of a group carry the same feature at their places on the grid, also where the tower reorders them by
    windows."""
    tiny = build(family)
    with apply_encoder(tiny.model, "tome", ratio=0.3) as pruning:
        features = encode(tiny, two_images(tiny))
    trace = pruning.trace
    for image, flat in enumerate(f.reshape(-1, f.shape[-1]) for f in features.pooler_output[: len(trace.cells)]):
        picture_map = trace.merge_map(image)
        assert picture_map.numel() == len(flat)
        grid = flat.view(*picture_map.shape, -1)
        for group in picture_map.unique().tolist():
            same = grid[picture_map == group]
            close(same, same[:1].expand_as(same), atol=1e-5, rtol=1e-5)
    with pytest.raises(OptionError, match="not among"):
        trace.merge_map(len(trace.cells))
