"""A second VLM that judges frames, as QuoTA's paper has Qwen2-VL-2B do for a larger model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokprune.adapters.base import get_adapter
from tokprune.adapters.types import Model, Processor
from tokprune.errors import OptionError
from tokprune.runtime.frames.asking import NO, YES, Asking


class VlmScorer:
    """Asks a VLM about single frames in their full size, one prompt each: how likely is "yes" the answer?"""

    def __init__(self, model: Model, processor: Processor) -> None:
        if processor is None or not hasattr(processor, "apply_chat_template"):
            raise OptionError(
                f"scorer=(model, processor) needs the scorer's processor, not {processor!r}; write "
                "scorer=(small_model, AutoProcessor.from_pretrained(...))."
            )
        self.model, self.processor = get_adapter(model).model, processor

    @torch.no_grad()
    def scores(self, pictures: Sequence[object], prompt: str, normalize: str) -> Tensor:
        """P(yes) for each picture (PIL), (T,) in float32. normalize: "pair" or "vocab", as in ScoreOptions."""
        from tokprune.adapters.prompting import build_inputs

        asking = Asking(get_adapter(self.model), self.processor, "scorer", normalize)
        yes, no = asking.letters(YES), asking.letters(NO)
        out = []
        for picture in pictures:
            inputs = build_inputs(self.model, self.processor, prompt, images=[picture])
            out.append(asking.yes(self.model(**inputs).logits[:, -1].float(), yes, no))
        return torch.cat(out)

    def source(self, normalize: str) -> str:
        """How the scores were made, for the report."""
        among = "yes and no" if normalize == "pair" else "the whole vocabulary"
        return f"P(yes) by the scorer {type(self.model).__name__}, among {among}, whole frames"


def load_vlm_scorer(name: str) -> VlmScorer:
    """The scorer "vlm:<hub id or folder>"."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    auto: Model = AutoModelForImageTextToText
    try:
        return VlmScorer(auto.from_pretrained(name, dtype="auto").eval(), AutoProcessor.from_pretrained(name))
    except (OSError, ValueError, ImportError) as error:
        raise OptionError(f"cannot load scorer 'vlm:{name}': {error}") from error
