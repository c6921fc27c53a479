"""VideoLLaMA 3: packed patches; the model itself drops repeated patches of a clip."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.families.base import EncoderCall, UnknownGeometryError, register_family
from tokprune.adapters.families.qwen_vl import Packed
from tokprune.adapters.families.tiny import TinyParts, language, pixel_range, tiny_parts, tokenizer, tower
from tokprune.adapters.foreign import ENCODER_RECORD
from tokprune.errors import UnsupportedModelError


@register_family("video_llama_3")
class VideoLlama3(Packed):
    """VideoLLaMA 3: every image or video has a merge size of its own; the tower pools its last output by itself."""

    def merges(self, call: EncoderCall) -> list[int]:
        sizes = call.kwargs.get(f"{call.modality}_merge_sizes")
        if sizes is None:
            raise UnknownGeometryError(f"the call has no {call.modality}_merge_sizes")
        return [int(m) for m in sizes]

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        grids, merges = self.grids(call), self.merges(call)
        parts = values.split([t * h * w for t, h, w in grids])
        return torch.cat([part.unflatten(0, (-1, m * m)).mean(1) for part, m in zip(parts, merges, strict=True)])

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        text = tokenizer(["<image>", "<video>"], named={"image_token": "<image>", "video_token": "<video>"})
        processor = hf.VideoLlama3Processor(
            hf.VideoLlama3ImageProcessor(size=pixel_range(16 * 16, 64 * 64), patch_size=4, merge_size=1),
            text,
            hf.VideoLlama3VideoProcessor(
                size=pixel_range(16 * 16, 48 * 48), patch_size=4, merge_size=2, do_sample_frames=False
            ),
        )
        config = hf.VideoLlama3Config(
            vision_config=tower(),
            text_config=language("qwen2"),
            image_token_id=text.convert_tokens_to_ids("<image>"),
            video_token_id=text.convert_tokens_to_ids("<video>"),
        )
        return tiny_parts(hf.VideoLlama3ForConditionalGeneration(config), processor, "<image>", "<video>")

    def prepare_encoded(self, call: dict[str, Any], encoded: dict[str, Any]) -> dict[str, Tensor]:
        mask, output = call.get("video_compression_mask"), encoded.get("video")
        if mask is None or output is None:
            return {}
        call["video_compression_mask"] = None
        if bool(mask.all()):
            return {}
        sizes = [f.shape[0] for f in output.pooler_output]
        record = getattr(output, ENCODER_RECORD, None)
        if record is not None and sum(record.sizes) != sum(sizes):
            raise UnsupportedModelError(
                "VideoLLaMA3 drops repeated patches of this clip, and transformers mixes up that choice when beams or "
                "several return sequences repeat the prompt (it fails without tokprune, too). Use num_beams=1 and "
                "num_return_sequences=1."
            )
        output = copy.copy(output)
        output.pooler_output = [f[m.to(f.device)] for f, m in zip(output.pooler_output, mask.split(sizes), strict=True)]
        encoded["video"] = output
        return {"video": mask}
