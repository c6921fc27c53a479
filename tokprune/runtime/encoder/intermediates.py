"""timm's forward_intermediates under a splice: the feature maps of shortened blocks, at full length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokprune.adapters.types import Original
    from tokprune.runtime.encoder.engine import Splice
    from tokprune.runtime.encoder.run import R

NAME = "forward_intermediates"


def forward_intermediates(  # timm's own arguments
    original: Original,
    splice: Splice[R],
    x: Tensor,
    indices: int | list[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
    **more: object,
) -> object:
    """What `original`, the method of a timm vision transformer, returns; it would reshape shortened sequences itself.

    The arguments behind `splice` are timm's, by its names and in its order.
    """
    from timm.models._features import feature_take_indices

    prefix, model = splice.tower.prefix, splice.tower.root
    taken, _ = feature_take_indices(len(splice.tower.blocks), indices)
    final, maps = original(
        x, indices, return_prefix_tokens=prefix > 0, norm=norm, stop_early=stop_early, output_fmt="NLC", **more
    )
    heads, bodies = [], []
    for block, item in zip(sorted(set(taken)), maps, strict=True):
        whole = splice.full_length(block, torch.cat([item[1], item[0]], 1) if prefix else item)
        body = whole[:, prefix:]
        if output_fmt == "NCHW":
            height, width = model.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
            body = body.reshape(len(body), height, width, -1).permute(0, 3, 1, 2).contiguous()
        heads.append(whole[:, :prefix])
        bodies.append(body)
    with_prefix = prefix > 0 and return_prefix_tokens
    if output_dict:
        named: dict[str, object] = {"image_intermediates": bodies}
        if with_prefix:
            named["image_intermediates_prefix"] = heads
        return named if intermediates_only else {**named, "image_features": final}
    listed = list(zip(bodies, heads, strict=True)) if with_prefix else bodies
    return listed if intermediates_only else (final, listed)


def widen_listed(output: Any, splice: Splice[R], run: R) -> None:
    """Bring the hidden states that a model lists in its output to full length; the last one has it already.

    Their own length does not tell: where one picture of a batch keeps all its rows, the shortened others are as long.
    """
    states, last = output.get("hidden_states") if hasattr(output, "keys") else None, len(splice.tower.blocks)
    if states is None or len(states) != last + 1:
        return

    def wide(i: int, h: Tensor) -> bool:
        whole = run.entered(-1) == h.data_ptr() if splice.pixels is not None else h.shape[-2] == run.tokens
        return i == last or (i == 0 and whole)  # some models list what enters the first block as it was

    listed = tuple(
        h if h is None or id(h) in run.listed or wide(i, h) else splice.widen(run, run.states[i], h)
        for i, h in enumerate(states)
    )
    run.listed = frozenset(map(id, listed))  # an encoder and the model around it both list them
    output["hidden_states"] = listed
