"""Answers of transformers with tokprune on the same checkpoints: what vLLM's must be equal to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import tokprune
from tests.serving.checkpoints import TOKENS, requests
from tokprune.adapters.families import FAMILIES as REGISTERED
from tokprune.adapters.families.tiny import BYTES
from tokprune.testing import TinyVLM
from tokprune.testing.tiny import Spec


def load(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> TinyVLM:
    """A checkpoint of `checkpoints.build`."""
    marks = REGISTERED[family].tiny(family)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / family, dtype=dtype).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder / family)
    return TinyVLM(family, model, processor, Spec(marks.image, marks.video))


def greedy(tiny: TinyVLM, **inputs: Any) -> list[int]:
    """TOKENS bytes."""
    vocabulary = tiny.model.config.get_text_config().vocab_size
    told = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "suppress_tokens": list(range(BYTES, vocabulary))}
    with torch.no_grad():
        out: Tensor = tiny.model.generate(**inputs, **told, do_sample=False)
    return out[0, -TOKENS:].tolist()


def answers(
    tiny: TinyVLM, kind: str, ratio: float | None, method: str = "divprune", **options: Any
) -> list[dict[str, Any]]:
    """Prompt length and answer of every request. ratio: None for the model without tokprune."""
    out = []
    for parts in requests(kind, tiny.family):
        inputs = tiny.chat([parts])
        inputs = {k: v.to(tiny.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        length = inputs["input_ids"].shape[1]
        if ratio is None or all(isinstance(part, str) for part in parts):
            out.append({"prompt": length, "tokens": greedy(tiny, **inputs)})
            continue
        with tokprune.apply(tiny.model, method, ratio=ratio, processor=tiny.processor, **options) as pruning:
            if tiny.family in ("llava_next", "llava_onevision"):
                with torch.no_grad():
                    tiny.model(**inputs)
                streams = list(pruning.last.streams)
            else:
                tokens = greedy(tiny, **inputs)
                dropped = sum(stream.total - stream.kept for stream in pruning.last.streams)
                out.append({"prompt": length - dropped, "tokens": tokens})
                continue
        out.append(with_all_newlines(tiny, inputs, streams))
    return out


def with_all_newlines(tiny: TinyVLM, inputs: Any, streams: list[Any]) -> dict[str, Any]:
    """The answer where all newlines stay, from embeddings put together by hand."""
    ids = inputs["input_ids"]
    video = "pixel_values_videos" in inputs
    config = tiny.model.config
    visual = ids[0] == (config.video_token_index if video else config.image_token_index)
    with torch.no_grad():
        if video:
            found = tiny.model.model.get_video_features(inputs["pixel_values_videos"])
        else:
            found = tiny.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        features = torch.cat([x.flatten(0, -2) for x in found.pooler_output])
        embedded = tiny.model.get_input_embeddings()(ids)[0]
    rows, start = [], 0
    for stream in streams:
        geometry, selection = stream.geometry, stream.selection
        candidates = start + geometry.rows
        chosen = candidates[selection.indices]
        features[chosen] = selection.apply(features[candidates])  # some methods merge
        rows += [chosen, start + geometry.separators]
        start += geometry.total
    kept = torch.cat(rows)
    embedded[visual.nonzero().flatten()[kept]] = features[kept]
    columns = ~visual
    columns[visual.nonzero().flatten()[kept]] = True
    prompt = embedded[columns][None]
    mask = torch.ones(prompt.shape[:2], dtype=torch.long)
    return {"prompt": prompt.shape[1], "tokens": greedy(tiny, inputs_embeds=prompt, attention_mask=mask)}
