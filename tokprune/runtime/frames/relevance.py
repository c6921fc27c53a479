"""How close frames are to a question, by a text-image scorer, before any of them goes through a VLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokprune.adapters.tower_parts import normalisation
from tokprune.adapters.types import Processor, Scorer
from tokprune.errors import MissingSignalError, OptionError
from tokprune.runtime.frames.scores import PICTURES_AT_ONCE, question_sentence

SIDE = 224  # pixels of the frames where the scorer scales them by itself


def embed_frames(frames: npt.NDArray[np.uint8], scorer: Scorer, processor: Processor = None) -> Tensor:
    """One normalised embedding per frame, (T, E). frames: (T, H, W, 3) uint8.

    processor: of the VLM whose pixels the scorer expects, for scorers that do not say how theirs are normalised
    (`mean`, `std`).
    """
    if not hasattr(scorer, "embed_picture"):
        raise MissingSignalError(
            f"{type(scorer).__name__} has no embed_picture(pixels), so it cannot compare frames with a question; give "
            '"open_clip:ViT-B-32/laion2b_s34b_b79k" or an object that has.'
        )
    mean, std, size = _expected(scorer, processor)
    parts = []
    for start in range(0, len(frames), PICTURES_AT_ONCE):
        some = torch.from_numpy(np.ascontiguousarray(frames[start : start + PICTURES_AT_ONCE]))
        pixels = some.permute(0, 3, 1, 2).float() / 255
        if size is not None:
            pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        parts.append(scorer.embed_picture((pixels - mean) / std).float().cpu())
    return torch.cat(parts)


def frame_relevance(features: Tensor, question: str | Sequence[str], scorer: Scorer) -> Tensor:
    """Cosine of each frame with a question, or with the nearest of several texts, (T,). features: of `embed_frames`."""
    texts = [question_sentence(question)] if isinstance(question, str) else list(question)
    if not texts or not all(texts):
        raise OptionError("frames are compared with a question, and there is none.")
    return (features @ scorer.embed_text(texts).float().cpu().T).amax(1)


def _expected(scorer: Scorer, processor: Processor) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """Mean, deviation and, where the scorer does not scale by itself, size of the pixels that it takes."""
    mean, std = getattr(scorer, "mean", None), getattr(scorer, "std", None)
    size: tuple[int, int] | None = None
    if mean is None or std is None:
        normal = normalisation(processor)
        if normal is None:
            raise OptionError(
                f"{type(scorer).__name__} does not say how its pixels are normalised (mean, std), and neither does a "
                "processor; give the processor of the VLM that it belongs to."
            )
        mean, std = normal
        image = getattr(processor, "image_processor", processor)
        crop: Any = getattr(image, "crop_size", None) or getattr(image, "size", None)
        height, width = (crop.get(k) if hasattr(crop, "get") else getattr(crop, k, None) for k in ("height", "width"))
        size = (int(height), int(width)) if height and width else (SIDE, SIDE)
    mean, std = (torch.as_tensor(v).float().reshape(-1, 1, 1).cpu() for v in (mean, std))
    return mean, std, size
