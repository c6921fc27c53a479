"""The handle of the encoder stage: arguments, refusals, report, whole models of the libraries."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from torch import nn

from tests.encoder.all_towers import TOWERS, hooks, pixels, settle, timm_vit
from tokprune.errors import BudgetError, OptionError, UnsupportedModelError
from tokprune.methods.encoder.auroracap import AuroraCap
from tokprune.methods.encoder.tome import ToMe
from tokprune.registry import get_method, list_methods
from tokprune.runtime.encoder import apply_encoder, remove_encoder
from tokprune.testing import build, picture

close = torch.testing.assert_close


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("tome", {}, OptionError, "neither r nor a ratio"),
        ("tome", {"r": 8, "ratio": 0.5}, OptionError, "both r and a ratio"),
        ("tome", {"r": -1}, OptionError, "r=-1"),
        ("tome", {"r": 8, "inflection": 2.0}, OptionError, "inflection"),
        ("tome", {"r": 8, "matching": "nearest"}, OptionError, "bipartite, kth, random"),
        ("tome", {"ratio": 1.5}, BudgetError, "ratio"),
        ("tome", {"ratio": 0.5, "budget": 8}, BudgetError, "choose one"),
        ("evit", {"blocks": (99,)}, OptionError, "block 99"),
        ("evit", {"keep": 0.0}, OptionError, "keep"),
        ("pitome", {"keep": 0.3}, OptionError, "at most half"),
        ("auroracap", {"ratio": 0.5, "compat": "published"}, OptionError, "published"),
        ("divprune", {}, OptionError, "not to the encoder stage"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_model(method: str, options: Any, error: type, message: str) -> None:
    model = TOWERS["timm"]()
    before = hooks(model)
    with pytest.raises(error, match=message):
        apply_encoder(model, method, **options)
    assert hooks(model) == before
    assert "_tokprune" not in vars(model)


def test_a_refused_second_method_leaves_the_first() -> None:
    model = TOWERS["timm"]()
    first = apply_encoder(model, "tome", r=4)
    with pytest.raises(OptionError):
        apply_encoder(model, "tome")
    assert first.active


@pytest.mark.parametrize("what", ["swin", "linear", "eva", "llm"])
def test_unknown_towers_are_refused(what: str) -> None:
    timm = pytest.importorskip("timm")
    hf = pytest.importorskip("transformers")
    tiny = {
        "num_layers": 1,
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
    }
    model = {
        "swin": lambda: timm.models.swin_transformer.SwinTransformer(
            img_size=32, patch_size=4, embed_dim=8, depths=(1,), num_heads=(2,), window_size=4
        ),
        "eva": lambda: timm.models.eva.Eva(
            img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, use_post_norm=True
        ),
        "linear": lambda: nn.Linear(2, 2),
        "llm": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=8, **tiny)),
    }[what]()
    message = "EvaBlockPostNorm" if what == "eva" else "reduced inside"
    with pytest.raises(UnsupportedModelError, match=message):
        apply_encoder(model, "tome", r=1)


def test_convolutional_and_unlisted_vlm_towers_are_refused() -> None:
    for family in ("fast_vlm", "mistral3"):
        with pytest.raises(UnsupportedModelError, match="connector stage"):
            apply_encoder(build(family).model, "tome", ratio=0.5)


@torch.no_grad()
def test_report() -> None:
    model = TOWERS["timm"]()
    pruning = apply_encoder(model, "tome", r=7)
    assert "no picture has been seen yet" in str(pruning.report())
    model(pixels(3))
    report = pruning.report()
    assert report.left == (36, 36, 36)
    assert report.counts == (58, 51, 44, 37)
    assert report.work == pytest.approx((58 + 51 + 44 + 37) / (4 * 65))
    assert json.loads(report.to_json())["method"] == "tome"
    assert "64 patches -> 36" in str(report)
    assert "removed" not in repr(pruning)
    remove_encoder(model)
    assert "removed" in repr(pruning)
    pruning.remove()


@torch.no_grad()
def test_auroracap_counts_as_published_and_as_asked() -> None:
    """729 patches, 48 blocks of which 47 are used, 0.1 asked: 118 stay as published, 73 when corrected."""
    for compat, left in (("published", 118), ("corrected", 73)):
        method, rows = AuroraCap(keep=0.1, compat=compat), 729
        for index in range(47):
            view = type("V", (), {"start": 729, "target": None, "index": index, "depth": 47, "blocks": 48})
            rows -= method.count(view)
        assert rows == left


@torch.no_grad()
def test_published_auroracap_is_tome_without_sizes() -> None:
    model, x = TOWERS["clip"](), pixels()
    with apply_encoder(model, AuroraCap(keep=0.5, compat="published"), expand=False):
        a = model(x).last_hidden_state
    with apply_encoder(model, ToMe(r=8, proportional=False), expand=False):
        b = model(x).last_hidden_state
    with apply_encoder(model, ToMe(r=8), expand=False):
        c = model(x).last_hidden_state
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=1e-3)


@torch.no_grad()
def test_open_clip_models_as_a_whole() -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 4, "width": 24, "layers": 4, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    model = settle(open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))
    x = pixels()
    plain = model.encode_image(x)
    with apply_encoder(model, "tome", r=8) as pruning:
        reduced = model.encode_image(x)
    assert pruning.trace.counts == (57, 49, 41, 33)
    assert plain.shape == reduced.shape
    assert not torch.allclose(plain, reduced)
    assert torch.equal(model.encode_image(x), plain)


@torch.no_grad()
def test_clip_and_siglip_models_as_a_whole() -> None:
    hf = pytest.importorskip("transformers")
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 4,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    for name in ("CLIP", "Siglip"):
        config = getattr(hf, f"{name}Config")(text_config=text, vision_config=vision)
        model = settle(getattr(hf, f"{name}Model")(config))
        plain = model.get_image_features(pixels()).pooler_output
        with apply_encoder(model, "tome", ratio=0.3) as pruning:
            reduced = model.get_image_features(pixels()).pooler_output
        assert pruning.trace.survivor.sum(1).tolist() == [19, 19]
        assert plain.shape == reduced.shape
        assert torch.equal(model.get_image_features(pixels()).pooler_output, plain)


@torch.no_grad()
def test_siglip2_without_padding_is_reduced_and_with_padding_refused() -> None:
    hf = pytest.importorskip("transformers")
    config = hf.Siglip2VisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3, num_patches=16, patch_size=4
    )
    model = settle(hf.Siglip2VisionModel(config))
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    shapes = torch.tensor([[4, 4], [2, 8]])
    full = {"pixel_values": x, "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long), "spatial_shapes": shapes}
    plain = model(**full).pooler_output
    with apply_encoder(model, "tome", r=0):
        assert torch.equal(model(**full).pooler_output, plain)
    with apply_encoder(model, "tome", ratio=0.5) as pruning:
        assert model(**full).pooler_output.shape == plain.shape
        assert pruning.trace.survivor.sum(1).tolist() == [8, 8]
        padded = {**full, "pixel_attention_mask": full["pixel_attention_mask"].clone()}
        padded["pixel_attention_mask"][1, 8:] = 0
        padded["spatial_shapes"] = torch.tensor([[4, 4], [2, 4]])
        with pytest.raises(UnsupportedModelError, match="equal size"):
            model(**padded)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_5", "glm4v"])
def test_other_packed_towers_run(family: str) -> None:
    tiny = build(family)
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), "?"]])
    plain = tiny.model(**inputs).logits
    with apply_encoder(tiny.model, "tome", r=0):
        assert torch.equal(tiny.model(**inputs).logits, plain)
    with apply_encoder(tiny.model, "tome", ratio=0.5) as pruning:
        assert tiny.model(**inputs).logits.isfinite().all()
    assert 0 < int(pruning.trace.survivor.sum()) < pruning.trace.survivor.numel()


@torch.no_grad()
def test_threads_do_not_mix_their_runs() -> None:
    model = timm_vit()
    apply_encoder(model, "tome", r=7)
    xs = [pixels(1 + i, i) for i in range(4)]
    expected = [model(x) for x in xs]
    results: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(8):
                results[i].append(model(xs[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, outs in results.items():
        assert len(outs) == 8
        for out in outs:
            close(out, expected[i], atol=1e-5, rtol=1e-5)


def test_list_of_encoder_methods() -> None:
    names = list_methods("encoder")
    assert {
        "tome",
        "tofu",
        "pitome",
        "evit",
        "ats",
        "zerotprune",
        "auroracap",
        "apt",
        "ipcv",
        "toc3d",
        "dynamicvit",
        "dtop",
    } <= set(names)
    for name in names:
        assert get_method(name).info.paper


@pytest.mark.parametrize(
    ("kernel", "method"), [("flex_attention", "evit"), ("flex_attention", "tome"), ("flash", "tome")]
)
def test_kernels_that_take_no_bias_are_refused(kernel: str, method: str) -> None:
    tower = TOWERS["clip"]()
    before = tower.config._attn_implementation
    tower.config._attn_implementation = kernel
    with pytest.raises(UnsupportedModelError, match=r"no bias per key.*sdpa"):
        apply_encoder(tower, method, ratio=0.5)
    tower.config._attn_implementation = before
    with apply_encoder(tower, method, ratio=0.5):
        tower.config._attn_implementation = kernel
        with pytest.raises(UnsupportedModelError, match="no bias per key"):
            tower(pixels())
