"""FLOPs against hand counts: exactly equal on a tiny LLaVA, and the papers' formulas against the papers' numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter

import tokprune
from tests.profiling.counted import language_flops
from tokprune.budget import ceil_of
from tokprune.errors import UnsupportedModelError
from tokprune.profiling import flops, formulas
from tokprune.profiling.formulas import DecoderShape
from tokprune.profiling.stages import find_stages, watch
from tokprune.schedule import Schedule

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


def fused_kernels() -> set[str]:
    """torch's fused attention operators, forward and backward, by every name that this build of torch has."""
    names = {n.removeprefix("aten::").partition(".")[0] for n in torch._C._dispatch_get_all_op_names()}
    composed = {"_scaled_dot_product_attention_math"}  # runs as matrix products, which are counted
    return {n for n in names if n.startswith("_scaled_dot_product")} - composed


def test_every_fused_attention_kernel_of_this_torch_is_counted() -> None:
    counter = flops.new_counter()
    unknown = {n for n in fused_kernels() if getattr(torch.ops.aten, n) not in counter.flop_registry}
    assert fused_kernels() >= {"_scaled_dot_product_flash_attention_for_cpu"}
    assert not unknown, "these would count as 0; name them in FORWARD_KERNELS or BACKWARD_KERNELS"


@pytest.mark.parametrize("mask", [None, "causal", "bool", "float"])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("backend", ["fused", "math"])
def test_attention_on_a_cpu_equals_the_hand_count(mask: str | None, heads: int, backend: str) -> None:
    q, k, v = torch.rand(2, 4, 10, 8), torch.rand(2, heads, 12, 8), torch.rand(2, heads, 12, 8)
    given = {"bool": torch.ones(10, 12, dtype=torch.bool), "float": torch.zeros(10, 12)}.get(mask or "")

    def call() -> object:
        return F.scaled_dot_product_attention(q, k, v, given, is_causal=mask == "causal", enable_gqa=heads != 4)

    kernels = [SDPBackend.MATH] if backend == "math" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels):
        total, _ = flops.count(call)
    assert total == 2 * 2 * 2 * 4 * 10 * 12 * 8


def test_training_counts_the_products_of_the_backward_pass() -> None:
    q, k, v = (torch.rand(1, 4, 10, 8, requires_grad=True) for _ in range(3))
    with flops.new_counter() as counter:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    product = 2 * 4 * 10 * 10 * 8
    assert counter.get_total_flops() == (2 + 5) * product  # five: the scores are made again


