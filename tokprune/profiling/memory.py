"""Bytes: what a KV cache holds, what it would hold by arithmetic, weights, and the peak of live tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokprune.profiling.formulas import DecoderShape
from tokprune.types import JsonObject, ModelConfig

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
    """Tokens that each layer of a transformers cache holds keys of; layers of linear attention are left out."""
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
    shape = DecoderShape.of(config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * shape.layers
    window = getattr(text, "sliding_window", None)
    kept = 0
    for kind in kinds:
        if "linear" in kind or "mamba" in kind:
            continue
        kept += min(tokens, int(window) - 1) if "sliding" in kind and window else tokens
    return 2 * kept * batch * shape.kv_heads * shape.head_dim * dtype.itemsize


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once; meta tensors count as if they were real."""
    held = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive while the context is open, for devices whose allocator keeps no count
    (CPU): what `torch.cuda.max_memory_allocated` is to a GPU. peak: the most at any moment.

    Each storage counts once, however many views it has. Scratch memory inside one operator is not seen; nor is anything
    that is not a tensor (Python, libraries).
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """existing: tensors that live already, such as weights and inputs; they count from the start."""
        super().__init__()
        self.now = self.peak = 0
        self._held: set[int] = set()
        for tensor in existing:
            self._add(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: JsonObject | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse: its indices and values were counted when they were made
            return
        key = storage._cdata
        if key in self._held:
            return
        self._held.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


def live_peak(call: Callable[[], R], existing: Iterable[Tensor] = ()) -> tuple[R, int]:
    """Run `call()` and return its result with the peak of live tensor bytes, `existing` tensors included."""
    with LiveBytes(existing) as mode:
        result = call()
    return result, mode.peak


def readable(n: float) -> str:
    """A number of bytes for people: '512 B', '3.1 MiB', '14.6 GiB'."""
    units = ("B", "KiB", "MiB", "GiB")
    power = 0
    while power < len(units) - 1 and abs(n) >= 1024:
        n, power = n / 1024, power + 1
    return f"{n:.0f} {units[power]}" if power == 0 or abs(n) >= 1000 else f"{n:.3g} {units[power]}"
