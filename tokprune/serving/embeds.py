"""Encode here, serve there: pruned image embeddings for a server that runs with --enable-mm-embeds and no plug-in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.base import flatten, get_adapter
from tokprune.adapters.dialect import parameters
from tokprune.adapters.foreign import HANDLE
from tokprune.config import PruneConfig
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.runtime.choose import choose, kept_rows
from tokprune.runtime.encode import Recorder
from tokprune.runtime.reuse import sources_of
from tokprune.runtime.streams import Encoded, Prompts, build_streams
from tokprune.serving.settings import why_not
from tokprune.serving.signals import KINDS

FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl")
"""Model types whose embeddings a server takes as long as they are."""


@torch.no_grad()
def encode(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    method: str = "divprune",
    *,
    ratio: float | None = None,
    budget: int | None = None,
    **options: Any,
) -> list[Tensor]:
    """The rows that the LLM shall see of each picture, (K + newlines, D) in the model's dtype and on its device.

    model: of transformers, as for `tokprune.apply`, which must not be on it. Only methods that choose by the picture
    alone: the server may answer any question about it. A vLLM 0.32 batch takes embeddings of one length only, so give
    a budget, or pictures of one size; with LLaVA-NeXT and OneVision also pictures of one size, for a newline goes with
    the last token of its line.
    """
    adapter = get_adapter(model)
    kind = adapter.config.model_type
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"embeddings of {kind!r} are not exported. vLLM derives placeholders and M-RoPE positions of Qwen-VL from "
            "the grid that comes with the embeddings: with the true grid shorter ones fail, a made-up one is silently "
            f"wrong. Other families were not tried. Exported: {', '.join(FAMILIES)}. Serve with the plug-in instead: "
            "docs/serving.md."
        )
    if hasattr(adapter.model, HANDLE):
        raise OptionError("tokprune is applied to this model; remove() it first: encode prunes by itself.")
    config = PruneConfig.build(method, ratio=ratio, budget=budget, **options)
    why = why_not(config.methods[0], KINDS)
    if why:
        raise OptionError(f"the method {method!r} cannot be used for export: it {why}.")
    chooser: Any = config.methods[0]
    recorder = Recorder(adapter, chooser.needs)
    recorder.install()
    taken, out = parameters(type(adapter.base).get_image_features), []
    try:
        for image in images:
            read = processor.image_processor(images=[image], return_tensors="pt").to(model.device, model.dtype)
            output = adapter.base.get_image_features(**{name: read[name] for name in read if name in taken})
            features = torch.cat(flatten(output.pooler_output))  # (R, D)
            columns = torch.ones(1, len(features), dtype=torch.bool, device=features.device)
            ids = torch.full_like(columns, adapter.config.image_token_id, dtype=torch.long)
            encoded = Encoded("image", output, columns, sources_of(output))
            (stream,) = build_streams(adapter, encoded, Prompts(ids, [None], ids=ids.cpu()), chooser.needs)
            choose(chooser, [stream], [config.count(len(stream.tokens))])
            slots, keep, _ = kept_rows(stream)
            chosen = stream.selection.apply(features[stream.geometry.rows.to(features.device)])
            features[slots.to(features.device)] = chosen
            out.append(features[keep.to(features.device)])
    finally:
        recorder.remove()
    return out
