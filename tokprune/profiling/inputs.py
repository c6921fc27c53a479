"""Made-up inputs for a preset: right in every shape, random in content; no processor or tokenizer is needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.profiling.presets import Preset, smart_grid
from tokprune.profiling.resolution import Size
from tokprune.types import VLM, JsonObject

WORDS = 1000  # text token ids are drawn below this
CLIPS = ("smart", "anyres")  # ways of cutting pictures whose families take clips as videos


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
    before = torch.randint(3, WORDS, (batch, text // 2), generator=generator)
    after = torch.randint(3, WORDS, (batch, text - text // 2), generator=generator)
    pictures = pixel_inputs(
        preset, lambda *shape: torch.randn(*shape, generator=generator).to(dtype), size, frames, batch
    )
    video = "pixel_values_videos" in pictures
    token = model.config.video_token_id if video else model.config.image_token_id
    ids = torch.cat([before, torch.full((batch, visual.placeholders), int(token)), after], 1)
    types = torch.where(ids == token, 2 if video else 1, 0)

    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}
    if preset.family == "gemma3":
        inputs["token_type_ids"] = types
    elif preset.image["kind"] == "smart":
        inputs["mm_token_type_ids"] = types
    return {key: value.to(place) for key, value in inputs.items()}


def pixel_inputs(
    preset: Preset, pixels: Callable[..., Tensor], size: Size, frames: int | None = None, batch: int = 1
) -> dict[str, Tensor]:
    """The picture arguments of a call of the preset's model. pixels: shape -> values."""
    image, views = preset.image, preset.count(size, frames).views
    kind, side = image["kind"], int(image.get("edge") or image.get("tile") or 0)
    video = frames is not None and kind in CLIPS
    if kind == "smart":
        grid = torch.tensor([smart_grid(preset, size, frames)] * batch)
        rows = pixels(int(grid.prod(1).sum()), 3 * image.get("frames_per_group", 1) * image["patch"] ** 2)
        if video:
            return {"pixel_values_videos": rows, "video_grid_thw": grid}
        return {"pixel_values": rows, "image_grid_thw": grid}
    if kind not in ("anyres", "split"):
        return {"pixel_values": pixels(batch * views, 3, side, side)}
    if video and preset.family == "llava_next":
        raise OptionError(f"{preset.title} ({preset.family}) takes no videos; leave out frames.")
    values = pixels(batch, views, 3, side, side)
    if video:
        return {"pixel_values_videos": values}
    inputs = {"pixel_values": values}
    if kind == "anyres":
        inputs["image_sizes"] = torch.tensor([size] * batch)
    if "onevision" in preset.family:
        inputs["batch_num_images"] = torch.ones(batch, dtype=torch.long)
    return inputs
