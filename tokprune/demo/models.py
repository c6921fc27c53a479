"""Opens the model that a command names, and says what machine it runs on."""

from __future__ import annotations

import platform
from typing import Any

from tokprune.errors import OptionError


def load_model(name: str, device: str) -> tuple[Any, Any, bool]:
    """Model, processor, and whether it is the embedded demo VLM."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise OptionError(f"--device {device}: this torch sees no GPU; use --device cpu.")
    if name == "demo":
        import tokprune.demo

        return *tokprune.demo.load(device=device), True
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(name)
        auto: Any = AutoModelForImageTextToText
        model = auto.from_pretrained(name, dtype="auto").to(device).eval()
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot load --model {name}: {error}") from error
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.padding_side = "left"
    return model, processor, False


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch
    import transformers

    import tokprune

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "tokprune": tokprune.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads" + (f", {gpu}" if gpu else ", no GPU"),
    }
