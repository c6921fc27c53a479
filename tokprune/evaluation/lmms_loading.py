"""Opens the model that `pretrained=` names: any Hugging Face VLM, or the embedded demo VLMs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from tokprune.errors import OptionError
from tokprune.evaluation.lmms_options import ModelArgs

DEMO, DEMO_CLIPS = "demo", "demo-clips"
FRAMES = 32  # of a video, where nothing else is said
DEMO_FRAMES = 8  # what the demo VLM for clips was trained on


@dataclass(frozen=True)
class Loaded:
    """A model, its processor, and how it wants to be asked.

    own: an embedded demo VLM, which knows some eighty words: it is asked the bare question, without options or instructions.
    frames: how many frames of a video it gets unless told otherwise.
    """

    model: Any
    processor: Any
    own: bool = False
    frames: int = FRAMES


def pick_device(name: str | None, accelerator: Any) -> torch.device:
    """Where the model goes: as asked; each process of several has its own GPU, which the accelerator assigned."""
    if name is None or (accelerator.num_processes > 1 and name in ("cuda", "auto")):
        return torch.device(accelerator.device)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"device={name!r} is not a device; write cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device={name!r}: this torch sees no GPU; use device=cpu.")
    return device


def load(args: ModelArgs, kind: str, device: torch.device) -> Loaded:
    """The model for requests of a kind ("image", "video" or "text"). Raises OptionError when it cannot be opened."""
    if args.pretrained in (DEMO, DEMO_CLIPS):
        return _demo(args, kind, device)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name = os.path.expanduser(args.pretrained)
    common: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if args.revision is not None:
        common["revision"] = args.revision
    more: dict[str, Any] = {}
    if args.attn_implementation is not None:
        more["attn_implementation"] = args.attn_implementation
    if args.device_map is not None:
        more["device_map"] = args.device_map
    auto: Any = AutoModelForImageTextToText
    try:
        processor = AutoProcessor.from_pretrained(name, **common, **args.processor)
        model = auto.from_pretrained(name, dtype=_dtype(args.dtype), **common, **more)
    except (OSError, ValueError, ImportError) as error:
        raise OptionError(f"cannot load pretrained={args.pretrained}: {error}") from error
    if args.device_map is None:
        model = model.to(device)
    return Loaded(model.eval(), processor)


def _demo(args: ModelArgs, kind: str, device: torch.device) -> Loaded:
    import tokprune.demo

    if args.processor:
        raise OptionError(f"the demo VLM takes no processor options, such as {next(iter(args.processor))!r}.")
    clips = args.pretrained == DEMO_CLIPS or kind == "video"
    model: Any
    processor: Any
    model, processor = (tokprune.demo.load_clips if clips else tokprune.demo.load)(device=device)
    dtype = _dtype(args.dtype)
    if isinstance(dtype, torch.dtype):
        model = model.to(dtype)
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    return Loaded(model, processor, own=True, frames=DEMO_FRAMES if clips else 1)


def _dtype(name: str) -> Any:
    if name == "auto":
        return name
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise OptionError(f"dtype={name!r} is not a torch dtype; write auto, bfloat16, float16 or float32.")
    return found


def scorer_for(args: ModelArgs, loaded: Loaded, methods: Any, device: torch.device) -> Any:
    """The text-image scorer for these methods: the one asked for, the demo's own for the demo, else none."""
    if not any(m.info.query_aware for m in methods):
        return None
    if loaded.own and args.scorer in (None, "demo"):
        import tokprune.demo

        return tokprune.demo.load_scorer(device=device)
    return args.scorer
