"""Nemotron Omni: packed pictures and stacked clips behind one placeholder; the LLM's head is inside the base model."""

from __future__ import annotations

from tokprune.adapters.families.base import EncoderCall, StreamLayout, register_family
from tokprune.adapters.families.geometry import frames, plain
from tokprune.adapters.families.units import SizedImages


@register_family("nemotron_h_omni")
class NemotronOmni(SizedImages):
    """Pictures by `image_grid_hw`; a clip is (tubelets, height, width) of two frames each."""

    shares_placeholder = True

    def patch_grids(self, call: EncoderCall) -> list[tuple[int, int]]:
        return [(h, w) for h, w in call.rows_of("image_grid_hw")]

    def prefix(self, call: EncoderCall) -> int:
        return int(call.vision_config.num_summary_tokens)

    def token_grids(self, call: EncoderCall) -> list[tuple[int, int]]:
        return [(h // 2, w // 2) for h, w in self.patch_grids(call)]

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        if call.modality != "video" or call.pixels is None:
            return super().streams(call)
        tubelets, (height, width) = call.pixels.shape[1], call.pixels.shape[-2:]
        side = 2 * int(call.vision_config.patch_size)
        return [plain(frames(tubelets, (height // side, width // side))) for _ in range(call.pixels.shape[0])]
