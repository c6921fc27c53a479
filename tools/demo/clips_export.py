"""Stage "export" of the clip model: one LlavaNextVideoForConditionalGeneration folder with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tokprune import demo
from tokprune.demo.scenes import SIZE
from tools.demo.vocabulary import BOS, CLIP_WORD_IDS, EOS, IMAGE, PAD, VIDEO

from .clips_network import start_from
from .clips_recipe import ClipRecipe
from .data import IMAGE_MEAN, IMAGE_STD
from .export import build_tokenizer, chat_template, claim_float32, part
from .loop import load


def export_clips(out: Path, recipe: ClipRecipe, folder: Path) -> None:
    """Write everything that `from_pretrained` needs; weights in float16, which load as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model = start_from(demo.load()[0], recipe.new_layers, torch.Generator().manual_seed(recipe.seed))
    trained = load(out / "refine.pt")
    model.model.multi_modal_projector.load_state_dict(part(trained, "projector."))
    model.model.language_model.load_state_dict(part(trained, "llama."))
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=CLIP_WORD_IDS[BOS],
        eos_token_id=CLIP_WORD_IDS[EOS],
        pad_token_id=CLIP_WORD_IDS[PAD],
        do_sample=False,
    )
    model.half().save_pretrained(folder)
    claim_float32(folder / "config.json")
    vision: Any = model.config.vision_config
    build_clip_processor(vision.patch_size).save_pretrained(folder)


def build_clip_processor(patch: int) -> LlavaNextVideoProcessor:
    """Tokenizer, video and image processor and chat template in one; frames are not sampled but taken as given."""
    pixels: dict[str, Any] = {
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
    }
    return LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**pixels, do_sample_frames=False),
        image_processor=LlavaNextImageProcessorPil(**pixels, image_grid_pinpoints=[[SIZE, SIZE]]),
        tokenizer=build_tokenizer(CLIP_WORD_IDS, {"image_token": IMAGE, "video_token": VIDEO}),
        chat_template=chat_template({"image": IMAGE, "video": VIDEO}),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # [CLS], which "default" drops again
    )
