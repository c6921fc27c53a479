"""Masks of the caller's own: four dimensions, dicts, hidden pictures. Right is the plain model on the prompt shortened
by hand, rows and columns of the mask cut by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.conversations import conversation
from tests.adapters.reference import (
    HYBRID,
    QUICK,
    Prompt,
    additive,
    apart,
    language_model,
    prompt,
    prompt_of,
    recount,
    shared,
)
from tokprune.errors import UnsupportedModelError
from tokprune.testing import FAMILIES, picture

ATTENTION = [
    f for f in FAMILIES if f not in (*HYBRID, "gemma3", "paligemma", "molmo2")
]  # blocks both ways: tested apart


def families(*quick: str) -> list[Any]:
    return [pytest.param(f, marks=[] if f in quick else [pytest.mark.slow]) for f in ATTENTION]


def two_segments(case: Prompt) -> Tensor:
    """(B, L, L) bool: causal, and the second half of each prompt does not see the first."""
    length = case.real.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    cut = length // 2
    seen[cut:, :cut] = False
    return seen & case.real[:, None] | torch.eye(length, dtype=torch.bool)


@torch.no_grad()
def by_hand(case: Prompt, keep: Tensor, positions: str, seen: Tensor, row: int) -> Tensor:
    """Logits (K, V) of one prompt's kept tokens under the mask `seen` (B, L, L), cut to them."""
    native = case.forward
    used = keep[row]
    where = recount(native, keep & native.real, row)[0] if positions == "compact" else native.positions[..., row, used]
    where = where.reshape(-1, int(used.sum()))
    mask = seen[row][used][:, used]
    call: dict[str, Any] = {
        "inputs_embeds": native.embeds[row, used][None],
        "position_ids": where[:, None] if native.mrope else where,
        "attention_mask": additive(mask, native.embeds.dtype),
        "use_cache": False,
    }
    if native.planes:
        visual = native.visual[row][used]
        call["visual_pos_masks"] = visual[None]
        call["deepstack_visual_embeds"] = [plane[row][used][visual] for plane in native.planes]
    return case.tiny.model.lm_head(language_model(case.tiny.model)(**call).last_hidden_state)[0]


