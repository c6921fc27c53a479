"""Models from presets: on the meta device for arithmetic, or with random weights for real latency and memory."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tokprune.errors import OptionError
from tokprune.profiling import flops
from tokprune.profiling.inputs import pixel_inputs
from tokprune.profiling.presets import Preset
from tokprune.profiling.resolution import Size
from tokprune.profiling.stages import find_stages
from tokprune.types import VLM, Inputs, JsonObject, ModelConfig


def config_of(preset: Preset) -> ModelConfig:
    """The transformers config object of a preset."""
    from transformers import AutoConfig

    return AutoConfig.for_model(preset.family, **_copy(preset.config))


def _copy(data: Any) -> Any:
    """Deep copy of plain data: transformers configs change the dictionaries they are given."""
    if isinstance(data, Mapping):
        return {key: _copy(value) for key, value in data.items()}
    return [_copy(value) for value in data] if isinstance(data, list) else data


def _from_config(preset: Preset, dtype: torch.dtype, attn: str) -> VLM:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(config_of(preset), dtype=dtype, attn_implementation=attn).eval()


def build_meta(preset: Preset, dtype: torch.dtype = torch.bfloat16) -> VLM:
    """The model without weights (meta device): shapes, parameters and FLOPs, of 78 billion parameters in seconds."""
    with torch.device("meta"):
        return _from_config(preset, dtype, "sdpa")


def build_random(
    preset: Preset,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    attn: str = "sdpa",
    seed: int = 0,
) -> VLM:
    """The model with small random weights, made directly on `device`; its answers mean nothing, its times and bytes do.

    It never ends an answer by itself, so that every run generates the tokens that were asked for.
    """
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"device={str(device)!r}, but torch sees no CUDA GPU here; write device='cpu', or only count FLOPs."
        )
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        model = _from_config(preset, dtype, attn)  # created and initialised on the device itself
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.do_sample = False
    return model


class _ToMeta(TorchDispatchMode):
    """Moves host tensors (grids, positions) to the meta device where they meet meta tensors; else values stay."""

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: JsonObject | None = None,
    ) -> object:
        kwargs = kwargs or {}
        places = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if places >= {"meta", "cpu"}:
            args, kwargs = tree_map(_host_to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _host_to_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) and value.device.type == "cpu" and value.ndim else value


def encoder_flops(model: VLM, inputs: Inputs) -> tuple[int, int]:
    """FLOPs of vision tower and projector of a meta model for the pixels among a prompt's `inputs`."""
    stages = find_stages(model)
    encode = getattr(stages.base, "get_video_features" if "pixel_values_videos" in inputs else "get_image_features")
    wanted = inspect.signature(encode).parameters
    arguments = {key: _floats_to_meta(value) for key, value in inputs.items() if key in wanted}

    def run() -> None:
        with _ToMeta():
            encode(**arguments)

    return flops.vision_flops(run, stages)


def _floats_to_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) and value.is_floating_point() else value


def vision_calls(model: VLM, preset: Preset, size: Size, frames: int | None = None) -> tuple[int, int]:
    """FLOPs of vision tower and projector of a meta model for one picture of `size`, or a clip of `frames` of them."""
    pixels = functools.partial(torch.empty, device="meta", dtype=next(model.parameters()).dtype)
    inputs = pixel_inputs(preset, pixels, size, frames)
    if preset.image["kind"] != "split":
        return encoder_flops(model, inputs)
    # The model looks for empty tiles by value; its parts are called without that.
    stages = find_stages(model)
    vision: Any = stages.vision
    tiles = inputs["pixel_values"][0]  # (views, 3, side, side)
    cells = tiles.shape[-1] // preset.image["patch"]
    mask = torch.ones(len(tiles), cells, cells, dtype=torch.bool, device="meta")
    hidden: list[Tensor] = []

    def tower() -> None:
        embedded = vision.embeddings(pixel_values=tiles, patch_attention_mask=mask)
        encoded = vision.encoder(inputs_embeds=embedded, attention_mask=None).last_hidden_state
        hidden.append(vision.post_layernorm(encoded))

    seen, _ = flops.count(tower)
    projected, _ = flops.count(lambda: stages.projectors[0](hidden[0]))
    return seen, projected
