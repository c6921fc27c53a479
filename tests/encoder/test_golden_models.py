"""Spliced towers against whole published models: timm under ToMe, EViT, and pairs of ATS blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.golden_vectors import GoldenCase, claims
from tokprune.methods.encoder.ats import ATS, inverse_transform_sample
from tokprune.methods.encoder.evit import EViT
from tokprune.methods.encoder.tome import ToMe
from tokprune.runtime.encoder import apply_encoder

close = torch.testing.assert_close
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def vit(case: GoldenCase, weights: str, **options: object) -> nn.Module:
    """A timm vision transformer of the file's weights."""
    timm = __import__("timm.models.vision_transformer", fromlist=["VisionTransformer"])
    names = [k[len(weights) :] for k in case_keys(case) if k.startswith(weights)]
    state = {n: case[weights + n] for n in names}
    width = state["patch_embed.proj.weight"].shape[0]
    depth = 1 + max(int(n.split(".")[1]) for n in names if n.startswith("blocks."))
    model = timm.VisionTransformer(
        img_size=32,
        patch_size=state["patch_embed.proj.weight"].shape[-1],
        embed_dim=width,
        depth=depth,
        num_heads=3,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        num_classes=state["head.weight"].shape[0],
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        **options,
    )
    model.load_state_dict(state)
    return model.eval()


def case_keys(case: GoldenCase) -> list[str]:
    return GoldenCase(case.path).keys()


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """A list that the next forward fills with the outputs of the blocks."""
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, out: seen.append(out))
    return seen


@claims("tome_timm_model", anchor="logits")
def test_tome_on_timm(case: GoldenCase) -> None:
    kind = str(case.array("weights"))
    options = {} if kind == "cls" else {"class_token": False, "global_pool": "avg"}
    model = vit(case, f"weights_{kind}/", **options)
    r = case["r"].tolist()
    method = ToMe(
        r=int(r[0]),
        inflection=r[1] if len(r) > 1 else 0.0,
        proportional=bool(case.number("prop_attn")),
        compat="published",
    )
    seen = outputs(model)
    with torch.no_grad():
        pruning = apply_encoder(model, method, expand=False)  # the published patch pools merged tokens without weights
        logits = model(case["x"])
    close(logits, case["logits"], **TOLERANCE)
    for i, block in enumerate(seen):
        close(block, case[f"block{i}"], **TOLERANCE)
    trace, prefix = pruning.trace, int(kind == "cls")
    assert torch.equal(trace.size, case["size"][:, prefix:, 0])
    source = case["source"][:, prefix:, prefix:]  # (B, K, N)
    assert torch.equal(
        torch.nn.functional.one_hot(trace.assign, source.shape[1]).transpose(1, 2).to(torch.uint8), source
    )


@claims("evit_model", anchor="logits", unused={"idx*": "which tokens stay shows in the outputs of the blocks"})
def test_evit_on_timm(case: GoldenCase) -> None:
    model = vit(case, "w/")
    rates = case["keep_rate"].tolist()
    blocks = tuple(i for i, rate in enumerate(rates) if rate < 1)
    method = EViT(keep=rates[blocks[0]], blocks=blocks, fuse=bool(case.number("fuse")), compat="published")
    seen = outputs(model)
    with torch.no_grad(), apply_encoder(model, method, expand=False):
        logits = model(case["x"])
    close(logits, case["logits"], **TOLERANCE)
    for i, block in enumerate(seen):
        close(block, case[f"block{i}"], **TOLERANCE)


def blocks_model(case: GoldenCase, weights: list[str], heads: int, eps: float) -> nn.Module:
    """Just the blocks of a timm vision transformer, fed with tokens."""
    timm = __import__("timm.models.vision_transformer", fromlist=["VisionTransformer"])
    keys = case_keys(case)
    states = []
    for name in weights:
        full = case.prefix + name
        states.append({k[len(full) :]: case[k] for k in keys if k.startswith(full)})
    width = states[0]["norm1.weight"].shape[0]
    model = timm.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=width,
        depth=len(states),
        num_heads=heads,
        mlp_ratio=states[0]["mlp.fc1.weight"].shape[0] / width,
        qkv_bias="attn.qkv.bias" in states[0],
        norm_layer=lambda *a, **k: nn.LayerNorm(a[0], eps=eps),
    )
    for block, state in zip(model.blocks, states, strict=True):
        block.load_state_dict(state)
    return model.eval()


INSIDE = "test_evit_ats_functions compares what happens inside the block"


@claims(
    "evit_block",
    anchor="y",
    unused={
        **dict.fromkeys(("cls_attn", "idx", "complement", "left_tokens"), INSIDE),
        "attn_out": "y follows from it",
        "n_tokens": "the published model's own account of its counts; y has them",
    },
)
def test_evit_block(case: GoldenCase) -> None:
    heads, keep, fuse, tokens = case["cfg"].tolist()
    model = blocks_model(case, ["w/"], int(heads), 1e-5)
    n = case["x"].shape[1] - 1
    method = EViT(keep=tokens / n if tokens > 0 else keep, blocks=(0,), fuse=bool(fuse), compat="published")
    with torch.no_grad(), apply_encoder(model, method, expand=False):
        close(model.blocks(case["x"]), case["y"], **TOLERANCE)


@claims("ats_block", anchor="y0")
def test_ats_blocks(case: GoldenCase, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, drop, _, samples = (int(n) for n in case["cfg"])
    if not drop:  # the published option that keeps the padding up to the count at the entrance, and so saves nothing

        def padded(scores: torch.Tensor, samples: int, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            patches, hit = inverse_transform_sample(scores, samples, real)
            more = scores.shape[1] - patches.shape[1]
            return nn.functional.pad(patches, (0, more)), nn.functional.pad(hit, (0, more))

        monkeypatch.setattr("tokprune.methods.encoder.ats.inverse_transform_sample", padded)
    model = blocks_model(case, ["w0/", "w1/"], heads, 1e-6)
    method = ATS(first=0, samples=samples, compat="published")
    seen = outputs(model)
    with torch.no_grad():
        apply_encoder(model, method, expand=False)
        model.blocks(case["x"])
    for i, out in enumerate(seen):
        policy, expected = case[f"policy{i}"], case[f"y{i}"]
        width = int(policy.sum(1).max())
        assert out.shape[1] == (width if drop else case["x"].shape[1])
        close(out[:, :width] * policy[:, :width], expected[:, :width], **TOLERANCE)
