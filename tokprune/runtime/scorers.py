"""Scorers: a CLIP that compares the question with patches or frames, for models whose own tower cannot, and a second
VLM that is asked about frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tokprune.adapters.base import get_adapter
from tokprune.adapters.tower_parts import normalisation
from tokprune.adapters.types import Model, Processor, Scorer
from tokprune.errors import MissingSignalError, OptionError, missing_extra, unknown
from tokprune.runtime.frames.asking import AMONG, Asking

# How a tower's pixels are normalised when its processor does not say (the values of OpenAI's CLIP).
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class OpenClipScorer:
    """An open_clip model that embeds texts and patches in one space.

    Pictures arrive as another tower's processor normalised them: (U, 3, H, W) with `mean` and `std`; they are brought
    to the scorer's own normalisation and size. A patch is the hidden state of block `block`, through the final norm and
    the visual projection, as CDPruner takes it (second block from the end).
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Processor,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        block: int = -2,
    ) -> None:
        visual = model.visual
        missing = [
            n for n in ("forward_intermediates", "ln_post", "proj", "transformer") if getattr(visual, n, None) is None
        ]
        if missing:
            raise MissingSignalError(
                f"the image tower {type(visual).__name__} gives no projected patches ({', '.join(missing)} missing); "
                "take a ViT of open_clip's own, such as open_clip:ViT-B-32/laion2b_s34b_b79k."
            )
        self.model, self.tokenizer, self.block = model, tokenizer, block
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Normalised embeddings of texts, (T, E)."""
        device = next(self.model.parameters()).device
        return F.normalize(self.model.encode_text(self.tokenizer(list(texts)).to(device)).float(), dim=-1)

    @torch.no_grad()
    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Normalised embeddings of the patches of pictures (U, 3, H, W), (U, N, E) in raster order."""
        visual = self.model.visual
        block = self.block % len(visual.transformer.resblocks)
        seen = visual.forward_intermediates(
            self._pixels(pixel_values), indices=[block], intermediates_only=True, output_fmt="NLC"
        )
        hidden = seen["image_intermediates"][-1]  # (U, N, width), special tokens cut
        return F.normalize((visual.ln_post(hidden) @ visual.proj).float(), dim=-1)

    @torch.no_grad()
    def embed_picture(self, pixel_values: Tensor) -> Tensor:
        """One normalised embedding per picture (U, 3, H, W), (U, E): what the model compares with texts; for choosing
        frames.
        """
        return F.normalize(self.model.encode_image(self._pixels(pixel_values)).float(), dim=-1)

    @property
    def logit_scale(self) -> float:
        """What the model multiplies cosines by."""
        return float(self.model.logit_scale.exp())

    @property
    def logit_bias(self) -> float | None:
        """What a SigLIP model adds to them, None for a CLIP."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias)

    def _pixels(self, pixel_values: Tensor) -> Tensor:
        """Another tower's pixels as this model takes them."""
        visual = self.model.visual
        weight = next(visual.parameters())
        pixels = pixel_values.to(weight.device).float()
        pixels = (pixels * self.std.to(pixels.device) + self.mean.to(pixels.device)).clamp(0, 1)
        size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size, visual.image_size)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        mean = getattr(visual, "image_mean", None) or CLIP_MEAN
        std = getattr(visual, "image_std", None) or CLIP_STD
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (mean, std))
        return ((pixels - mean) / std).to(weight.dtype)


class VlmScorer:
    """A second VLM that judges frames, as QuoTA's paper has Qwen2-VL-2B do for a larger model.

    It is asked about single frames in their full size, one prompt each: how likely is "yes" the answer?
    """

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
        out = []
        for picture in pictures:
            inputs = build_inputs(self.model, self.processor, prompt, images=[picture])
            out.append(asking.yes(self.model(**inputs).logits[:, -1].float()))
        return torch.cat(out)

    def source(self, normalize: str) -> str:
        """How the scores were made, for the report."""
        return f"P(yes) by the scorer {type(self.model).__name__}, among {AMONG[normalize]}, whole frames"


def load_scorer(name: str, processor: Processor = None) -> Scorer:
    """The scorer that a string names: "open_clip:<model>/<weights>", weights being a tag of open_clip or a file;
    "demo"; or "vlm:<hub id or folder>".

    processor: of the VLM, for how its pixels are normalised.
    """
    kind, _, rest = name.partition(":")
    if kind == "demo" and not rest:
        import importlib

        return importlib.import_module("tokprune.demo").load_scorer()
    if kind == "vlm" and rest:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        auto: Model = AutoModelForImageTextToText
        try:
            return VlmScorer(auto.from_pretrained(rest, dtype="auto").eval(), AutoProcessor.from_pretrained(rest))
        except (OSError, ValueError, ImportError) as error:
            raise OptionError(f"cannot load scorer {name!r}: {error}") from error
    if kind != "open_clip" or not rest:
        raise OptionError(
            f'scorer {name!r} is not known; write scorer="open_clip:ViT-B-32/laion2b_s34b_b79k", scorer="demo" for the '
            'embedded demo VLM, scorer="vlm:<hub id or folder>" for a VLM that is asked about frames, or pass an '
            "object with embed_text and embed_image."
        )
    try:
        import open_clip
    except ImportError:
        raise missing_extra("open-clip-torch", "vision", f"scorer={name!r}") from None
    architecture, _, weights = rest.partition("/")
    if architecture not in open_clip.list_models():
        raise unknown("open_clip model", architecture, open_clip.list_models())
    try:
        model = open_clip.create_model(architecture, pretrained=weights or None, require_pretrained=bool(weights))
    except (RuntimeError, OSError, ValueError) as error:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise OptionError(f"cannot load {name!r}: {error} Weights of {architecture}: {tags}, or a file.") from error
    mean, std = normalisation(processor) or (CLIP_MEAN, CLIP_STD)
    return OpenClipScorer(model.eval(), open_clip.get_tokenizer(architecture), mean, std)
