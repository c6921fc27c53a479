"""What chosen tokens pay to every key of one decoder layer, without the attention map: O(keys) a token, any attention
kernel.
"""

from __future__ import annotations

import sys
from typing import Literal

import torch
from torch import Tensor

from tokprune.adapters.dialect import CACHE, bind, cache_name, parameters, tested_versions
from tokprune.adapters.types import Model, ModelCall, Positional
from tokprune.errors import UnsupportedModelError

KERNELS = ("eager", "sdpa", "flash")  # attention implementations whose masks can be cut


def check_kernel(kernel: str, stage: str) -> None:
    """Refuse an attention implementation whose masks cannot be cut."""
    if not any(kernel.startswith(known) or f"/{known}" in kernel for known in KERNELS):
        raise UnsupportedModelError(
            f"attention {kernel!r} builds masks that cannot be cut to the chosen keys; load the model with "
            f'attn_implementation="sdpa", "eager" or "flash_attention_2" for methods of the {stage} stage.'
        )


def check_attention(attention: Model) -> None:
    """Refuse an attention module whose queries cannot be made again from its projections."""
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    known = rotate is not None and parameters(rotate)[:4] == ("q", "k", "cos", "sin")
    if not known or not hasattr(attention, "q_proj") or not hasattr(attention, "head_dim"):
        raise UnsupportedModelError(
            f"{type(attention).__name__} has no q_proj with a rotary embedding of queries and keys, so what a token "
            "attends to cannot be read from it."
        )
    if "position_embeddings" not in parameters(type(attention).forward):
        raise UnsupportedModelError(
            f"{type(attention).__name__} is not given its rotary embedding (position_embeddings), so what a token "
            "attends to cannot be read from it."
        )
    if cache_name(type(attention).forward) is None:
        raise UnsupportedModelError(
            f"{type(attention).__name__} names no KV cache ({' or '.join(CACHE)}), so what it reads cannot be "
            f"narrowed. Known to work: {tested_versions()}."
        )


def projected(attention: Model, hidden: Tensor, kind: Literal["q", "k", "v"]) -> Tensor:
    """Queries, keys or values behind their norm and before rotation: (B, H, N, d). hidden: (B, N, D) that the module
    was given.
    """
    states = getattr(attention, f"{kind}_proj")(hidden)
    norm, size = getattr(attention, f"{kind}_norm", None), attention.head_dim
    heads = attention.config.num_attention_heads if kind == "q" else states.shape[-1] // size
    if states.shape[-1] == 2 * heads * size:  # Qwen3.5 projects a gate beside each head
        states = states.unflatten(-1, (heads, 2, size))[..., 0, :]
    elif norm is None or norm.weight.shape[-1] == size:
        states = states.unflatten(-1, (heads, size))
    states = states if norm is None else norm(states)
    return states.reshape(*hidden.shape[:2], heads, size).transpose(1, 2)


def rotated(attention: Model, states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (B, H, N, d) as they meet each other. positions: cosine and sine of the rotary embedding, (B or
    1, N, d).
    """
    # Cohere 2 rotates in its sliding layers only.
    if type(attention).__name__.startswith("Cohere2") and attention.sliding_window is None:
        return states
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    turned: Tensor = rotate(states, states, *positions)[0]
    return turned


def newest_query(attention: Model, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """The query of the last token as it meets the keys: (B, H, 1, d). hidden: (B, N, D) that the module was given."""
    cos, sin = (t[:, -1:] for t in positions)
    return rotated(attention, projected(attention, hidden[:, -1:], "q"), (cos, sin))


def check_tensor_mask(mask: object) -> None:
    """Refuse the mask object of a kernel that takes no tensors, such as flex attention's."""
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedModelError(
            "this method reads and cuts masks that are tensors, and the model's attention kernel has a "
            f'{type(mask).__name__}: call model.set_attn_implementation("sdpa").'
        )


def products(query: Tensor, keys: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Scaled products in float32, before any mask: (B, H, R, n).

    query: (B, H, R, d). keys: (B, H', n, d); H' divides H. Grouped keys are not repeated.
    """
    batch, groups, n, size = keys.shape
    rows = query.to(keys.device).reshape(batch, groups, -1, size).float()  # (B, H', H / H' * R, d)
    logits = rows @ keys.float().transpose(-1, -2) * scale  # (B, H', H / H' * R, n)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.reshape(batch, query.shape[1], -1, n)


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Products (B, H, R, n) where the mask shows them. mask: None, (B, n) true or non-zero where visible, or one of
    (B or 1, 1 or H, R, n) bool or additive.
    """
    if mask is None:
        return logits
    mask = mask.to(logits.device)
    mask = mask[:, None, None].bool() if mask.ndim == 2 else mask
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    return logits + mask.float()


def attention_row(
    query: Tensor, keys: Tensor, scale: float, mask: Tensor | None, softcap: float | None = None
) -> Tensor:
    """Attention of one query per row to all keys, softmax in float32, mean over heads. -> (B, n).

    query: (B, H, 1, d). keys: (B, H', n, d). mask: None, (B, n), or (B or 1, 1, 1, n); its last n keys count.
    """
    check_tensor_mask(mask)
    n = keys.shape[2]
    if mask is not None:
        mask = mask[:, -n:] if mask.ndim == 2 else mask[:, :, -1:, -n:]
    return masked(products(query, keys, scale, softcap), mask).softmax(-1).mean((1, 2))


def newest_row(attention: Model, args: Positional, kwargs: ModelCall, keys: Tensor | None) -> Tensor:
    """What the newest token of a call of an attention module pays to each key, as of `attention_row`. -> (B, n).

    keys: (B, H', n, d) that the module used; None: those of this call alone.
    """
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    named = kwargs if "position_embeddings" in kwargs else bind(attention, args, kwargs)
    positions = named["position_embeddings"]
    if keys is None:
        keys = rotated(attention, projected(attention, hidden, "k"), positions)
    cap = getattr(attention, "attn_logit_softcapping", None)
    query = newest_query(attention, hidden, positions)
    return attention_row(query, keys, attention.scaling, kwargs.get("attention_mask"), cap)
