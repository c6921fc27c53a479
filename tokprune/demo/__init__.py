"""The demo VLM: a small but real LLaVA that comes with the package and answers questions about drawn scenes.

    model, processor = tokprune.demo.load()
    examples = tokprune.demo.held_out(120)
    scorer = tokprune.demo.load_scorer()          # the CLIP that shares its vision tower
    model, processor = tokprune.demo.load_clips()  # its sibling for clips, with the same tower

It sees 128 px pictures as 256 visual tokens, has a tower with a meaningful [CLS], and has never been trained on pruned
tokens, so its accuracy says something about a pruning method. Importing this module imports neither torch nor
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaNextVideoForConditionalGeneration,
        LlavaNextVideoProcessor,
        LlavaProcessor,
    )

    from .clips import ClipExample
    from .loading import DemoScorer
    from .scenes import Example

__all__ = ["held_out", "held_out_clips", "load", "load_clips", "load_scorer"]


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


def load_clips(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor]:
    """The demo VLM for clips, in evaluation mode, and its processor; offline.

    It sees 128 px frames as 64 visual tokens each. Give frames as `videos=[frames]`, (T, H, W, 3) uint8, with
    `do_sample_frames=False`. `load_scorer()` has the same tower.

    Args:
        device: where the model goes.
        dtype: of its weights, float32 by default.
    """
    import torch

    from .loading import load_clip_model

    return load_clip_model(device=device, dtype=dtype or torch.float32)


def load_scorer(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> DemoScorer:
    """The CLIP that shares the demo VLM's tower: `embed_text(texts)` and `embed_image(pixel_values)`; offline."""
    import torch

    from . import loading

    return loading.load_scorer(device=device, dtype=dtype or torch.float32)


def held_out(n_questions: int, seed: int = 0) -> list[Example]:
    """A balanced list of questions about scenes that the demo VLM was not trained on."""
    from . import scenes

    return scenes.held_out(n_questions, seed)


def held_out_clips(
    questions: int, seed: int = 0, folder: str | Path = "clips", long: bool = False
) -> list[ClipExample]:
    """A balanced list of questions about clips that the model was not trained on; writes the mp4 files to `folder`.

    long: clips of 16 to 32 scenes with questions about the one that has a color or shape of its own, instead of 3 to 8
    scenes.
    """
    from . import clips

    return clips.held_out_clips(questions, seed, folder, long)
