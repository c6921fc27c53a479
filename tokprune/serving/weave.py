"""Clips whose frames are runs of placeholders with words between: the words go into the embeddings.

How many tokens fall on each frame is known only after the encoder, so in the prompt the whole clip is one embedding of
fixed length; this writes the timestamps and tags into it at the places where they fall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokprune.serving.choose import Kept


def staying(ids: Sequence[int], placeholder: int, kept: Kept) -> Tensor:
    """Which tokens of a picture or clip stay. ids: (L,) of the whole, unpruned. -> (L,) bool on the host."""
    tokens = torch.tensor(ids)
    stays = tokens != placeholder
    stays[(~stays).nonzero().flatten()[kept.rows.cpu()]] = True
    return stays


def woven(ids: Sequence[int], placeholder: int, kept: Kept, embed: Callable[[Tensor], Any]) -> Tensor:
    """Embeddings of a clip's words and of its kept tokens, in order.

    embed: token ids (L,) to embeddings (L, D). -> (L', W); the words' columns behind D, DeepStack planes, are 0.
    """
    stays = staying(ids, placeholder, kept)
    tokens = torch.tensor(ids)[stays].to(kept.features.device)
    out = kept.features.new_zeros(len(tokens), kept.features.shape[1])
    words = embed(tokens)
    out[:, : words.shape[1]] = words
    out[tokens == placeholder] = kept.features
    return out
