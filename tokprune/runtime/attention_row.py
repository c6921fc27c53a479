"""What the newest token pays to every key of one decoder layer, without the attention map: O(keys), any attention
kernel.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from tokprune.adapters.dialect import CACHE, cache_name, tested_versions
from tokprune.adapters.types import Model
from tokprune.errors import UnsupportedModelError


def check_attention(attention: Model) -> None:
    """Refuse an attention module whose queries cannot be made again from its projections."""
    if not hasattr(attention, "q_proj") or not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
        raise UnsupportedModelError(
            f"{type(attention).__name__} has no q_proj with rotary embedding, so what a token attends to cannot be "
            "read from it."
        )
    if cache_name(type(attention).forward) is None:
        raise UnsupportedModelError(
            f"{type(attention).__name__} names no KV cache ({' or '.join(CACHE)}), so what it reads cannot be "
            f"narrowed. Known to work: {tested_versions()}."
        )


def newest_query(attention: Model, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """The query of the last token as it meets the keys: (B, H, 1, d). hidden: (B, N, D) that the module was given.

    positions: cosine and sine of the rotary embedding, (B or 1, N, d).
    """
    newest = hidden[:, -1:]
    query = attention.q_proj(newest)
    norm, size = getattr(attention, "q_norm", None), attention.head_dim
    heads = attention.config.num_attention_heads
    if query.shape[-1] == 2 * heads * size:  # Qwen3.5 projects a gate beside each head
        query = query.unflatten(-1, (heads, 2, size))[..., 0, :]
    elif norm is None or norm.weight.shape[-1] == size:
        query = query.unflatten(-1, (heads, size))
    query = query if norm is None else norm(query)
    query = query.reshape(query.shape[0], heads, 1, size)
    # Cohere 2 rotates in its sliding layers only.
    if type(attention).__name__.startswith("Cohere2") and attention.sliding_window is None:
        return query
    cos, sin = (t[:, -1:] for t in positions)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    rotated: Tensor = rotate(query, query, cos, sin)[0]
    return rotated


def check_tensor_mask(mask: object) -> None:
    """Refuse the mask object of a kernel that takes no tensors, such as flex attention's."""
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedModelError(
            "this method reads and cuts masks that are tensors, and the model's attention kernel has a "
            f"{type(mask).__name__}: call "
            'model.set_attn_implementation("sdpa").'
        )


def attention_row(
    query: Tensor, keys: Tensor, scale: float, mask: Tensor | None, softcap: float | None = None
) -> Tensor:
    """Attention of one query per row to all keys, softmax in float32, mean over heads. -> (B, n).

    query: (B, H, 1, d). keys: (B, H', n, d); H' divides H. mask: None, (B, n) true or non-zero where visible, or
    (B or 1, 1, 1, n) bool or additive. Grouped keys are not repeated.
    """
    check_tensor_mask(mask)
    batch, groups, n, size = keys.shape
    rows = query.to(keys.device).reshape(batch, groups, -1, size).float()  # (B, H', H / H', d)
    logits = rows @ keys.float().transpose(-1, -2) * scale  # (B, H', H / H', n)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        mask = mask.to(keys.device)
        mask = mask[:, None, None, -n:].bool() if mask.ndim == 2 else mask[:, :, -1:, -n:]
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -torch.inf)
        else:
            logits = logits + mask.float()
    return logits.softmax(-1).mean((1, 2))
