"""Bytes: what a KV cache holds, what it would hold by arithmetic, and the peak of a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from tokprune.profiling.timing import synchronize
from tokprune.types import ModelConfig

R = TypeVar("R")


def kv_cache_bytes(cache: Iterable[object] | None) -> int:
    """Bytes of all tensors that a transformers cache holds: keys and values of every layer, recurrent states of hybrid
    ones.

    cache: a Cache object, an encoder-decoder pair of caches, or the old tuple of (keys, values). None counts 0.
    """
    if cache is None:
        return 0
    layers = getattr(cache, "layers", None)
    if layers is None:
        pair = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
        if any(part is not None for part in pair):
            return sum(kv_cache_bytes(part) for part in pair)
        layers = list(cache)
    seen: dict[int, int] = {}
    for layer in layers:
        held = layer if isinstance(layer, tuple | list) else vars(layer).values()
        for value in held:
            for tensor in value if isinstance(value, tuple | list) else (value,):
                # Scalars are bookkeeping; a tensor that two layers share counts once.
                if isinstance(tensor, Tensor) and tensor.ndim >= 3:
                    seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def cached_tokens(cache: object) -> list[int]:
    """Tokens that each layer of a transformers cache holds keys of; layers without keys (linear attention) are left
    out."""
    out = []
    for layer in getattr(cache, "layers", None) or (cache if isinstance(cache, tuple | list) else ()):
        keys = layer[0] if isinstance(layer, tuple | list) else getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.ndim == 4:
            out.append(int(keys.shape[-2]))
    return out


def kv_cache_bytes_of(config: ModelConfig, tokens: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of a dynamic cache over `tokens` tokens, by arithmetic from a transformers config.

    Layers with a sliding window of W keep the last W - 1 tokens. Layers of linear attention keep no keys; their state,
    which does not grow, is left out.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * int(text.num_hidden_layers)
    window = getattr(text, "sliding_window", None)
    kept = 0
    for kind in kinds:
        if "linear" in kind or "mamba" in kind:
            continue
        kept += min(tokens, int(window) - 1) if "sliding" in kind and window else tokens
    return 2 * kept * batch * kv_heads * head_dim * dtype.itemsize


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once; meta tensors count as if they were real."""
    held = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


def peak_bytes(call: Callable[[], R], device: torch.device | str) -> tuple[R, int | None]:
    """Run `call()` and return its result with the device's peak of allocated bytes, weights included.

    None on devices that keep no such count (CPU).
    """
    where = torch.device(device)
    if where.type != "cuda":
        return call(), None
    synchronize(where)
    torch.cuda.reset_peak_memory_stats(where)
    result = call()
    synchronize(where)
    return result, int(torch.cuda.max_memory_allocated(where))


def readable(n: float) -> str:
    """A number of bytes for people: '512 B', '3.1 MiB', '14.6 GiB'."""
    units = ("B", "KiB", "MiB", "GiB")
    power = 0
    while power < len(units) - 1 and abs(n) >= 1024:
        n, power = n / 1024, power + 1
    return f"{n:.0f} {units[power]}" if power == 0 or abs(n) >= 1000 else f"{n:.3g} {units[power]}"
