"""Opens the demo VLM and its text-image scorer from the files in the package; nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaForConditionalGeneration,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tokprune.errors import missing_extra

WEIGHTS = Path(__file__).parent / "weights"
WEIGHTS_CLIPS = Path(__file__).parent / "weights_clips"
_SCORER_FOLDER = "scorer"
_VLM_TOWER = re.compile(r".*vision_tower\.(vision_model\.)?")  # transformers writes older names than it uses in memory


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None, folder: str | Path | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The demo VLM, in evaluation mode, and its processor; offline.

    Args:
        device: where the model goes.
        dtype: of the weights in memory, float32 by default; the files hold float16.
        folder: an exported model; by default the one in the package.
    """
    return _opened(LlavaForConditionalGeneration, LlavaProcessor, _existing(folder), device, dtype)


def load_clips(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None, folder: str | Path | None = None
) -> tuple[LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor]:
    """The demo VLM for clips, in evaluation mode, and its processor; offline; arguments as in `load`.

    It sees 128 px frames as 64 visual tokens each. Give frames as `videos=[frames]`, (T, H, W, 3) uint8, with
    `do_sample_frames=False`. `load_scorer()` has the same tower.
    """
    if find_spec("torchvision") is None:
        raise missing_extra("torchvision", "video", "the video processor of the demo's clip model")
    folder = _existing(WEIGHTS_CLIPS if folder is None else folder, "train_clips")
    return _opened(LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor, folder, device, dtype)


def _opened(
    model_class: Any, processor_class: Any, folder: Path, device: str | torch.device, dtype: torch.dtype | None
) -> tuple[Any, Any]:
    model = model_class.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
    return model.to(torch.device(device)).eval(), processor_class.from_pretrained(folder, local_files_only=True)


class DemoScorer:
    """The demo VLM's open CLIP: texts and patches in one space, for methods that look at the question.

    It shares the vision tower with the demo VLM, so patch n here is visual token n there. Texts are lower-cased; words
    that the scorer has never seen are left out.
    """

    def __init__(self, clip: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.clip = clip
        self.tokenizer = tokenizer

    @property
    def logit_scale(self) -> float:
        """What the CLIP multiplies cosines by."""
        return float(self.clip.logit_scale.exp())

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Normalised embeddings of texts, (T, E)."""
        if isinstance(texts, str):
            raise TypeError("embed_text takes a list of texts; wrap a single one: embed_text([text])")
        bos, eos, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        room = self.clip.text_model.config.max_position_embeddings - 2
        rows = []
        for text in texts:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            rows.append([bos, *[i for i in ids if i != self.tokenizer.unk_token_id][:room], eos])
        length = max(map(len, rows), default=0)
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=self.clip.device)
        output = self.clip.text_model(input_ids=ids, attention_mask=(ids != pad).long())
        return F.normalize(self.clip.text_projection(output.pooler_output), dim=-1)

    @torch.no_grad()
    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Normalised embeddings of every patch of processed pictures (B, 3, H, W), (B, N, E)."""
        tower = self.clip.vision_model
        hidden = tower(pixel_values=pixel_values.to(self.clip.device, self.clip.dtype)).last_hidden_state
        return F.normalize(self.clip.visual_projection(tower.post_layernorm(hidden[:, 1:])), dim=-1)

    @torch.no_grad()
    def embed_picture(self, pixel_values: Tensor) -> Tensor:
        """One normalised embedding per processed picture (B, 3, H, W), from [CLS], (B, E); for choosing frames."""
        pooled = self.clip.vision_model(pixel_values=pixel_values.to(self.clip.device, self.clip.dtype)).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)


def load_scorer(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None, folder: str | Path | None = None
) -> DemoScorer:
    """The CLIP that shares the demo VLM's tower: `embed_text(texts)` and `embed_image(pixel_values)`; offline.

    Arguments as in `load`. The vision tower comes out of the VLM's own file.
    """
    folder = _existing(folder)
    clip = CLIPModel(CLIPConfig.from_pretrained(folder / _SCORER_FOLDER, local_files_only=True))
    weights = load_file(folder / _SCORER_FOLDER / "model.safetensors")
    for name, value in load_file(folder / "model.safetensors").items():
        if match := _VLM_TOWER.match(name):
            weights["vision_model." + name[match.end() :]] = value
    clip.load_state_dict(weights)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    clip = clip.to(torch.device(device), dtype or torch.float32)  # type: ignore[arg-type]  # a wrapped method
    return DemoScorer(clip.eval(), tokenizer)


def _existing(folder: str | Path | None, trainer: str = "train") -> Path:
    folder = WEIGHTS if folder is None else Path(folder)
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"no demo weights in {folder}; reinstall tokprune, or train them in a checkout: python -m "
            f"tools.demo.{trainer} --out DIR"
        )
    return folder
