"""FastV and PyramidDrop, which rank by the prompt's last token, against what published code returned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from tests.golden_vectors import GoldenCase, claims
from tokprune.errors import OptionError
from tokprune.methods.decoder.fastv import FastV
from tokprune.methods.decoder.pyramiddrop import PyramidDrop
from tokprune.methods.decoder.vtw import VTW
from tokprune.methods.decoder_base import LayerTokens
from tokprune.runtime.decoder.attention import LayerInputs, RowAttention


class LastRow:
    """Attention of which the last token's row is given: (n,)."""

    def __init__(self, row: Tensor) -> None:
        self.row = row

    def weights(self, queries: Tensor) -> Tensor:
        assert queries.tolist() == [len(self.row) - 1]
        return self.row[None]


class Bare(nn.Module):
    """A decoder layer of attention alone."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        return self.self_attn(hidden, **kwargs)[0]


def in_front(hidden: Tensor, start: int, count: int, total: int, attention: Any, notes: Any = None) -> LayerTokens:
    """One picture from `start` on. hidden: (n, D)."""
    at = torch.arange(count)
    visual = at + start
    return LayerTokens(
        *(3, hidden, torch.arange(len(hidden)), visual, torch.zeros_like(at), torch.zeros_like(at), at, total),
        *(attention, attention),
        bound=False,
        notes={} if notes is None else notes,
    )


@claims("fastv")
def test_fastv_keeps_what_the_published_code_keeps(case: GoldenCase) -> None:
    start, count = case.number("image_start"), case.number("image_len")
    (hidden,), (heads,) = case["hidden"], case["attn_last_row"]  # published: one prompt at a time
    drops = [key.removeprefix("keep_r") for key in case if key.startswith("keep_r")]
    assert drops
    for drop in drops:
        method = FastV(share=1 - float(drop) / 100, compat="published")
        tokens = in_front(hidden, start, count, count, LastRow(heads.mean(0)))
        indices = method.select(tokens, -1).indices  # published: its own count
        kept = torch.cat([torch.arange(start), start + indices, torch.arange(start + count, len(hidden))])
        assert torch.equal(kept, case[f"keep_r{drop}"])
        assert torch.equal(kept, case[f"pos_r{drop}"][0])
        assert torch.equal(hidden[kept], case[f"hidden_r{drop}"])


def test_fastv_cuts_as_published_where_its_share_decides() -> None:
    tokens = in_front(torch.zeros(9, 2), 2, 5, 5, LastRow(torch.arange(9.0)))
    published = FastV(compat="published")
    assert published.select(tokens, 3).indices.tolist() == [3, 4]  # half of 5, to the even number
    assert published.select(replace(tokens, bound=True), 3).indices.tolist() == [2, 3, 4]
    assert FastV().select(tokens, 3).indices.tolist() == [2, 3, 4]


def test_pyramiddrop_cuts_as_published_where_its_shares_decide() -> None:
    tokens = in_front(torch.zeros(101, 2), 0, 100, 100, LastRow(torch.arange(101.0)))
    shares = (0.29,)  # times 100 this is a hair below 29 in floating point, and the published code cuts it off
    assert len(PyramidDrop(layers=(1,), shares=shares, compat="published").select(tokens, -1).indices) == 28


@claims("pyramiddrop")
def test_pyramiddrop_keeps_what_the_published_code_keeps(case: GoldenCase) -> None:
    heads, start, total = (case.number(name) for name in ("heads", "image_start", "image_len"))
    width = case["wq"].shape[0]
    config = LlamaConfig(hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads, rope_theta=10000.0)
    attention = LlamaAttention(config, 0).requires_grad_(False)
    attention.q_proj.weight.copy_(case["wq"])
    attention.k_proj.weight.copy_(case["wk"])
    shares = tuple(case["ratios"].tolist()[1:])
    method = PyramidDrop(layers=tuple(range(1, len(shares) + 1)), shares=shares, compat="published")
    for row, (hidden, mask) in enumerate(zip(case["features"], case["attention_mask"], strict=True)):
        left, count, notes = hidden[mask], total, {}
        where = torch.arange(len(left))
        for stage in range(len(shares)):
            last = int(case["prompt_len"][row]) + count
            tables = LlamaRotaryEmbedding(config)(left, torch.arange(len(left))[None])
            inputs = LayerInputs(Bare(attention), left[None], {"position_embeddings": tables, "attention_mask": None})
            tokens = in_front(left[:last], start, count, total, RowAttention(inputs, 0, 0, last, left.device), notes)
            indices = start + method.select(tokens, -1).indices
            kept = torch.cat([torch.arange(start), indices, torch.arange(start + count, len(left))])
            left, where, count = left[kept], where[kept], len(indices)
            real = case[f"attention_mask_{stage}"][row]
            assert torch.equal(left, case[f"features_{stage}"][row][real])
            assert case[f"position_ids_{stage}"][row][real].tolist() == list(range(len(left)))
            assert torch.equal(where, case[f"kept_rows_{stage}"][row][real])


def test_plans_follow_the_depth_and_the_ratio() -> None:
    assert PyramidDrop().plan(32, None).steps == ((8, 0.5), (16, 0.25), (24, 0.125))
    assert PyramidDrop().plan(32, 1 / 8).steps == ((8, 0.5), (16, 0.25), (24, 0.125))
    assert PyramidDrop().plan(4, 0.25).layers == (1, 2, 3)
    assert FastV().plan(32, None).steps == ((2, 0.5),)
    assert FastV(layer=3, share=0.25).plan(32, 0.1).steps == ((3, 0.1),)
    assert VTW().plan(32, None).steps == ((15, 0.0),)
    assert VTW().plan(40, None).steps == ((19, 0.0),)
    assert VTW(layer=3).plan(4, None).steps == ((3, 0.0),)
    assert VTW().plan(2, None).steps == VTW().plan(1, None).steps == ((1, 0.0),)  # no layer before the first
    with pytest.raises(OptionError, match="leaves no visual token"):
        VTW().plan(32, 0.5)
    with pytest.raises(OptionError, match="one share for each layer"):
        PyramidDrop(layers=(3, 4))
    with pytest.raises(OptionError, match="never rise"):
        PyramidDrop(shares=(0.1, 0.2, 0.3))
