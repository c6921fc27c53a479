"""Several samples in one row, told apart by positions that start anew: each answers as it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.conversations import TEXTS, joined
from tests.adapters.reference import HYBRID, QUICK, Native, apart, observe, reference, shared
from tokprune.errors import MissingQueryError
from tokprune.testing import FAMILIES, TinyVLM, picture

# Natively told apart: not with prompts read both ways, not by recurrent layers.
PACKING = [f for f in FAMILIES if f not in (*HYBRID, "gemma3", "paligemma", "molmo2")]
SAMPLES: list[list[Any]] = [
    ["Hello ", ("image", picture(60, 40, 1)), " what is this?"],
    ["Longer text before ", ("image", picture(40, 60, 2)), " describe."],
    ["A third ", ("image", picture(40, 40, 3)), " one?"],
]


def packed(tiny: TinyVLM) -> tuple[dict[str, Any], list[Native], list[int]]:
    """One row with all samples, what the language model sees of each alone, and where each starts."""
    turns = [tiny.inputs([sample]) for sample in SAMPLES]
    natives = [observe(tiny, turn, "forward") for turn in turns]
    call: dict[str, Any] = {name: torch.cat([t[name] for t in turns], 1) for name in TEXTS if name in turns[0]}
    call.pop("attention_mask")
    call["mm_encoder_outputs"] = joined(tiny, turns)
    rows = [n.positions for n in natives]
    if natives[0].mrope:  # transformers reads samples from a fourth row, in front
        rows = [torch.cat([torch.arange(r.shape[-1])[None, None], r]) for r in rows]
    call["position_ids"] = torch.cat(rows, -1)
    lengths = [n.ids.shape[1] for n in natives]
    return call, natives, [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in PACKING])
@torch.no_grad()
def test_samples_of_a_packed_row_answer_as_alone(family: str) -> None:
    tiny = shared(family)
    call, natives, starts = packed(tiny)
    plain = tiny.model(**call, use_cache=False).logits
    for i, native in enumerate(natives):  # native packing works
        alone = reference(tiny, native, native.real, "keep", native.ids[:, :0]).prompt[0]
        assert apart([plain[0, starts[i] : starts[i + 1]]], [alone]) < 1e-4
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, "random", ratio=0.3, positions=positions) as pruning:
            got = tiny.model(**call, use_cache=False).logits
            keep = pruning.last.keep
        assert got.shape == plain.shape
        for i, native in enumerate(natives):
            mine = keep[:, starts[i] : starts[i + 1]]
            assert int((~mine).sum()) > 0
            wanted = reference(tiny, native, mine, positions, native.ids[:, :0]).prompt[0]
            assert apart([got[0, starts[i] : starts[i + 1]][mine[0]]], [wanted]) < 1e-4
    with tokprune.apply(tiny.model, "random", ratio=1.0):
        assert torch.equal(tiny.model(**call, use_cache=False).logits, plain)


@torch.no_grad()
def test_two_packed_rows_of_different_length() -> None:
    """Filler of a shorter row is a sample of its own."""
    tiny = shared("llava")
    call, natives, starts = packed(tiny)
    parts = call["mm_encoder_outputs"]["image"]
    order = [0, 1, 2, 2, 0, 1]
    ids = [call["input_ids"][:, starts[i] : starts[i + 1]] for i in order]
    positions = [call["position_ids"][:, starts[i] : starts[i + 1]] for i in order]
    rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in parts.pooler_output]).split(
        [int(n.visual.sum()) for n in natives]
    )
    parts.pooler_output = [rows[i] for i in order]
    both = {
        "input_ids": torch.cat([torch.cat(ids[:3], 1), torch.cat(ids[3:], 1)]),
        "position_ids": torch.cat([torch.cat(positions[:3], 1), torch.cat(positions[3:], 1)]),
        "mm_encoder_outputs": {"image": parts},
    }

    with tokprune.apply(tiny.model, "uneven_for_rows", ratio=0.3) as pruning:
        got = tiny.model(**both, use_cache=False).logits
        keep = pruning.last.keep
    assert len(set(keep.sum(1).tolist())) == 2
    for row in range(2):
        column = 0
        for i in order[3 * row : 3 * row + 3]:
            stop = column + natives[i].ids.shape[1]
            mine = keep[row : row + 1, column:stop]
            wanted = reference(tiny, natives[i], mine, "compact", natives[i].ids[:, :0]).prompt[0]
            assert apart([got[row, column:stop][mine[0]]], [wanted]) < 1e-4
            column = stop


@pytest.fixture(autouse=True)
def uneven() -> Any:
    """A method that keeps more of the pictures of some prompts."""
    from dataclasses import dataclass

    from tokprune import registry
    from tokprune.methods.base import ConnectorMethod
    from tokprune.registry import register_method
    from tokprune.tokens import Selection

    @register_method("uneven_for_rows", paper="a test", adaptive=True)
    @dataclass(frozen=True)
    class Uneven(ConnectorMethod):
        def select_batch(self, batch, keeps):
            return [Selection(torch.arange(k + i // 3)) for i, k in enumerate(keeps)]

    yield
    registry._methods.pop("uneven_for_rows")


def test_lengths_that_flash_attention_is_told_are_cut() -> None:
    from tokprune.runtime.execute import _cut_lengths

    keep = torch.tensor([[1, 0, 0, 1, 1, 1, 0, 1, 1, 1]]).bool()
    call = {"cu_seq_lens_q": torch.tensor([0, 5, 10], dtype=torch.int32), "max_length_q": 5}
    _cut_lengths(call, keep)
    assert call["cu_seq_lens_q"].tolist() == [0, 3, 7]
    assert call["cu_seq_lens_q"].dtype == torch.int32
    assert call["max_length_q"] == 4


@torch.no_grad()
def test_question_of_a_packed_row_must_be_given() -> None:
    """Each sample has a question of its own, and the row's last one is not that of the first picture."""
    tiny = shared("llava")
    call, _, _ = packed(tiny)
    del call["mm_encoder_outputs"]
    call["pixel_values"] = torch.cat([tiny.inputs([sample])["pixel_values"] for sample in SAMPLES])
    with (
        tokprune.apply(tiny.model, "mmtok", ratio=0.3, processor=tiny.processor),
        pytest.raises(MissingQueryError, match="packed"),
    ):
        tiny.model(**call, use_cache=False)
    with tokprune.apply(tiny.model, "mmtok", ratio=0.3, processor=tiny.processor, query="what?") as pruning:
        tiny.model(**call, use_cache=False)
        assert {s.question for s in pruning.last.streams} == {"what?"}
