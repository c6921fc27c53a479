"""EVA towers of timm: rotary positions that follow their tokens, against a forward written out."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.encoder.all_towers import hooks, output, pixels, settle
from tests.published.bipartite import unmerge
from tokprune.errors import UnsupportedModelError
from tokprune.ops.merge import bipartite_matching, merge_weighted
from tokprune.runtime.encoder import apply_encoder

close = torch.testing.assert_close
KINDS: dict[str, dict[str, Any]] = {
    "eva02": {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True},
    "eva": {"qkv_fused": True, "init_values": 0.1, "global_pool": "token"},
    "rotary, token": {"use_rot_pos_emb": True, "qk_norm": True, "global_pool": "token", "num_reg_tokens": 2},
    "rotary halves": {"use_rot_pos_emb": True, "rope_rotate_half": True, "use_abs_pos_emb": False},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def eva(kind: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    if missing := set(KINDS[kind]) - set(inspect.signature(timm.models.eva.Eva.__init__).parameters):
        pytest.skip(f"EVA of this timm has no {', '.join(missing)}")
    base = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
    return settle(timm.models.eva.Eva(**base, **KINDS[kind]))


@kinds
@torch.no_grad()
def test_nothing_merged_is_bit_identical_and_removal_leaves_no_trace(kind: str) -> None:
    model, x = eva(kind), pixels()
    plain, before = output(model, x), hooks(model)
    with apply_encoder(model, "tome", r=0):
        assert torch.equal(output(model, x)[0], plain[0])
    with apply_encoder(model, "tome", r=6):
        assert not torch.allclose(output(model, x)[0], plain[0])
    assert torch.equal(output(model, x)[0], plain[0])
    assert hooks(model) == before


def turned(x: Tensor, table: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotary embedding. x: (B, H, N, hd), table: (B, N - prefix, 2 hd) sines, then cosines."""
    sin, cos = table[:, None].chunk(2, -1)
    body = x[:, :, prefix:]
    if half:
        low, high = body.chunk(2, -1)
        other = torch.cat([-high, low], -1)
    else:
        other = torch.stack([-body[..., 1::2], body[..., ::2]], -1).flatten(-2)
    return torch.cat([x[:, :, :prefix], body * cos + other * sin], 2)


@kinds
@torch.no_grad()
def test_merging_equals_a_written_out_forward(kind: str) -> None:
    model, seen = eva(kind), {}
    with apply_encoder(model, "tome", r=7) as pruning:
        prefix = pruning.encoder.tower.prefix
        first = model.blocks[0].register_forward_pre_hook(
            lambda m, a, kw: seen.update(x=a[0], rope=kw.get("rope")), with_kwargs=True
        )
        last = model.blocks[-1].register_forward_hook(lambda m, a, out: seen.update(y=out))
        output(model, pixels())
        first.remove(), last.remove()
    x, rope = seen["x"], seen["rope"]
    assert (rope is not None) == ("rot" in str(KINDS[kind]))
    place = torch.arange(x.shape[1] - prefix).expand(len(x), -1)
    size, whole = None, lambda t: t
    for block in model.blocks:
        a, h = block.attn, block.norm1(x)
        if a.qkv is None:
            q, k, v = a.q_proj(h), a.k_proj(h), a.v_proj(h)
        else:
            q, k, v = nn.functional.linear(h, a.qkv.weight, torch.cat([a.q_bias, a.k_bias, a.v_bias])).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = a.q_norm(q), a.k_norm(k)
        keys = k.mean(1)
        if rope is not None:
            half = KINDS[kind].get("rope_rotate_half", False)
            q, k = (turned(t, rope[place], prefix, half) for t in (q, k))
        logits = q @ k.transpose(-1, -2) * a.scale
        if size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        out = a.proj(a.norm((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        x = x + (out if block.gamma_1 is None else block.gamma_1 * out)
        matching = bipartite_matching(keys, 7, prefix)
        x, size = merge_weighted(matching, x, size)
        place = place.gather(1, matching.rep[:, prefix:] - prefix)
        whole = (lambda inner, m: lambda t: inner(unmerge(m, t)))(whole, matching)
        branch = block.mlp(block.norm2(x))
        x = x + (branch if block.gamma_2 is None else block.gamma_2 * branch)
    close(seen["y"], whole(x), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["pitome", "tofu", "evit", "zerotprune", "ipcv", "toc3d"])
@torch.no_grad()
def test_other_methods_run(method: str) -> None:
    options = {"r": 6} if method == "tofu" else {}
    for kind in ("eva02", "rotary, token"):
        model, x = eva(kind), pixels()
        with apply_encoder(model, method, **options) as pruning:
            both, alone = output(model, x)[0], output(model, x[1:])[0]
            assert pruning.trace.counts[-1] < 64
        close(both[1:], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_of_a_rotary_block_is_the_models_own() -> None:
    """EViT behind a merge-free start ranks by the turned queries and keys that the block itself uses."""
    model, x = eva("rotary, token"), pixels()
    seen: dict[str, Tensor] = {}
    watch = [
        model.blocks[1].register_forward_pre_hook(
            lambda m, a, kw: seen.update(x=a[0], rope=kw["rope"]), with_kwargs=True
        )
    ]
    with apply_encoder(model, "evit", blocks=(1,), keep=0.25, fuse=False) as pruning:
        output(model, x)
    assert [h.remove() for h in watch]
    block, a = model.blocks[1], model.blocks[1].attn
    q, k, _ = nn.functional.linear(
        block.norm1(seen["x"]), a.qkv.weight, torch.cat([a.q_bias, a.k_bias, a.v_bias])
    ).chunk(3, -1)
    q, k = (n(t.unflatten(-1, (3, -1)).transpose(1, 2)) for n, t in ((a.q_norm, q), (a.k_norm, k)))
    table = seen["rope"].expand(2, -1, -1)
    q, k = (turned(t, table, 3, False) for t in (q, k))
    row = (q[:, :, :1] @ k.transpose(-1, -2) * a.scale).softmax(-1).mean(1)[:, 0, 3:]
    for b in range(2):
        assert row[b].topk(16).indices.sort().values.tolist() == pruning.trace.survivor[b].nonzero()[:, 0].tolist()


@torch.no_grad()
def test_feature_maps_keep_their_grid() -> None:
    model, x = eva("eva02"), pixels()
    with apply_encoder(model, "tome", r=7):
        maps = model.forward_intermediates(x, [1, 3], intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 8, 8)] * 2


def test_what_cannot_follow_is_refused() -> None:
    timm = pytest.importorskip("timm")
    base = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    with pytest.raises(UnsupportedModelError, match="mixed"):
        apply_encoder(timm.models.eva.Eva(**base, use_rot_pos_emb=True, rope_type="mixed"), "tome", r=1)
    dropping = timm.models.eva.Eva(**base, use_rot_pos_emb=True, patch_drop_rate=0.5).train()
    apply_encoder(dropping, "tome", r=1)
    with pytest.raises(UnsupportedModelError, match="patch dropout"):
        dropping(torch.randn(2, 3, 32, 32))
