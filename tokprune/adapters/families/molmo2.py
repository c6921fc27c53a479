"""Molmo2: a small picture and the whole one in full resolution, pooled from overlapping crops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.families.base import EncoderCall, Family, StreamLayout, register_family
from tokprune.adapters.families.geometry import frames, mixed_tiles, plain
from tokprune.adapters.families.tiny import VOCAB, WIDTH, TinyParts, square, tiny_parts, tokenizer, tower
from tokprune.tokens import Layout


@register_family("molmo2")
class Molmo2(Family):
    """The call says which patches each token pools, so crops and their overlaps need no unravelling. The
    full-resolution picture is one tile of its own grid; the small one is the thumbnail."""

    mixes_modalities = False
    adds_to_placeholder = True
    both_ways = True

    def grids(self, call: EncoderCall) -> list[list[int]]:
        """(low height, low width, height, width) of each image, (frames, height, width) of each video."""
        return call.rows_of(f"{call.modality}_grids")

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        if call.modality == "video":
            return [plain(frames(t, (h, w))) for t, h, w in self.grids(call)]
        out = []
        for a, b, c, d in self.grids(call):
            out.append(plain(mixed_tiles([(a, b), (c, d)], (1, 1)) if a * b else Layout.grid(c, d)))
        return out

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        pooling: Tensor = call.kwargs[f"{call.modality}_token_pooling"].to(values.device)  # (rows, patches), -1: none
        count = (pooling >= 0).sum(1)
        total = torch.nn.functional.pad(values, (0, 0, 0, 1))[pooling].sum(1)  # -1 reads the row of zeros
        mean = total / count.clamp(min=1)[:, None]
        # Rows that pool anything, `call.total` of them: known, so nothing waits.
        rows = torch.sort(count.clamp(max=1), descending=True, stable=True).indices[: call.total]
        return mean[rows]

    def patches(self, call: EncoderCall) -> int | None:
        return None if call.pixels is None else call.pixels.shape[-2]

    def feature_layers(self, call: EncoderCall) -> list[int] | None:
        # Molmo2 counts blocks from 0; hidden state i + 1 is the output of block i.
        return [i + 1 if i >= 0 else i for i in call.config.adapter_config.vision_feature_layer]

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        ids = {
            "image_patch_id": "<im_patch>",
            "image_start_token_id": "<im_start>",
            "image_end_token_id": "<im_end>",
            "low_res_image_start_token_id": "<low_res_im_start>",
            "frame_start_token_id": "<frame_start>",
            "frame_end_token_id": "<frame_end>",
        }
        marks = {"image_token": "<|image|>", "video_token": "<|video|>"}
        text = tokenizer([*marks.values(), *ids.values(), "<im_col>", "<im_low>"], named=marks)
        views: dict[str, Any] = {"size": square(32), "patch_size": 4, "pooling_size": [2, 2]}
        processor = hf.Molmo2Processor(
            hf.Molmo2ImageProcessor(max_crops=4, overlap_margins=[1, 1], **views),
            hf.Molmo2VideoProcessor(do_sample_frames=False, **views),
            text,
        )
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
        config = hf.Molmo2Config(
            vision_config=tower(num_hidden_layers=3, image_size=[32, 32], **heads),
            adapter_config={
                "vision_feature_layer": [2, 1],
                "hidden_size": 32,
                "intermediate_size": 64,
                "text_hidden_size": WIDTH,
                **heads,
            },
            text_config={
                "hidden_size": WIDTH,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "vocab_size": VOCAB,
                "additional_vocab_size": 0,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            **{name: text.convert_tokens_to_ids(token) for name, token in ids.items()},
        )
        return tiny_parts(hf.Molmo2ForConditionalGeneration(config), processor, "<|image|>", "<|video|>")
