"""FLOPs against hand counts: exactly equal on a tiny LLaVA, and the papers' formulas against the papers' numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

from tests.profiling.counted import language_flops
from tokprune.errors import UnsupportedModelError
from tokprune.profiling import flops, formulas
from tokprune.profiling.formulas import DecoderShape
from tokprune.profiling.stages import find_stages, watch

D, HEADS, KV, HD, FFN, LAYERS, VOCAB = 64, 4, 2, 16, 128, 3, 96
VC, VFFN, VLAYERS, SIDE, PATCH = 32, 48, 4, 32, 8
IMAGE = 90


def llama() -> dict[str, object]:
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    clip = {
        "model_type": "clip_vision_model",
        "hidden_size": VC,
        "intermediate_size": VFFN,
        "num_hidden_layers": VLAYERS,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = transformers.LlavaConfig(
        vision_config=clip, text_config=llama(), image_token_index=IMAGE, image_seq_length=16
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def prompt(text: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.full((16,), IMAGE), torch.arange(3, 3 + text)])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.rand(1, 3, SIDE, SIDE),
    }


def hand_decoder(n: int, past: int = 0) -> int:
    q, k, v, o = D * D, D * KV * HD, D * KV * HD, D * D
    mlp = 3 * D * FFN
    products = 2 * n * (q + k + v + o + mlp)
    attention = 2 * (2 * HEADS * n * (n + past) * HD)  # QK^T and PV
    return LAYERS * (products + attention) + 2 * D * VOCAB  # head: one position


def hand_clip() -> int:
    patches = (SIDE // PATCH) ** 2
    n = patches + 1
    stem = 2 * patches * VC * 3 * PATCH * PATCH
    block = 2 * n * (4 * VC * VC + 2 * VC * VFFN) + 4 * n * n * VC
    return stem + VLAYERS * block


def test_stages_equal_the_hand_count(model: torch.nn.Module) -> None:
    x = prompt()
    n = x["input_ids"].shape[1]
    got = flops.stage_flops(model, x)
    assert got.vision == hand_clip()
    assert got.projector == 2 * 16 * (VC * D + D * D)
    assert got.prefill == hand_decoder(n)
    assert got.decode == hand_decoder(1, past=n)
    assert got.select == 0
    assert sum(got.operators.values()) == got.total(2)
    assert got.total(5) == got.total(1) + 4 * got.decode


def test_selection_work_appears_under_select(model: torch.nn.Module) -> None:
    stages = find_stages(model)

    def extra(module: torch.nn.Module, args: object, kwargs: object) -> None:
        torch.rand(16, 8) @ torch.rand(8, 16)  # what a distance matrix would cost

    handle = stages.projectors[0].register_forward_hook(lambda m, a, o: extra(m, a, o))
    base = stages.base.register_forward_pre_hook(extra, with_kwargs=True)
    try:
        got = flops.stage_flops(model, prompt())
    finally:
        handle.remove()
        base.remove()
    assert got.select == 2 * (2 * 16 * 16 * 8)  # the base model runs twice: prefill and decode
    assert got.projector == 2 * 16 * (VC * D + D * D) + 2 * 16 * 16 * 8


def test_hooks_are_gone_after_an_error(model: torch.nn.Module) -> None:
    stages = find_stages(model)
    with pytest.raises(RuntimeError), watch(stages, lambda part: None, lambda part: None):
        raise RuntimeError("boom")
    for module in (stages.vision, *stages.projectors, stages.language):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_language_model_alone_and_on_meta(device: str) -> None:
    config = transformers.LlamaConfig(**{k: v for k, v in llama().items() if k != "model_type"})
    with torch.device(device):
        lm = transformers.LlamaForCausalLM(config).eval()
    prefill, decode = language_flops(lm.model, lm.lm_head, 23)
    assert prefill == hand_decoder(23)
    assert decode == hand_decoder(1, past=23)
    shape = DecoderShape.of(config)
    assert formulas.exact_prefill(shape, 23) == prefill
    assert formulas.exact_decode(shape, 23) == decode


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("gqa", [False, True])
def test_attention_is_counted_by_torch(device: str, gqa: bool) -> None:
    q, k = torch.rand(1, 4, 10, 8, device=device), torch.rand(1, 2 if gqa else 4, 12, 8, device=device)
    total, by_op = flops.count(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=gqa))
    assert total == 2 * 2 * 4 * 10 * 12 * 8
    assert sum(by_op.values()) == total


def test_schedule_per_layer_adds_up() -> None:
    shape = DecoderShape(4, D, HEADS, KV, HD, FFN, VOCAB)
    full, cut = formulas.exact_layer(shape, 100), formulas.exact_layer(shape, 30)
    assert formulas.exact_prefill(shape, [100, 100, 30, 30], head=False) == 2 * full + 2 * cut
    with pytest.raises(ValueError, match="one per layer"):
        formulas.exact_prefill(shape, [1, 2])


VICUNA = DecoderShape(32, 4096, 32, 32, 128, 11008, 32000)


def test_formulas_give_the_published_numbers() -> None:
    # SparseVLM / PyramidDrop tables, image tokens only, LLaVA-1.5-7B: 3.82 T at 576 tokens, 20.84 T for LLaVA-NeXT.
    for tokens, published in ((576, 3.82), (192, 1.25), (128, 0.83), (64, 0.42), (2880, 20.83)):
        assert formulas.formula_total(formulas.formula_gated, tokens, VICUNA) / 1e12 == pytest.approx(
            published, abs=0.011
        )
    assert formulas.formula_fastv(612, 4096, 11008) / 1e9 == pytest.approx(99.3, abs=0.05)
    # FastV README: 57 % of the FLOPs for K=3, R=50 %; tables for K=2, R=50 % and 90 %.
    for drop, layer, share in ((0.5, 3, 0.57), (0.5, 2, 0.55), (0.9, 2, 0.20)):
        schedule = [612] * layer + [612 - round(drop * 576)] * (VICUNA.layers - layer)
        reduced, full = (formulas.formula_total(formulas.formula_fastv, n, VICUNA) for n in (schedule, 612))
        assert reduced / full == pytest.approx(share, abs=0.006)
    # PyramidDrop halves at layers 8, 16, 24: 1.78 T in its paper.
    steps = [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert formulas.formula_total(formulas.formula_gated, steps, VICUNA) / 1e12 == pytest.approx(1.78, abs=0.01)


def test_gqa_formula_is_the_gated_one_without_grouping_and_half_the_exact_count() -> None:
    assert formulas.formula_gqa(50, D, FFN, D) == formulas.formula_gated(50, D, FFN)
    grouped = DecoderShape(LAYERS, D, HEADS, KV, HD, FFN, VOCAB)
    assert 2 * formulas.formula_total(formulas.formula_gqa, 50, grouped) == formulas.exact_prefill(
        grouped, 50, head=False
    )


def test_a_text_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="vision tower"):
        find_stages(torch.nn.Linear(2, 2))
