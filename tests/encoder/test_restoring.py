"""Methods that leave the full sequence and restore it (IPCV, ToC3D's router) against forwards written out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.encoder.all_towers import TOWERS, output, parts, pixels, timm_vit
from tests.encoder.test_vlm_towers import PACKED, encode, rows, two_images
from tests.encoder.written_out import attend, seen_by_blocks, think
from tokprune import apply
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.methods.encoder import ipcv
from tokprune.methods.encoder.ipcv import IPCV, movement, neighbours, rebuilt
from tokprune.methods.encoder.toc3d import ToC3D
from tokprune.methods.encoder_base import BlockView
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import build, picture

close = torch.testing.assert_close


@pytest.mark.parametrize("name", ["timm", "timm registers", "clip", "internvl", "open_clip layer scale"])
@pytest.mark.parametrize("steady", [0, 1, 5])
@torch.no_grad()
def test_ipcv_equals_a_written_out_forward(name: str, steady: int) -> None:
    model = TOWERS[name]()
    with apply_encoder(model, IPCV(keep=0.4, first=0, steady=steady, neighbours=3)) as pruning:
        x, got = seen_by_blocks(model, pruning, pixels())
    blocks, prefix = [p.block for p in pruning.encoder.tower.blocks], pruning.encoder.tower.prefix
    old = think(blocks[0], attend(blocks[0], x))
    for b in range(len(x)):
        moved = (old[b] - x[b]).norm(dim=-1)[prefix:]
        kept = sorted([*range(prefix), *(moved.argsort(descending=True)[: round(0.4 * 64)] + prefix).tolist()])
        others = [i for i in range(x.shape[1]) if i not in kept]

        def restore(now: Tensor, b: int = b, kept: Any = kept, others: Any = others) -> Tensor:
            full = old[b].clone()
            for i in others:
                near = (old[b][kept] - old[b][i]).norm(dim=-1).argsort(stable=True)[:3]
                full[i] += (now - old[b][kept])[near].mean(0)
            full[kept] = now
            return full

        now = old[b][kept]
        for i, block in enumerate(blocks[1:]):
            now = attend(block, restore(now)[None])[0][kept] if i < steady else attend(block, now[None])[0]
            now = think(block, now[None])[0]
        close(got[b], restore(now), atol=2e-5, rtol=1e-5)
    assert pruning.trace.survivor.all()
    assert pruning.trace.counts[-1] == len(kept)


@torch.no_grad()
def test_published_ipcv_seeks_neighbours_in_the_whole_call() -> None:
    """Written out: counts rounded down, kept tokens (with [CLS]) of both pictures as neighbours, moves of either."""
    model = TOWERS["internvl"]()
    method = IPCV(keep=0.39, first=1, steady=1, neighbours=3, compat="published")
    with apply_encoder(model, method) as pruning:
        x, got = seen_by_blocks(model, pruning, pixels())
        _, alone = seen_by_blocks(model, pruning, pixels()[:1])
    with apply_encoder(model, IPCV(keep=24 / 64, first=1, steady=1, neighbours=3)) as corrected:
        _, same = seen_by_blocks(model, corrected, pixels()[:1])
    close(alone, same, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(got[:1], alone, atol=1e-4)
    blocks = [p.block for p in pruning.tower.blocks]
    before = think(blocks[0], attend(blocks[0], x))
    old = think(blocks[1], attend(blocks[1], before))
    count = int(0.39 * 64)
    best = (old - before).norm(dim=-1)[:, 1:].argsort(-1, descending=True)[:, :count] + 1
    kept = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), best.sort(-1).values], 1)
    then = torch.stack([row[k] for row, k in zip(old, kept, strict=True)])

    def restore(now: Tensor) -> Tensor:
        full, move = old.clone(), (now - then).flatten(0, 1)
        for b in range(len(x)):
            for i in sorted(set(range(x.shape[1])) - set(kept[b].tolist())):
                near = (then.flatten(0, 1) - old[b, i]).norm(dim=-1).argsort(stable=True)[:3]
                full[b, i] += move[near].mean(0)
            full[b, kept[b]] = now[b]
        return full

    now = then
    for i, block in enumerate(blocks[2:]):
        now = attend(block, restore(now)) if i < 1 else attend(block, now)
        now = torch.stack([row[k] for row, k in zip(now, kept, strict=True)]) if i < 1 else now
        now = think(block, now)
    close(got, restore(now), atol=2e-5, rtol=1e-5)


def test_neighbours_are_the_nearest_kept_ones() -> None:
    x = torch.tensor([[[0.0], [10.0], [1.0], [11.0], [20.0]]])
    gone, nearest = neighbours(x, torch.tensor([[0, 1, 4]]), 2)
    assert gone.tolist() == [[2, 3]]
    assert nearest.tolist() == [[[0, 1], [1, 2]]]
    assert neighbours(x, torch.tensor([[0, 1, 4]]), 9)[1].shape == (1, 2, 3)
    two = torch.tensor([[[0.0], [10.0], [1.0]], [[9.0], [2.0], [30.0]]])
    assert neighbours(two, torch.tensor([[0, 1], [0, 1]]), 2, across=True)[1].tolist() == [[[0, 3]], [[1, 2]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_ipcv_computes_in_float32_at_least(dtype: torch.dtype) -> None:
    """Of the numbers as they are; a channel that is large in all tokens hides none of the others."""
    generator = torch.Generator().manual_seed(0)
    x, before, now = torch.randn(3, 1, 60, 8, generator=generator, dtype=torch.float64).to(dtype)
    x[..., 0] += 1000
    kept = torch.arange(0, 60, 2)[None]
    exact = 1e-12 if dtype == torch.float64 else 1e-4
    close(movement(x, before).double(), (x.double() - before.double()).norm(dim=-1), atol=0, rtol=exact)
    gone, nearest = neighbours(x, kept, 5)
    distance = (x.double()[:, gone[0], None] - x.double()[:, None, kept[0]]).norm(dim=-1)
    assert torch.equal(nearest, distance.argsort(-1)[..., :5])
    old, then, moved = x[:, gone[0]], x[:, kept[0]], now[:, kept[0]]
    got = rebuilt(old, then, moved, nearest)
    expected = old.double() + (moved.double() - then.double())[0, nearest[0]].mean(1)
    assert got.dtype == dtype
    close(got, expected.to(dtype), atol=exact, rtol=exact if dtype == torch.float64 else 2**-7)


@torch.no_grad()
def test_ipcv_seeks_neighbours_once_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(x: Tensor, kept: Tensor, count: int, across: bool) -> tuple[Tensor, Tensor]:
        calls.append(count)
        return neighbours(x, kept, count, across)

    monkeypatch.setattr(ipcv, "neighbours", counted)
    model = timm_vit()
    with apply_encoder(model, IPCV(first=0, steady=2)):
        model(pixels())
    assert calls == [10]


@dataclass
class Scored(BlockView):
    """A block whose [CLS] pays `scores`, (B, n), to the patches."""

    scores: Tensor | None = None

    def cls_attention(self) -> Tensor:
        assert self.scores is not None
        return self.scores[:, None]


def scored(scores: list[float], dtype: torch.dtype = torch.float32) -> Scored:
    n = len(scores)
    x = torch.randn(1, n + 1, 4, generator=torch.Generator().manual_seed(n)).to(dtype)
    view = Scored(x=x, index=0, depth=4, prefix=1, start=n, qkv=lambda: (x, x, x), scale=1.0)
    view.scores, view.entering = torch.tensor([scores]), torch.zeros_like(x)
    return view


@pytest.mark.parametrize("method", [IPCV, ToC3D])
def test_halves_are_rounded_up_and_one_patch_stays_at_least(method: Any) -> None:
    rest = method is ToC3D  # one row more, for those that leave; where it gains nothing, all stay
    for keep, n, count in ((0.5, 5, 3), (0.1, 4, 1), (0.75, 4, 3), (0.9, 4, None)):
        reduction = method(keep=keep).reduce(scored([1 / n] * n))
        if count is None or (rest and count == n - 1):
            assert reduction is None
        else:
            assert reduction.rep.shape == (1, 1 + count + rest)


@pytest.mark.parametrize("scores", [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]])
def test_toc3d_parts_patches_of_equal_score(scores: list[float]) -> None:
    block = scored(scores)
    reduction = ToC3D(keep=0.5).reduce(block)
    assert reduction is not None
    assert reduction.rep.tolist() == [[0, 1, 2, 3]]  # the representative at the first of the others
    assert reduction.assign.tolist() == [[0, 1, 2, 3, 3]]
    assert reduction.size.flatten().tolist() == [1, 1, 1, 2]
    close(reduction.x[0, 3], block.x[0, 3:].mean(0) if scores[3] else torch.zeros(4))


def test_toc3d_joins_in_float32_and_sits_at_the_best_of_the_others() -> None:
    block = scored([0.3, 0.1, 0.001, 0.2, 0.399], torch.bfloat16)
    reduction = ToC3D(keep=0.4).reduce(block)
    assert reduction is not None
    assert reduction.rep.tolist() == [[0, 1, 5, 4]]
    assert reduction.x.dtype == torch.bfloat16
    weight = torch.tensor([0.1, 0.001, 0.2])
    assert torch.equal(reduction.x[0, 3], (weight / weight.sum() @ block.x[0, 2:5].float()).bfloat16())


@pytest.mark.parametrize("name", ["timm", "timm registers", "clip", "open_clip"])
@torch.no_grad()
def test_toc3d_equals_a_written_out_forward(name: str) -> None:
    model = TOWERS[name]()
    with apply_encoder(model, ToC3D(keep=0.3, first=1)) as pruning:
        x, got = seen_by_blocks(model, pruning, pixels())
    blocks, prefix = [p.block for p in pruning.encoder.tower.blocks], pruning.encoder.tower.prefix
    x = think(blocks[0], attend(blocks[0], x))
    entry, qkv, *_ = parts(blocks[1])
    q, k, _ = qkv(entry(x))
    score = (q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0, prefix:]
    x = think(blocks[1], attend(blocks[1], x))
    for b in range(len(x)):
        kept = sorted((score[b].argsort(descending=True)[: round(0.3 * 64)] + prefix).tolist())
        others = [i for i in range(prefix, x.shape[1]) if i not in kept]
        weight = score[b][torch.tensor(others) - prefix]
        joined = (weight[:, None] * x[b][others]).sum(0) / weight.sum()
        now = torch.cat([x[b][:prefix], x[b][kept], joined[None]])
        for block in blocks[2:]:
            now = think(block, attend(block, now[None]))[0]
        full = x[b].clone()
        full[others] += now[-1] - joined
        full[[*range(prefix), *kept]] = now[:-1]
        close(got[b], full, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [IPCV(keep=0.5, first=0, steady=1), ToC3D(keep=0.5, first=0)])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "gemma3", *PACKED])
@torch.no_grad()
def test_vlm_towers_give_all_tokens_and_do_not_mix_images(family: str, method: Any) -> None:
    tiny = build(family)
    both = two_images(tiny)
    one = tiny.inputs([["a ", ("image", picture(60, 40)), "?"]])
    plain = rows(encode(tiny, both).pooler_output)
    with apply_encoder(tiny.model, method) as pruning:
        got = rows(encode(tiny, both).pooler_output)
        alone = rows(encode(tiny, one).pooler_output)
    assert got.shape == plain.shape
    assert not torch.allclose(got, plain, atol=1e-4)
    assert torch.unique((got * 1e4).round(), dim=0).shape[0] > 0.9 * torch.unique((plain * 1e4).round(), dim=0).shape[0]
    close(got[: len(alone)], alone, atol=2e-5, rtol=1e-4)
    assert pruning.trace.survivor.all()
    assert torch.equal(rows(encode(tiny, both).pooler_output), plain)


@torch.no_grad()
def test_ipcv_in_a_packed_tower_equals_a_written_out_forward() -> None:
    """Units of four tokens leave behind the first block; the rest attends within its image; DeepStack sees rebuilt
    rows."""
    tiny = build("qwen3_vl")
    inputs = two_images(tiny)
    tower = tiny.model.base_model.visual
    calls: list[dict[str, Any]] = []
    watch = [
        b.register_forward_pre_hook(
            lambda m, a, kw: calls.append({**kw, "x": a[0] if a else kw["hidden_states"]}), with_kwargs=True
        )
        for b in tower.blocks
    ]
    encode(tiny, inputs)
    assert [h.remove() for h in watch]
    sizes = [int(h * w) for _, h, w in inputs["image_grid_thw"].tolist()]
    cos, sin = calls[0]["position_embeddings"]
    old = tower.blocks[0](**{("hidden_states" if k == "x" else k): v for k, v in calls[0].items()})
    ends = []
    start = 0
    planes: dict[int, list[Tensor]] = {}
    for n in sizes:
        span = slice(start, start + n)
        start += n
        before, then = (t[span].view(n // 4, -1) for t in (calls[0]["x"], old))
        kept = sorted((then - before).norm(dim=-1).argsort(descending=True)[: (n // 4 + 1) // 2].tolist())
        others = [i for i in range(n // 4) if i not in kept]
        tokens = torch.tensor([4 * u + i for u in kept for i in range(4)])

        def restore(now: Tensor, then: Tensor = then, kept: Any = kept, others: Any = others) -> Tensor:
            full = then.clone()
            now = now.view(len(kept), -1)
            for i in others:
                near = (then[kept] - then[i]).norm(dim=-1).argsort(stable=True)[:4]
                full[i] += (now - then[kept])[near].mean(0)
            full[kept] = now
            return full.view(-1, old.shape[1])

        x = old[span][tokens]
        turn = cos[span][tokens], sin[span][tokens]
        for index, block in enumerate(tower.blocks):
            if index > 0:
                a = block.attn
                q, k, v = a.qkv(block.norm1(x)).unflatten(1, (3, a.num_heads, -1)).unbind(1)

                def rotated(t: Tensor, turn: Any = turn) -> Tensor:
                    low, high = t.chunk(2, -1)
                    return t * turn[0][:, None] + torch.cat([-high, low], -1) * turn[1][:, None]

                weight = (torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) * a.scaling).softmax(-1)
                x = x + a.proj(torch.einsum("hqk,khd->qhd", weight, v).flatten(1))
                x = x + block.mlp(block.norm2(x))
            if index in tower.deepstack_visual_indexes:
                planes.setdefault(index, []).append(old[span] if index == 0 else restore(x))
        ends.append(restore(x))
    with apply_encoder(tiny.model, IPCV(keep=0.5, first=0, steady=0, neighbours=4)):
        got = encode(tiny, inputs)
    close(rows(got.pooler_output), tower.merger(torch.cat(ends)), atol=2e-5, rtol=1e-4)
    for plane, index, module in zip(
        got.deepstack_features, tower.deepstack_visual_indexes, tower.deepstack_merger_list, strict=True
    ):
        expected = module(torch.cat(planes[index]))
        close(rows(plane) if isinstance(plane, (list, tuple)) else plane, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_ipcv_as_published_drops_single_patches_out_of_all_pictures(family: str) -> None:
    """Behind block 0; block 1 attends with all patches, rebuilt, and thinks with the kept ones."""
    tiny = build(family)
    inputs = two_images(tiny)
    tower = tiny.model.base_model.visual
    calls: list[dict[str, Any]] = []
    watch = [
        b.register_forward_pre_hook(
            lambda m, a, kw: calls.append({**kw, "x": a[0] if a else kw["hidden_states"]}), with_kwargs=True
        )
        for b in tower.blocks
    ]
    ends: list[Tensor] = []
    watch.append(tower.blocks[-1].register_forward_hook(lambda m, a, out: ends.append(out)))
    encode(tiny, inputs)
    assert [h.remove() for h in watch]
    before, then = calls[0]["x"], calls[1]["x"]
    n = len(before)
    kept = sorted((then - before).norm(dim=-1).argsort(descending=True)[: int(0.35 * n)].tolist())
    others = [i for i in range(n) if i not in kept]
    assert any(any((4 * u + i in kept) != (4 * u in kept) for i in range(4)) for u in range(n // 4))

    def restore(now: Tensor) -> Tensor:
        full = then.clone()
        for i in others:
            near = (then[kept] - then[i]).norm(dim=-1).argsort(stable=True)[:10]
            full[i] += (now - then[kept])[near].mean(0)
        full[kept] = now
        return full

    x = then[kept]
    for index, block in enumerate(tower.blocks):
        if index == 0:
            continue
        given = calls[index]
        rows = list(range(n)) if index == 1 else kept
        full = restore(x) if index == 1 else x
        cos, sin = (t[rows] for t in given["position_embeddings"])
        borders = given["cu_seqlens"].tolist()
        segment = torch.tensor([sum(i >= e for e in borders) for i in rows])
        a = block.attn
        q, k, v = a.qkv(block.norm1(full)).unflatten(1, (3, a.num_heads, -1)).unbind(1)

        def rotated(t: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            low, high = t.chunk(2, -1)
            return t * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]

        logits = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) * a.scaling
        weight = logits.masked_fill(segment[:, None] != segment, -torch.inf).softmax(-1)
        full = full + a.proj(torch.einsum("hqk,khd->qhd", weight, v).flatten(1))
        x = full[kept] if index == 1 else full
        x = x + block.mlp(block.norm2(x))
    ends.clear()
    watch = [tower.blocks[-1].register_forward_hook(lambda m, a, out: ends.append(out))]
    with apply_encoder(tiny.model, IPCV(first=0, steady=1, compat="published")) as pruning:
        encode(tiny, inputs)
        assert pruning.report().counts[-1] == -(-len(kept) // 4)
    watch[0].remove()
    close(ends[-1], restore(x), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl"])
@torch.no_grad()
def test_a_connector_method_follows_single_patches(family: str) -> None:
    tiny = build(family)
    method = IPCV(keep=0.5, first=0, steady=1, compat="published")
    with apply(tiny.model, [method, "divprune"], ratio=0.5) as pruning:
        tiny.model(**two_images(tiny))
        streams = pruning.report().streams
    assert all(s.kept == (s.total + 1) // 2 > 0 for s in streams)
    assert len(streams) == 2


def test_the_published_count_is_that_of_a_reduction() -> None:
    """1 - 0.9 is less than 0.1, so that one tenth of ten is none; one is kept."""
    counts = {}
    for keep, n in ((0.35, 340), (0.35, 341), (0.1, 20), (0.1, 10), (0.222, 500)):
        block = SimpleNamespace(x=torch.rand(1, n, 4), entering=torch.zeros(1, n, 4), patches=n, prefix=0, cut=None)
        block.sizes = lambda n=n: torch.ones(1, n, 1)
        reduction = IPCV(keep=keep, compat="published").reduce(block)  # type: ignore[arg-type]
        counts[keep, n] = reduction.rep.shape[1]  # type: ignore[union-attr]
    assert counts == {
        (k, n): max(1, int(n * (1 - r))) for (k, n), r in zip(counts, (0.65, 0.65, 0.9, 0.9, 0.778), strict=True)
    }
    assert counts[0.35, 340] == 118
    assert counts[0.1, 20] == counts[0.1, 10] == 1


@pytest.mark.parametrize("method", ["ipcv", "toc3d"])
@torch.no_grad()
def test_everything_kept_is_bit_identical(method: str) -> None:
    model, x = TOWERS["clip"](), pixels()
    plain = output(model, x)
    with apply_encoder(model, method, keep=1.0):
        assert all(torch.equal(a, b) for a, b in zip(output(model, x), plain, strict=True))


@pytest.mark.parametrize(
    "method", [IPCV(keep=0.97, first=0, steady=1), IPCV(keep=0.97, first=0, steady=0), ToC3D(keep=0.95, first=0)]
)
@pytest.mark.parametrize("family", PACKED)
@torch.no_grad()
def test_a_picture_of_a_packed_call_may_keep_all_of_its_units(family: str, method: Any) -> None:
    """15 or 16 of 16 units are all; of 40 units some leave."""
    tiny = build(family)
    large, small = ("image", picture(60, 40)), ("image", picture(28, 28))
    both, alone = tiny.inputs([["a ", large, " b ", small, "?"]]), tiny.inputs([["a ", large, "?"]])
    plain = rows(encode(tiny, both).pooler_output)
    with apply_encoder(tiny.model, method):
        got, first = (rows(encode(tiny, inputs).pooler_output) for inputs in (both, alone))
    close(got[40:], plain[40:], atol=2e-5, rtol=1e-4)
    close(got[:40], first, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(first, plain[:40], atol=1e-3)
    with apply_encoder(tiny.model, replace(method, keep=1.0)):
        assert torch.equal(rows(encode(tiny, both).pooler_output), plain)


@pytest.mark.parametrize("method", ["ipcv", "toc3d"])
def test_what_makes_no_sense_is_refused(method: str) -> None:
    model = timm_vit()
    with pytest.raises(OptionError, match=r"keep=0\.5"):
        apply_encoder(model, method, ratio=0.5)
    with pytest.raises(OptionError, match="expand=False has no meaning"):
        apply_encoder(model, method, expand=False)
    apply_encoder(model.train(), method)
    model.set_grad_checkpointing(True)
    with pytest.raises(UnsupportedModelError, match="checkpointing"):
        model(pixels()).sum().backward()


@pytest.mark.parametrize("method", [IPCV(keep=0.3, first=0, steady=1), ToC3D(keep=0.3, first=0)])
def test_gradients_flow_through_the_detour(method: Any) -> None:
    """A token that skipped the last block's MLP moved as others did, and so does its gradient."""
    model = timm_vit()
    apply_encoder(model, method)
    last: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda m, a, out: last.append(out))
    model(pixels())
    weight = model.blocks[-1].mlp.fc2.weight
    every = [
        torch.autograd.grad(last[0][0, n].sum(), weight, retain_graph=True)[0].abs().sum() for n in range(0, 65, 4)
    ]
    assert all(g > 0 and g.isfinite() for g in every)
