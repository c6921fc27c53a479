"""Models that are no preset, as presets: from a profile's JSON, or from config and processor without weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch

from tokprune.adapters.checkpoint import check_vlm
from tokprune.errors import OptionError
from tokprune.profiling.build import encoder_flops
from tokprune.profiling.presets import Preset
from tokprune.profiling.report import ProfileReport
from tokprune.profiling.runs import visual_columns
from tokprune.profiling.stages import find_stages
from tokprune.types import VLM, Fields, Inputs

Known = tuple[
    Preset, tuple[float, float]
]  # with FLOPs and parameters of tower and projector, as `plan(vision=...)` takes them
_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def _fixed(name: str, config: Fields, parameters: int, tokens: int, source: str) -> Preset:
    data = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    image = {"kind": "fixed", "tokens": tokens}
    return Preset(name, name, str(config["model_type"]), parameters, image, data, (source,))


def preset_of_report(report: ProfileReport) -> Known:
    """The model of a measured profile: its config, and the picture's cost and token count as they were there."""
    cell = report.plain
    if not cell.flops or not report.config:
        raise OptionError(
            "this profile holds no config or no FLOPs of the plain run; measure it again with this tokprune profile "
            "--json."
        )
    item = _ITEM.get(str(report.environment.get("dtype")), 2)
    known = _fixed(report.model, report.config, report.parameters, cell.visual_full, "a measured profile")
    seen = (int(cell.flops["vision"]) + int(cell.flops["projector"])) / report.batch
    return known, (seen, report.vision_bytes / item)


def preset_of_folder(name: str, folder: str | Path | None = None, size: tuple[int, int] = (768, 1024)) -> Known:
    """A model on disk or on the hub, by its config and processor alone, asked about one picture of `size` (height,
    width).

    name: what to call it, and where it is unless `folder` says so. Raises OptionError where they cannot be read, or
    where the tower cannot be counted without weights.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    folder = folder or name
    check_vlm(name, folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        with torch.device("meta"):
            model: VLM = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read --model {name}: {error}") from error
    from PIL import Image

    from tokprune.adapters.prompting import build_inputs

    # The processor needs to know the family, the device of its tensors and their dtype; a meta device would lose the
    # ids.
    outside = cast("VLM", SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.float32))
    picture = Image.new("RGB", (size[1], size[0]), (128, 128, 128))
    inputs = build_inputs(outside, processor, "?", images=[picture])
    tokens = visual_columns(outside, inputs)
    seen = _vision(name, model, inputs)
    parameters = sum(p.numel() for p in model.parameters())
    known = _fixed(name, config.to_dict(), parameters, tokens, f"the config and processor of {name}")
    return known, (float(seen), float(find_stages(model).vision_parameters))


def _vision(name: str, model: VLM, inputs: Inputs) -> int:
    """FLOPs of tower and projector on the meta device for the prompt's picture."""
    if not hasattr(find_stages(model).base, "get_image_features"):
        raise OptionError(f"{name}: {type(model).__name__} has no get_image_features; profile it and give --profile.")
    try:
        return sum(encoder_flops(model, inputs))
    except (NotImplementedError, RuntimeError) as error:  # a tower that looks at its pixels' values
        raise OptionError(
            f"{name}: its tower cannot be counted without weights ({str(error)[:80]}). Measure it instead: tokprune "
            f"profile --model {name} --json profile.json, then tokprune plan --profile profile.json."
        ) from error
