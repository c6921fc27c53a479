"""Pixel tensors for tiny models whose processors cannot be built offline: what `get_image_features` and
`get_video_features` of any model take, told by their arguments.

`prompts(model, rows)` makes calls of `model(**inputs)`: text as bytes, and for each picture as many placeholders as the
model's encoder gives features for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.families.tiny import PAD
from tokprune.errors import UnsupportedModelError
from tokprune.types import VLM, Inputs, JsonObject

FRAMES = 2
"""Of each clip, counted as the tower counts them."""

Row = Sequence[str | tuple[str, int]]
"""A prompt: text, ("image", seed) and ("video", seed)."""


def medium(  # one rule after the other, by the names of the encoder's arguments
    model: VLM, modality: str, seed: int
) -> JsonObject:
    """Arguments of the encoder for one picture or clip, sizes varying with the seed where the model allows it."""
    base: Any = model.base_model
    encoder: Callable[..., object] | None = getattr(base, f"get_{modality}_features", None)
    if encoder is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no encoder for {modality}.")
    named = list(inspect.signature(encoder).parameters)
    generator = torch.Generator().manual_seed(seed + 1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    config = getattr(model.config, "vision_config", None) or model.config
    pixels = "pixel_values_videos" if modality == "video" else "pixel_values"
    frames = FRAMES if modality == "video" else 1
    height, width = (8, 12) if seed % 2 else (8, 8)  # patches
    side = getattr(config, "image_size", None) or (getattr(config, "model_args", None) or {}).get("img_size") or 32
    side = side[0] if isinstance(side, list | tuple) else side
    if f"{modality}_grid_thw" in named:
        grid = torch.tensor([[frames, height, width]])
        values = packed(model, config, frames, height, width, noise)
        if model.config.model_type.startswith("inkling2"):  # grids count merged patches
            merge = config.spatial_merge_size
            grid[:, 1:] //= merge
            values = noise(int(grid.prod()), merge * config.patch_size, merge * config.patch_size, 3)
        out = {pixels: values, f"{modality}_grid_thw": grid}
        if (
            modality == "video" and model.config.model_type.endswith("omni_thinker")
        ) or model.config.model_type == "qwen3_omni_moe_thinker":
            out["video_second_per_grid"] = torch.tensor([1.0])
        return out
    if f"{modality}_position_ids" in named:  # Gemma 4
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)  # x, y
        patch = getattr(config, "model_patch_size", None) or getattr(config, "patch_size", None) or 4
        out = {
            pixels: noise(frames, height * width, 3 * patch**2).sigmoid(),
            f"{modality}_position_ids": places[None].repeat(frames, 1, 1),
        }
        return out | ({"num_frames_per_video": torch.tensor([frames])} if modality == "video" else {})
    if "spatial_shapes" in named:  # NaFlex towers
        mask = torch.zeros(1, 96, dtype=torch.long)
        mask[:, : height * width] = 1
        return {
            pixels: noise(1, 96, 3 * config.patch_size**2),
            "spatial_shapes": torch.tensor([[height, width]]),
            "pixel_attention_mask": mask,
        }
    if f"{modality}_grid_hw" in named:
        return {
            pixels: noise(height * width, 3 * config.patch_size**2),
            f"{modality}_grid_hw": torch.tensor([[height, width]]),
        }
    if "pixel_attention_mask" in named:  # pictures of a prompt, one row each
        mask = (
            torch.ones(1, 1, dtype=torch.bool)
            if "tile_fine_mask" in named
            else torch.ones(1, 1, side, side, dtype=torch.bool)
        )
        return {pixels: noise(1, 1, 3, side, side), "pixel_attention_mask": mask}
    sizes = "target_sizes_videos" if modality == "video" else "target_sizes"
    if sizes in named:
        strip = noise(frames * height * width, 3, config.patch_size, config.patch_size)
        strip = strip.permute(1, 2, 0, 3).flatten(2)[None]  # (1, 3, patch, patches * patch)
        return {pixels: strip, sizes: torch.tensor([[height, width]] * frames)}
    if "image_sizes" in named and hasattr(model.config, "image_grid_pinpoints"):
        return {pixels: noise(1, 3, 3, side, side), "image_sizes": torch.tensor([[side, 2 * side]])}
    if "image_sizes" in named:
        size = height * config.patch_size, width * config.patch_size
        return {pixels: noise(1, 3, *size), "image_sizes": torch.tensor([size])}
    if "num_local_patches" in named:
        return {
            pixels: noise(1, 3, side, side),
            "pixel_values_local": noise(2, 3, side, side),
            "num_local_patches": [2],
            **({"patches_grid": [[2, 1]]} if "patches_grid" in named else {}),
        }
    if model.config.model_type == "inkling_mm_model":
        return {pixels: noise(12, config.temporal_patch_size, config.patch_size, config.patch_size, 3)}
    if model.config.model_type == "fuyu":
        return {pixels: noise(1, 12, 3 * config.patch_size**2)}
    if model.config.model_type == "nemotron_h_omni":
        return {pixels: noise(1, frames, 6, side, side)}
    shape = (1, 2, 3, side, side) if modality == "video" else (1, 3, side, side)
    if "high_res_pixel_values" in named:
        return {
            pixels: noise(*shape),
            "high_res_pixel_values": noise(1, 3, *[model.config.high_res_vision_config.image_size] * 2),
        }
    return {pixels: noise(*shape)}


def packed(model: VLM, config: Any, frames: int, height: int, width: int, noise: Callable[..., Tensor]) -> Tensor:
    """Patches of a packed tower, one after the other: (P, values), or (P, 3, patch, patch) for towers that convolve."""
    side = config.patch_size
    channels = getattr(config, "in_channels", 0) or getattr(config, "num_channels", 3)
    time = int(getattr(config, "temporal_patch_size", None) or getattr(config, "patch_temporal", None) or 1)
    count, kind = frames * height * width, model.config.model_type
    if kind in CONVOLVING:
        return noise(count, channels, side, side)
    return noise(count, (1 if kind in STILL else time) * channels * side * side)


CONVOLVING = ("kimi_k25", "paddleocr_vl")
STILL = ("hunyuan_vl",)


def prompts(model: VLM, rows: Sequence[Row], padding_side: str = "left") -> dict[str, Tensor]:
    """Inputs of `model` for a batch of prompts."""
    ids: list[list[int]] = []
    kinds: list[list[int]] = []
    media: dict[str, list[Tensor]] = {}
    for row in rows:
        line: list[int] = []
        kind: list[int] = []
        for part in row:
            if isinstance(part, str):
                line += part.encode()
                kind += [0] * (len(line) - len(kind))
                continue
            call = medium(model, *part)
            new = placeholders(model, part[0], call)
            for name, tensor in call.items():
                media.setdefault(name, []).append(tensor)
            token = max(set(new), key=new.count)
            line += new
            kind += [(1 + (part[0] == "video")) * (i == token) for i in new]
        ids.append(line)
        kinds.append(kind)
    length = max(map(len, ids))

    def padded(lines: Sequence[Sequence[int]], filler: int) -> Tensor:
        pads = [[filler] * (length - len(line)) for line in lines]
        left = padding_side == "left"
        return torch.tensor([[*pad, *line] if left else [*line, *pad] for pad, line in zip(pads, lines, strict=True)])

    inputs = {"input_ids": padded(ids, PAD), "attention_mask": padded([[1] * len(line) for line in ids], 0)}
    named = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in named and media:
            inputs[name] = padded(kinds, 0)
            break
    return {**inputs, **{name: joined(name, tensors) for name, tensors in media.items()}}


def joined(name: str, tensors: Sequence[Any]) -> Any:
    """One argument of several pictures: one after the other, smaller ones padded."""
    if isinstance(tensors[0], list):
        return [item for items in tensors for item in items]
    first = tensors[0].shape
    if name.startswith("pixel_values") and len(first) == 4 and first[0] == 1 and first[3] > 8 * first[2]:
        return torch.cat(list(tensors), 3)  # a strip of patches
    largest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    filler = -1 if name.endswith("position_ids") else 0
    out = []
    for tensor in tensors:
        pads = [
            n
            for size, most in zip(reversed(tensor.shape[1:]), reversed(largest), strict=True)
            for n in (0, most - size)
        ]
        out.append(torch.nn.functional.pad(tensor, pads, value=filler))
    return torch.cat(out)


@torch.no_grad()
def placeholders(model: VLM, modality: str, call: Inputs) -> list[int]:
    """As many placeholder ids as the encoder gives features for one picture or clip, between the marks that the config
    names."""
    base, config = model.base_model, model.config
    features = getattr(base, f"get_{modality}_features")(**call, return_dict=True)
    features = features.last_hidden_state if features.pooler_output is None else features.pooler_output
    count = sum(item.numel() // item.shape[-1] for item in features)

    def named(*names: str) -> list[int]:
        return [i for name in names if (i := getattr(config, name, None)) is not None][:1]

    start = named(f"{modality}_start_token_id", "image_start_id", "vision_start_token_id", "boi_token_id")
    end = named(f"{modality}_end_token_id", "image_end_id", "vision_end_token_id", "eoi_token_id")
    same = config.model_type.startswith(("glm", "nemotron"))  # clips are written with the token of pictures
    token = named(
        *([] if same else [f"{modality}_token_id", f"{modality}_token_index"]),
        "image_token_id",
        "image_token_index",
        "image_patch_id",
    )
    apart = modality == "video" and config.model_type in FRAMES_APART
    frames = FRAMES if apart else 1
    return [i for _ in range(frames) for i in (*start, *token * (count // frames), *end)]


FRAMES_APART = (
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "minicpmv4_7",
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "qwen4_exp",
)