@pytest.mark.parametrize("known", [True, False])
def test_a_kernel_that_torch_counts_itself_is_left_to_torch(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before = dict(flops.flop_registry)
    table = {k: f for k, f in before.items() if k is not kernel}
    if known:  # as later versions of torch have it
        table[kernel] = lambda *args, **kwargs: 12345
    monkeypatch.setattr(flops, "flop_registry", table)
    monkeypatch.setattr(flop_counter, "flop_registry", table)
    q = torch.rand(1, 4, 10, 8)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        total, _ = flops.count(lambda: F.scaled_dot_product_attention(q, q, q))
    assert total == (12345 if known else 2 * 2 * 4 * 10 * 10 * 8)
    assert table.keys() == (before.keys() | {kernel} if known else before.keys() - {kernel})


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


def average(steps: tuple[tuple[int, int], ...]) -> float:
    """Mean visual tokens over 32 layers, of 576; steps: layer and tokens left."""
    counts = formulas.layer_tokens(Schedule(tuple((at, n / 576) for at, n in steps)), 576, 32)
    return sum(counts) / 32


def test_schedules_give_the_published_token_averages() -> None:
    # SparseVLM v1.5 at "192": 300, 200 and 110 kept, 9, 4 and 3 merged; its own average takes the layer behind which
    # tokens are dropped as if it ran on what is left.
    kept = (309, 204, 113)
    assert average(tuple(zip((2, 6, 15), kept, strict=True))) == pytest.approx(192.0, abs=0.05)
    assert average(tuple(zip((3, 7, 16), kept, strict=True))) == pytest.approx(206.5, abs=0.05)
    assert average(((8, 288), (16, 144), (24, 72))) == 270  # PyramidDrop
    for last, mean in ((166, 192), (98, 128), (30, 64)):  # FastV, K = 2
        assert average(((2, last),)) == pytest.approx(mean, abs=0.5)


def test_schedules_give_the_published_flops() -> None:
    def total(schedule: Schedule | None, layer: Callable[..., int], text: int = 0) -> int:
        return formulas.formula_total(layer, formulas.layer_tokens(schedule, 576, 32, text), VICUNA)

    gated, fastv = formulas.formula_gated, formulas.formula_fastv
    assert total(None, gated) / 1e12 == pytest.approx(3.82, abs=0.005)
    halves = Schedule.geometric((8, 16, 24), 1 / 8)
    assert total(halves, gated) / 1e12 == pytest.approx(1.78, abs=0.005)
    half = Schedule(((3, 0.5),))
    assert total(half, fastv, text=36) / total(None, fastv, text=36) == pytest.approx(0.57, abs=0.006)
    sparse = Schedule(((3, 309 / 576), (7, 204 / 576), (16, 113 / 576)))
    assert total(sparse, gated) / 1e12 == pytest.approx(1.35, abs=0.005)


def test_what_mustdrops_published_saving_can_mean() -> None:
    """Abstract: 88.5 % fewer FLOPs at a compression of 92.2 %. How many words were counted is not said.

    92.2 % is 45 of 576 tokens, which is the key set of 560 merged ones, too (8 % of them, rounded up).
    """

    def saved(tokens: Sequence[int], words: int) -> float:
        gated = formulas.formula_gated
        full = formulas.formula_total(gated, 576 + words, VICUNA)
        return 1 - formulas.formula_total(gated, [n + words for n in tokens], VICUNA) / full

    assert round(1 - 45 / 576, 3) == 0.922
    assert ceil_of(560, 0.08) == 45
    assert saved([45] * 32, 0) == pytest.approx(0.924, abs=0.0005)  # no words
    assert [round(saved([45] * 32, words), 3) for words in (25, 26)] == [0.886, 0.885]  # reproduced with 26
    assert saved([45] * 32, 36) == pytest.approx(0.870, abs=0.0005)  # the words in front of LLaVA-1.5's questions
    # Even if all stages dropped at once, behind layer 2: nothing that the stages leave saves as much.
    assert saved([576] * 3 + [45] * 29, 0) == pytest.approx(0.837, abs=0.0005)


def test_the_share_of_a_schedule_is_the_exact_one() -> None:
    shape = DecoderShape(4, D, HEADS, KV, HD, FFN, VOCAB)
    schedule = Schedule(((1, 0.5), (3, 0.0)))
    tokens = [100 + 7, 50 + 7, 50 + 7, 7]
    assert formulas.layer_tokens(schedule, 100, 4, text=7) == tokens
    expected = sum(formulas.exact_layer(shape, n) for n in tokens) / (4 * formulas.exact_layer(shape, 107))
    assert formulas.prefill_share(schedule, shape, 100, 7) == pytest.approx(expected)


def test_a_schedule_costs_what_the_counter_counts(model: torch.nn.Module) -> None:
    shape, x = DecoderShape.of(model.config), prompt()
    n = x["input_ids"].shape[1]
    schedule = Schedule(((2, 0.0),))  # of VTW, which computes nothing of its own
    with tokprune.apply(model, "vtw", schedule=schedule.steps):
        got = flops.stage_flops(model, x)
    tokens = formulas.layer_tokens(schedule, 16, LAYERS, n - 16)
    assert tokens == [n, n, n - 16]
    assert got.prefill == formulas.exact_prefill(shape, tokens)
    assert got.decode == formulas.exact_decode(shape, tokens)


def test_gqa_formula_is_the_gated_one_without_grouping_and_half_the_exact_count() -> None:
    assert formulas.formula_gqa(50, D, FFN, D) == formulas.formula_gated(50, D, FFN)
    grouped = DecoderShape(LAYERS, D, HEADS, KV, HD, FFN, VOCAB)
    assert 2 * formulas.formula_total(formulas.formula_gqa, 50, grouped) == formulas.exact_prefill(
        grouped, 50, head=False
    )


def test_a_text_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="vision tower"):
        find_stages(torch.nn.Linear(2, 2))
