"""Readers of attention modules that project, norm or turn in a way of their own; `tower_kinds.reader_of` chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.adapters.tower_parts import AttentionReader, Heads
from tokprune.adapters.types import ModelCall
from tokprune.errors import MissingSignalError


class Gemma4Reader(AttentionReader):
    """Gemma 4: values are normed, too, and each half of a head is turned by its own coordinate."""

    def watched(self) -> dict[str, nn.Module]:
        return {**super().watched(), "v_norm": self.attention.get_submodule("v_norm")}

    def read(self, seen: Mapping[str, Tensor]) -> Heads:
        q, k, _ = super().read(seen)
        return q, k, seen["v_norm"].transpose(1, 2)

    def turn(self, x: Tensor, positions: Any) -> Tensor:
        parts = zip(x.chunk(2, -1), *(p.chunk(2, -1) for p in positions), strict=True)
        return torch.cat([super(Gemma4Reader, self).turn(half, table) for half, *table in parts], -1)


class Llama4Reader(AttentionReader):
    """Llama 4: [CLS] stands behind the patches and is read as the first token; pairs of channels turn as complex
    numbers."""

    def read(self, seen: Mapping[str, Tensor]) -> Heads:
        q, k, v = (x.roll(1, 2) for x in super().read(seen))
        return q, k, v

    def positions(self, call: ModelCall) -> object:
        return call.get("freqs_ci")

    def check_positions(self, positions: object) -> None:
        if not isinstance(positions, Tensor):
            raise MissingSignalError(f"{type(self.attention).__name__} was called without its rotary table.")

    def turn(self, x: Tensor, positions: Any) -> Tensor:
        angles = positions.flatten(0, -2).roll(1, 0).to(x.device)  # (N, d / 2)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)  # real angles where the model was cast


READERS: dict[str, type[AttentionReader]] = {
    "Gemma4VisionAttention": Gemma4Reader,
    "Llama4VisionAttention": Llama4Reader,
}
"""By the class of the attention."""


def attention_reader(attention: nn.Module) -> AttentionReader | None:
    """The reader of an attention module; None where its logits are more than queries times keys."""
    if hasattr(attention, "rel_pos_h") or hasattr(attention, "relative_position_bias_table"):  # positions per query
        return None
    return READERS.get(type(attention).__name__, AttentionReader)(attention)
