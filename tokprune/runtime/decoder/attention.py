"""What a decoder method may ask of a layer's attention: rows made from queries and keys, never a full map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokprune.adapters.dialect import cache_in
from tokprune.adapters.hooks import input_of
from tokprune.adapters.types import Model, ModelCall
from tokprune.errors import UnsupportedModelError
from tokprune.methods.decoder_base import Heads
from tokprune.runtime.attention_row import check_attention, check_tensor_mask, masked, products, projected, rotated

BLOCK = 2**24  # products of queries and keys held at a time


def attention_input(layer: Model, hidden: Tensor, kwargs: ModelCall) -> Tensor:
    """What the attention inside a decoder layer is given when the layer is given `hidden`: behind whatever norm it
    has.
    """
    call = {k: v for k, v in kwargs.items() if k != "hidden_states"}
    args, given = input_of(layer.self_attn, lambda: layer.forward(hidden, **call))
    states: Tensor = given["hidden_states"] if "hidden_states" in given else args[0]
    return states


@dataclass
class LayerInputs:
    """The attention of one layer in this forward, for the whole batch; what is made of it is made when asked for."""

    layer: Model
    hidden: Tensor
    """(B, Q, D) what enters the layer."""
    kwargs: ModelCall
    """The layer's other arguments."""
    used: tuple[Tensor, Tensor] | None = None
    """Keys and values (B, H', K, d) as the layer used them, where it has run."""
    held: int = 0
    """Keys of earlier turns that the layer still holds, where it has not run."""

    @property
    def module(self) -> Model:
        """The layer's attention."""
        check_attention(self.layer.self_attn)
        return self.layer.self_attn

    @cached_property
    def states(self) -> Tensor:
        """(B, Q, D) what its attention is given."""
        return attention_input(self.layer, self.hidden, self.kwargs)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (B or 1, Q, d)."""
        cos, sin = self.kwargs["position_embeddings"]
        return cos, sin

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """All keys and values, those of earlier turns first: (B, H', K, d) each."""
        if self.used is not None:
            return self.used
        cos, sin = (table.to(self.plain_keys.device) for table in self.tables)
        keys = rotated(self.module, self.plain_keys, (cos, sin))
        values = projected(self.module, self.states, "v")
        if not self.held:
            return keys, values
        before = cache_in(self.kwargs).layers[self.module.layer_idx]
        if before.keys is None or before.keys.shape[-2] != self.held:
            raise UnsupportedModelError(
                f"{type(before).__name__} does not show the keys of earlier turns, to which this method's attention "
                "reaches as well; use the default cache (DynamicCache)."
            )
        pairs = ((before.keys, keys), (before.values, values))
        return tuple(torch.cat([b.to(new.device), new], 2) for b, new in pairs)  # type: ignore[return-value]

    @cached_property
    def plain_keys(self) -> Tensor:
        """Keys of this call before rotation, (B, H', Q, d)."""
        return projected(self.module, self.states, "k")


@dataclass(frozen=True)
class RowAttention:
    """Attention of one layer over the tokens of one prompt (a `LayerAttention`). Places count from `start`.

    Queries may lie on any device, and what comes of them is on `device`: the layers of a model may be on several.
    """

    inputs: LayerInputs
    row: int
    start: int
    """Filler on the left."""
    n: int
    device: torch.device

    @property
    def keys(self) -> Tensor:
        """(H', n, d)."""
        return self._own(self.inputs.pairs[0])

    @property
    def plain_keys(self) -> Tensor:
        """(H', n, d)."""
        return self.inputs.plain_keys[self.row, :, self.start : self.start + self.n].to(self.device)

    @property
    def values(self) -> Tensor:
        """(H', n, d)."""
        return self._own(self.inputs.pairs[1])

    def weights(self, queries: Tensor, heads: Heads = "mean", rotary: bool = True) -> Tensor:
        """(R, n), or (H, R, n)."""
        blocks = [self._heads(p, heads) for p in self._blocks(queries, False, rotary)]
        return torch.cat(blocks, -2)

    def logits(self, queries: Tensor, heads: Heads = "mean") -> Tensor:
        """(R, n), or (H, R, n)."""
        return torch.cat([self._heads(p, heads) for p in self._blocks(queries, True)], -2)

    def sums(self, queries: Tensor, heads: Heads = "mean", logits: bool = False) -> Tensor:
        """(n,), or (H, n)."""
        total: Tensor | int = 0
        for block in self._blocks(queries, logits):
            total = total + self._heads(block, heads).sum(-2)
        return total  # type: ignore[return-value]

    def gravity(self, queries: Tensor) -> Tensor:
        """(R, n)."""
        cos, sin = self._tables(torch.arange(self.n, device=self.inputs.tables[0].device))
        ones = torch.ones(1, 1, self.n, self.inputs.module.head_dim, dtype=cos.dtype, device=cos.device)
        turned = rotated(self.inputs.module, ones, (cos, sin))
        chosen = turned[:, :, queries.to(turned.device)]
        return products(chosen, turned, self.inputs.module.scaling)[0, 0].to(self.device)

    # -- how

    @staticmethod
    def _heads(block: Tensor, heads: Heads) -> Tensor:
        """(H, R, n) -> (R, n), or as it is."""
        if heads == "each":
            return block
        return block.mean(0) if heads == "mean" else block.amax(0)

    def _own(self, pairs: Tensor) -> Tensor:
        """Of keys or values of the whole batch, those of this prompt's n tokens."""
        first = pairs.shape[2] - self.inputs.hidden.shape[1] + self.start
        return pairs[self.row, :, first : first + self.n].to(self.device)

    def _tables(self, places: Tensor) -> tuple[Tensor, Tensor]:
        at = self.start + places.to(self.inputs.tables[0].device)
        cos, sin = (t[min(self.row, t.shape[0] - 1)][None, at].to(places.device) for t in self.inputs.tables)
        return cos, sin

    def _blocks(self, queries: Tensor, logits: bool, rotary: bool = True) -> Iterator[Tensor]:
        """Products or probabilities of some queries at a time, (H, R', n)."""
        module, row, queries = self.inputs.module, self.row, queries.to(self.inputs.states.device)
        query = projected(module, self.inputs.states[row : row + 1, self.start + queries], "q")  # (1, H, R, d)
        if rotary:
            query = rotated(module, query, self._tables(queries))
            keys = self.inputs.pairs[0][row : row + 1]  # (1, H', K, d)
        else:
            keys = self.inputs.plain_keys[row : row + 1]
            if self.inputs.pairs[0].shape[2] != keys.shape[2]:
                raise UnsupportedModelError(
                    "attention without positions is asked for, but keys of earlier turns are in the cache with theirs; "
                    "start with a new cache, or use a method (or option) that reads attention with positions."
                )
        keys, cap = keys.float(), getattr(module, "attn_logit_softcapping", None)
        first = keys.shape[2] - self.inputs.hidden.shape[1] + self.start
        size = max(1, BLOCK // max(query.shape[1] * keys.shape[2], 1))
        for some, at in zip(query.split(size, 2), queries.split(size), strict=True):
            block = products(some, keys, module.scaling, None if logits else cap)
            if not logits:
                block = masked(block, self._mask(at, keys.shape[2]))  # frees the products
                block = block.softmax(-1)
            yield block[0, :, :, first : first + self.n].to(self.device)

    def _mask(self, queries: Tensor, keys: int) -> Tensor:
        """What the queries may see: (1, 1 or H, R, K) bool or additive."""
        mask = self.inputs.kwargs.get("attention_mask")
        check_tensor_mask(mask)
        places = self.start + queries
        if mask is not None and mask.ndim == 4:
            return mask[min(self.row, mask.shape[0] - 1), :, places.to(mask.device)][None, ..., -keys:]
        numbers = torch.arange(keys, device=queries.device)
        seen = numbers <= places[:, None] + keys - self.inputs.hidden.shape[1]  # (R, K)
        if mask is not None:
            seen = seen & mask[min(self.row, mask.shape[0] - 1), -keys:].bool().to(seen.device)
        return seen[None, None]
