"""Rows of an attention map against the whole map."""

from __future__ import annotations

import pytest
import torch

from tests.published.attention import cls_logits, cls_row, received


def whole_map(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    batch, s, c = q.shape
    q, k = (x.double().reshape(batch, s, heads, c // heads).transpose(1, 2) for x in (q, k))
    return (q @ k.transpose(-1, -2) / (c // heads) ** 0.5).softmax(-1)  # (B, H, S, S)


@pytest.mark.parametrize("heads", [1, 4])
def test_rows_and_columns_equal_the_whole_map(heads: int) -> None:
    q, k = torch.randn(2, 2, 17, 16, generator=torch.Generator().manual_seed(0))
    attention = whole_map(q, k, heads)
    torch.testing.assert_close(cls_row(q, k, heads).double(), attention[:, :, 0, 1:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(received(q, k, heads).double(), attention.mean((1, 2)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cls_logits(q, k, heads).softmax(-1)[..., 1:], cls_row(q, k, heads))


def test_half_precision_is_widened_and_batches_are_free() -> None:
    q, k = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    row = cls_row(q, k, 4)
    assert row.dtype == torch.float32
    assert row.shape == (4, 16)
    torch.testing.assert_close(row, cls_row(q.float(), k.float(), 4))
