"""Made-up inputs for a preset: right in every shape, random in content, so that no processor and no tokenizer is
needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.profiling.presets import Preset, smart_grid
from tokprune.profiling.resolution import Size
from tokprune.types import VLM, JsonObject

WORDS = 1000  # text token ids are drawn below this


def random_inputs(
    preset: Preset,
    model: VLM,
    size: Size | None = None,
    *,
    text: int = 64,
    batch: int = 1,
    frames: int | None = None,
    seed: int = 0,
) -> JsonObject:
    """What `model.generate(**inputs)` takes for prompts of `text` random tokens around one picture of `size`, or one
    clip.

    Half of the text stands before the picture. Clips are made for the families that take them as videos (Qwen-VL,
    LLaVA-OneVision); the others see a clip as so many pictures.
    """
    size = size or preset.default_size
    visual = preset.count(size, frames)
    if text < 2:
        raise OptionError(f"text={text}; a prompt needs at least 2 tokens around its picture.")
    parameter = next(model.parameters())
    place, dtype = parameter.device, parameter.dtype
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    video = frames is not None and preset.image["kind"] in ("smart", "anyres")
    token = config.video_token_id if video else config.image_token_id
    before = torch.randint(3, WORDS, (batch, text // 2), generator=generator)
    after = torch.randint(3, WORDS, (batch, text - text // 2), generator=generator)
    ids = torch.cat([before, torch.full((batch, visual.placeholders), int(token)), after], 1)
    types = torch.where(ids == token, 2 if video else 1, 0)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(place, dtype)

    inputs: dict[str, Tensor] = {"input_ids": ids.to(place), "attention_mask": torch.ones_like(ids).to(place)}
    inputs |= _pixels(preset, pixels, size, frames, visual.views, batch, video)
    if preset.family == "gemma3":
        inputs["token_type_ids"] = types.to(place)
    elif preset.image["kind"] == "smart":
        inputs["mm_token_type_ids"] = types.to(place)
    return {key: value.to(place) for key, value in inputs.items()}


def _pixels(
    preset: Preset, pixels: Callable[..., Tensor], size: Size, frames: int | None, views: int, batch: int, video: bool
) -> Mapping[str, Tensor]:
    """The picture arguments of one family."""
    image = preset.image
    kind, side = image["kind"], int(image.get("edge") or image.get("tile") or 0)
    suffix = "_videos" if video else ""
    if kind == "smart":
        grid = torch.tensor([smart_grid(preset, size, frames)] * batch)
        width = 3 * image.get("frames_per_group", 1) * image["patch"] ** 2
        name = "video_grid_thw" if video else "image_grid_thw"
        return {f"pixel_values{suffix}": pixels(int(grid.prod(1).sum()), width), name: grid}
    if kind == "anyres":
        if video:
            return {"pixel_values_videos": pixels(batch, views, 3, side, side)}
        more = {"batch_num_images": torch.ones(batch, dtype=torch.long)} if "onevision" in preset.family else {}
        return {
            "pixel_values": pixels(batch, views, 3, side, side),
            "image_sizes": torch.tensor([size] * batch),
            **more,
        }
    if kind == "split":
        return {"pixel_values": pixels(batch, views, 3, side, side)}
    return {"pixel_values": pixels(batch * views, 3, side, side)}
