"""The demo VLM: a small but real LLaVA that comes with the package and answers questions about drawn scenes.

    model, processor = tokprune.demo.load()
    examples = tokprune.demo.held_out(120)
    scorer = tokprune.demo.load_scorer()          # the CLIP that shares its vision tower

It sees 128 px pictures as 256 visual tokens, has a tower with a meaningful [CLS], and has never been trained on pruned
tokens, so its accuracy says something about a pruning method. Importing this module imports neither torch nor
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from .loading import DemoScorer
    from .scenes import Example

__all__ = ["held_out", "load", "load_scorer"]


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The demo VLM, in evaluation mode, and its processor; offline.

    Args:
        device: where the model goes.
        dtype: of its weights, float32 by default.
    """
    import torch

    from .loading import load_model

    return load_model(device=device, dtype=dtype or torch.float32)


def load_scorer(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> DemoScorer:
    """The CLIP that shares the demo VLM's tower: `embed_text(texts)` and `embed_image(pixel_values)`; offline."""
    import torch

    from . import loading

    return loading.load_scorer(device=device, dtype=dtype or torch.float32)


def held_out(n_questions: int, seed: int = 0) -> list[Example]:
    """A balanced list of questions about scenes that the demo VLM was not trained on."""
    from . import scenes

    return scenes.held_out(n_questions, seed)