FORMS = {
    "boolean": lambda seen: seen[:, None],
    "additive": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None],
    "a head each": lambda seen: seen[:, None].expand(-1, 4, -1, -1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", families(*QUICK))
@torch.no_grad()
def test_mask_of_four_dimensions(family: str, form: str) -> None:
    case = prompt(family, "image")
    model = case.tiny.model
    if form == "a head each" and model.config.get_text_config().num_attention_heads != 4:
        pytest.skip("another number of heads")
    seen = two_segments(case)
    call = {**case.inputs, "attention_mask": FORMS[form](seen), "position_ids": case.forward.positions}
    plain = model(**call).logits
    assert apart([plain[case.real]], [case.unpruned.logits[case.real]]) > 0.1, "the mask must matter"
    for positions in ("keep", "compact"):
        with tokprune.apply(model, "random", ratio=0.3, positions=positions) as pruning:
            got = model(**call).logits
            keep = pruning.last.keep
        assert got.shape == plain.shape
        for row in range(2):
            real = keep[row] & case.real[row]
            wanted = by_hand(case, keep & case.real, positions, seen, row)
            assert apart([got[row, real]], [wanted]) < 1e-4
    with tokprune.apply(model, "random", ratio=1.0):
        assert torch.equal(model(**call).logits, plain)


@pytest.mark.parametrize("family", ["gemma3"])
@torch.no_grad()
def test_dict_of_masks(family: str) -> None:
    case = prompt(family, "image")
    model = case.tiny.model
    seen = two_segments(case)
    masks = {kind: FORMS["boolean"](seen) for kind in ("full_attention", "sliding_attention")}
    call = {**case.inputs, "attention_mask": masks, "position_ids": case.forward.positions}
    plain = model(**call).logits
    with tokprune.apply(model, "random", ratio=0.3) as pruning:
        got = model(**call).logits
        keep = pruning.last.keep
    assert got.shape == plain.shape
    for row in range(2):
        assert (
            apart([got[row, keep[row] & case.real[row]]], [by_hand(case, keep & case.real, "compact", seen, row)])
            < 1e-4
        )


@pytest.mark.parametrize("family", families("llava", "qwen2_5_vl"))
@torch.no_grad()
def test_mask_of_four_dimensions_on_a_kept_cache(family: str) -> None:
    """A text turn on a pruned cache, whose four-dimensional mask says the same as the two-dimensional one."""
    tiny = shared(family)
    talk = conversation(tiny, 2)
    new = torch.tensor([[10, 20, 30, 40]] * 2)
    logits = []
    with tokprune.apply(tiny.model, "random", ratio=0.2):
        for full in (False, True):
            cache = talk.forward_first()
            mask = torch.nn.functional.pad(talk.first["attention_mask"], (0, 4), value=1)
            positions = torch.arange(talk.start, talk.start + 4)[None].expand(2, -1)
            if talk.native.mrope:
                positions = positions.expand(3, -1, -1)
            if full:
                seen = torch.ones(4, talk.start + 4, dtype=torch.bool).tril(talk.start)
                mask = (seen & mask[:, None].bool())[:, None]
            from tests.spelling import with_cache

            out = tiny.model(input_ids=new, attention_mask=mask, position_ids=positions, **with_cache(cache))
            logits.append(out.logits)
    assert apart([logits[0]], [logits[1]]) < 1e-5


# -- hidden pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families(*QUICK))
@torch.no_grad()
def test_mask_that_hides_a_picture(family: str) -> None:
    """Knock-out studies and contrastive decoding: the picture is there, and nobody sees it."""
    case = prompt(family, "image")
    model = case.tiny.model
    hidden = case.inputs["attention_mask"].clone()
    hidden[1, case.visual[1]] = 0  # both pictures of the second prompt
    call = {**case.inputs, "attention_mask": hidden, "position_ids": case.forward.positions}
    plain = model(**call).logits
    shown = hidden.bool()
    assert apart([plain[shown]], [case.unpruned.logits[shown]]) > 0.1
    with tokprune.apply(model, "random", ratio=1.0):
        assert apart([model(**call).logits[shown]], [plain[shown]]) == 0
    length = case.real.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & shown[:, None] | torch.eye(length, dtype=torch.bool)
    for positions in ("keep", "compact"):
        with tokprune.apply(model, "random", ratio=0.3, positions=positions) as pruning:
            got = model(**call).logits
            keep = pruning.last.keep
            assert [r.kept < r.total for r in pruning.last.streams] == [True] * 3
        for row in range(2):
            wanted = by_hand(case, keep, positions, seen, row)
            assert apart([got[row, keep[row] & shown[row]]], [wanted[shown[row][keep[row]]]]) < 1e-4


@pytest.mark.parametrize("family", ["llava", "internvl", "llava_next"])
def test_generation_with_a_hidden_picture(family: str) -> None:
    """generate() numbers visible tokens alone; the answer is that of the cut prompt with the cut mask."""
    tiny = shared(family)
    case = prompt_of(
        tiny, [["Hello ", ("image", picture(60, 40, 1)), " what ", ("image", picture(40, 40, 2)), " is this?"]]
    )
    hidden = case.inputs["attention_mask"].clone()
    first = case.visual[0].nonzero().flatten()
    hidden[0, first[: len(first) // 3]] = 0
    call = {**case.inputs, "attention_mask": hidden}
    plain = tiny.model.generate(**call, max_new_tokens=5)
    with tokprune.apply(tiny.model, "random", ratio=1.0):
        assert torch.equal(tiny.model.generate(**call, max_new_tokens=5), plain)
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, "random", ratio=0.3, positions=positions) as pruning:
            got = tiny.model.generate(**call, max_new_tokens=5)[:, -5:]
            keep = pruning.last.keep
        short = {"inputs_embeds": case.generate.embeds[:, keep[0]], "attention_mask": hidden[:, keep[0]]}
        if positions == "keep":
            numbers = hidden.cumsum(1) - 1
            short["position_ids"] = numbers.masked_fill(hidden == 0, 0)[:, keep[0]]
        wanted = tiny.model.generate(**short, max_new_tokens=5)[:, -5:]
        assert torch.equal(got, wanted)


def test_mask_objects_that_cannot_be_cut_are_refused() -> None:
    case = prompt("llava", "image")

    class BlockMask:
        shape = (2, 1, 128, 128)

    with (
        tokprune.apply(case.tiny.model, "random", ratio=0.3),
        pytest.raises(UnsupportedModelError, match="BlockMask"),
    ):
        case.tiny.model(**{**case.inputs, "attention_mask": BlockMask()})
