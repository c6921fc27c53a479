"""Opens the model that `pretrained=` names, on the device that is this process's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tokprune.evaluation.lmms_options import ModelArgs
from tokprune.loading import DEMO, DEMO_CLIPS, Loaded, LoadOptions, check_device, demo_scorer, load, needs_scorer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tokprune.methods.base import Method

FRAMES = 32  # of a video, where nothing else is said
DEMO_FRAMES = 8  # what the demo VLM for clips was trained on


def pick_device(name: str | None, accelerator: Accelerator) -> torch.device:
    """Where the model goes: as asked; each process of several has its own GPU, which the accelerator assigned."""
    if name is None or (accelerator.num_processes > 1 and name in ("cuda", "auto")):
        return torch.device(accelerator.device)
    return check_device(name)


def load_for(args: ModelArgs, kind: str, device: torch.device) -> Loaded:
    """The model for requests of a kind ("image", "video" or "text"). Raises OptionError when it cannot be opened."""
    options = LoadOptions(
        device,
        args.dtype,
        args.attn_implementation,
        args.device_map,
        args.revision,
        args.trust_remote_code,
        args.processor,
    )
    return load(args.pretrained, options, video=kind == "video")


def frames_for(args: ModelArgs, kind: str) -> int:
    """How many frames of a video the model gets unless told otherwise; the picture demo sees one."""
    if args.pretrained not in (DEMO, DEMO_CLIPS):
        return FRAMES
    return DEMO_FRAMES if args.pretrained == DEMO_CLIPS or kind == "video" else 1


def scorer_for(args: ModelArgs, loaded: Loaded, methods: tuple[Method, ...]) -> object:
    """The text-image scorer for these methods: the one asked for, the demo's own for the demo, else none."""
    if not needs_scorer(methods):
        return None
    if loaded.embedded and args.scorer in (None, "demo"):
        return demo_scorer(loaded, methods)
    return args.scorer
