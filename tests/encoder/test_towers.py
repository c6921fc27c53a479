"""The splice on every kind of tower: nothing merged changes nothing, removal leaves no trace, merging equals a
written-out forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.encoder.all_towers import TOWERS, close, equal, hooks, output, pixels, timm_vit, towers, written_out
from tests.methods.stages import predictors
from tokprune.errors import UnsupportedModelError
from tokprune.methods.encoder.tome import ToMe
from tokprune.registry import get_method, list_methods
from tokprune.runtime.encoder import apply_encoder


@towers
@torch.no_grad()
def test_nothing_merged_is_bit_identical_and_removal_leaves_no_trace(name: str) -> None:
    model = TOWERS[name]()
    x = pixels()
    plain, before = output(model, x), (hooks(model), set(vars(model)))
    pruning = apply_encoder(model, "tome", r=0)
    assert equal(output(model, x), plain)
    pruning.remove()
    with apply_encoder(model, "tome", r=6):
        reduced = output(model, x)
        assert not equal(reduced, plain)
        assert [t.shape for t in reduced] == [t.shape for t in plain]  # full length outside
    assert (hooks(model), set(vars(model))) == before
    assert equal(output(model, x), plain)


@towers
@torch.no_grad()
def test_merging_equals_a_written_out_forward(name: str) -> None:
    model = TOWERS[name]()
    x, seen = pixels(), {}
    pruning = apply_encoder(model, "tome", r=7)
    tower = pruning.encoder.tower
    first = tower.blocks[0].block
    watch = first.register_forward_pre_hook(lambda m, args, kw: seen.update(x=args[0]), with_kwargs=True)
    last = tower.blocks[-1].block.register_forward_hook(lambda m, a, out: seen.update(y=out))
    output(model, x)
    watch.remove(), last.remove()
    pruning.remove()
    prefix = {"timm registers": 5, "timm distilled": 2}.get(name, 0 if "average" in name and "timm" in name else 1)
    prefix = 0 if name in ("siglip", "timm map") else prefix
    assert tower.prefix == prefix
    expected = written_out(model, seen["x"], 7, prefix, [p.block for p in tower.blocks])
    close(seen["y"], expected[-1], atol=1e-5, rtol=1e-5)
    n = seen["x"].shape[1]
    assert pruning.trace.counts == tuple(n - 7 * (i + 1) for i in range(4))


@pytest.mark.parametrize("name", ["clip", "siglip", "internvl"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_hidden_states_have_full_length_and_the_right_values(name: str, attention: str) -> None:
    model = TOWERS[name]()
    model.set_attn_implementation(attention)
    model(pixels(), output_hidden_states=True)  # transformers installs its capturing hooks now
    seen: dict[str, Tensor] = {}
    pruning = apply_encoder(model, "tome", r=7)
    blocks = [p.block for p in pruning.encoder.tower.blocks]
    watch = blocks[0].register_forward_pre_hook(lambda m, args, kw: seen.update(x=args[0]), with_kwargs=True)
    hidden = model(pixels(), output_hidden_states=True).hidden_states
    watch.remove(), pruning.remove()
    expected = written_out(model, seen["x"], 7, pruning.encoder.tower.prefix, blocks)
    for got, want in zip(hidden[1:-1], expected, strict=False):
        close(got, want, atol=2e-5, rtol=1e-5)
    assert {h.shape[1] for h in hidden} == {seen["x"].shape[1]}


@torch.no_grad()
def test_what_enters_a_block_can_be_widened_from_outside() -> None:
    model, seen = TOWERS["clip"](), {}
    with apply_encoder(model, "tome", r=7) as pruning:
        block = pruning.encoder.tower.blocks[2].block
        watch = block.self_attn.k_proj.register_forward_hook(lambda m, a, out: seen.update(k=out))
        before = block.layer_norm1.register_forward_hook(lambda m, a, out: seen.update(x=out))
        hidden = model(pixels(), output_hidden_states=True).hidden_states
        watch.remove(), before.remove()
        assert seen["k"].shape[1] == 65 - 14
        close(pruning.encoder.widen(2, seen["x"]), block.layer_norm1(hidden[2]), atol=1e-5, rtol=1e-5)
        assert pruning.encoder.widen(2, seen["k"]).shape == hidden[2].shape


@pytest.mark.parametrize("name", ["timm registers", "timm average"])
@pytest.mark.parametrize("layout", ["NCHW", "NLC"])
@torch.no_grad()
def test_feature_maps_of_timm_have_full_length(name: str, layout: str) -> None:
    model, x = TOWERS[name](), pixels()
    plain = model.forward_intermediates(
        x, [1, -1], return_prefix_tokens=True, norm=True, output_fmt=layout, output_dict=True
    )
    with apply_encoder(model, "tome", r=0):
        same = model.forward_intermediates(
            x, [1, -1], return_prefix_tokens=True, norm=True, output_fmt=layout, output_dict=True
        )
    for key, value in plain.items():
        assert all(torch.equal(a, b) for a, b in zip(value, same[key], strict=True))
    with apply_encoder(model, "tome", r=7) as pruning:
        final, maps = model.forward_intermediates(x, [1, -1], output_fmt=layout)
        alone = model.forward_intermediates(x, 2, output_fmt=layout, intermediates_only=True)
        assign = pruning.trace.assign
    assert final.shape[1] == 64 + pruning.encoder.tower.prefix
    assert [m.shape for m in maps] == [m.shape for m in plain["image_intermediates"]]
    assert torch.equal(alone[-1], maps[-1])
    last = maps[-1].flatten(2).transpose(1, 2) if layout == "NCHW" else maps[-1]
    for group in assign[0].unique().tolist():
        members = last[0, assign[0] == group]
        assert torch.equal(members, members[:1].expand_as(members))
    assert "forward_intermediates" not in vars(model)


@torch.no_grad()
def test_merge_maps_of_pictures_that_are_not_square() -> None:
    model = timm_vit(dynamic_img_size=True)
    x = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    with apply_encoder(model, "tome", r=7) as pruning:
        model(x)
        assert pruning.trace.merge_map(1).shape == (6, 10)
        model(pixels())
        assert pruning.trace.merge_map(1).shape == (8, 8)


@torch.no_grad()
def test_expand_false_gives_the_merged_tokens() -> None:
    model = TOWERS["clip"]()
    with apply_encoder(model, "tome", r=7, expand=False) as pruning:
        out = model(pixels())
    assert out.last_hidden_state.shape[1] == 65 - 28
    assert pruning.trace.assign.shape == (2, 64)
    assert torch.equal(pruning.trace.survivor.sum(1), torch.full((2,), 64 - 28))
    assert torch.equal(pruning.trace.size.sum(1), torch.full((2,), 64.0))


@torch.no_grad()
def test_ratio_and_budget_are_exact() -> None:
    for method in ("tome", "tofu", "pitome", "evit", "zerotprune"):
        for limit in ({"ratio": 0.35}, {"budget": 17}):
            model = TOWERS["timm"]()
            with apply_encoder(model, method, **limit) as pruning:
                model(pixels())
            left = pruning.trace.survivor.sum(1)
            assert left.tolist() == [22, 22] if "ratio" in limit else [17, 17], method


@pytest.mark.parametrize("budget", [1, 2])
@torch.no_grad()
def test_evit_leaves_one_or_two_patches_where_asked(budget: int) -> None:
    model = TOWERS["timm"]()
    with apply_encoder(model, "evit", budget=budget) as pruning:
        model(pixels())
    assert pruning.trace.survivor.sum(1).tolist() == [budget, budget]


NEEDED: dict[str, dict[str, Any]] = {
    "apt": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
    "dynamicvit": {"weights": predictors()},
}
"""Options without which a method cannot be made."""
NO_RATIO = ("dtop", "ipcv", "toc3d")
"""They give all patches back."""


@pytest.mark.parametrize("limit", [{"ratio": 1.0}, {"budget": 64}])
@pytest.mark.parametrize("name", [n for n in list_methods("encoder") if n not in NO_RATIO])
@torch.no_grad()
def test_all_patches_change_no_bit(name: str, limit: dict[str, Any]) -> None:
    model, x = TOWERS["clip"](), pixels()
    before = output(model, x)
    with apply_encoder(model, get_method(name, **NEEDED.get(name, {})), **limit) as pruning:
        assert all(torch.equal(a, b) for a, b in zip(output(model, x), before, strict=True))
    assert pruning.trace.survivor.sum(1).tolist() == [64, 64]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"r": (8, 0, 4)}, (57, 57, 53, 53)),
        ({"r": [20, 20, 20, 20, 99]}, (45, 25, 13, 7)),
        ({"r": 8, "inflection": -1.0}, (49, 38, 33, 33)),
        ({"r": 8, "inflection": -1.0, "compat": "published"}, (49, 39, 34, 34)),
        ({"matching": "kth", "k": 2}, (33, 17, 9, 5)),
        ({"matching": "random", "r": 7}, (58, 51, 44, 37)),
    ],
)
@pytest.mark.parametrize("name", ["timm", "siglip", "open_clip"])
@torch.no_grad()
def test_tomes_schedules_and_rivals(name: str, options: Any, left: tuple[int, ...]) -> None:
    """Lists are filled up with zeros, a block merges half of its patches at most, pairs do not depend on the batch."""
    model, x = TOWERS[name](), pixels()
    with apply_encoder(model, "tome", **options) as pruning:
        both = output(model, x)
        prefix = pruning.encoder.tower.prefix
        assert pruning.trace.counts == tuple(n - 1 + prefix for n in left)
        alone = output(model, x[1:])
    close(both[-1][1:], alone[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["tome", "pitome", "tofu", "evit", "ats", "zerotprune"])
@pytest.mark.parametrize("name", ["timm", "siglip", "internvl", "open_clip"])
@torch.no_grad()
def test_every_method_runs_on_every_kind_of_tower(method: str, name: str) -> None:
    if method == "ats" and name in ("siglip", "internvl"):
        with pytest.raises(UnsupportedModelError, match="pools over all patches"):
            apply_encoder(TOWERS[name](), method)
        return
    model, x = TOWERS[name](), pixels()
    plain = output(model, x)
    options = {"r": 6} if method in ("tome", "tofu") else {}
    with apply_encoder(model, method, **options) as pruning:
        both = output(model, x)
        counts = pruning.trace.counts
        alone = output(model, x[1:])
    assert counts[-1] < 64
    assert all(t.isfinite().all() for t in both)
    if len(plain) == 1:  # a pooled output does not depend on the neighbours in the batch
        close(both[0][1:], alone[0], atol=1e-5, rtol=1e-5)


def gradients(model: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    model.zero_grad()
    losses = [output(model, x)[-1].square().mean() for x in xs]
    sum(losses).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["timm", "clip", "open_clip"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = TOWERS[name]().train()
    xs = [pixels(2, 1), pixels(2, 2)]  # two forwards before one backward
    apply_encoder(model, "tome", r=7)
    plain = gradients(model, xs)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.set_grad_checkpointing(True)
    again = gradients(model, xs)
    assert len(plain) == len(again)
    for a, b in zip(plain, again, strict=True):
        close(a, b, atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused() -> None:
    """It would leave out gradients of the tower without a word."""
    model = TOWERS["clip"]().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    apply_encoder(model, "tome", r=7)
    with pytest.raises(UnsupportedModelError, match="use_reentrant"):
        output(model, pixels())[-1].square().mean().backward()
    model = TOWERS["timm"]().train()
    apply_encoder(model, "tome", r=7)
    x = pixels().requires_grad_()
    with pytest.raises(UnsupportedModelError, match="use_reentrant"):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).sum().backward()


@torch.no_grad()
def test_a_copy_of_a_reduced_model_has_its_own_state() -> None:
    model = TOWERS["timm"]()
    apply_encoder(model, "tome", r=7)
    other = copy.deepcopy(model)
    expected = model(pixels())
    close(other(pixels(4, 3))[:1] * 0 + expected[:1], expected[:1])
    close(other(pixels()), expected)
    assert vars(other)["_tokprune"] is not vars(model)["_tokprune"]
    assert vars(other)["_tokprune"].encoder.trace is not vars(model)["_tokprune"].encoder.trace


@torch.no_grad()
def test_applying_again_replaces() -> None:
    model = TOWERS["timm"]()
    first = apply_encoder(model, ToMe(r=3))
    second = apply_encoder(model, ToMe(r=5))
    model(pixels())
    assert not first.active
    assert second.trace.counts[-1] == 65 - 20
    assert first.trace is None


@torch.no_grad()
def test_half_precision_runs_and_counts_right() -> None:
    model = TOWERS["timm"]().to(torch.bfloat16)
    with apply_encoder(model, "tome", r=15) as pruning:
        out = model(pixels().to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert pruning.trace.size.dtype == torch.float32
    assert torch.equal(pruning.trace.size.sum(1), torch.full((2,), 64.0))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    model = TOWERS["timm"]()
    x = pixels()
    with torch.no_grad():
        expected = apply_encoder(model, "tome", r=7) and model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close(compiled(x), expected, atol=1e-6, rtol=1e-6)
