"""In front of which layers of a model's LLM visual tokens can be dropped."""

from __future__ import annotations

from tokprune.adapters.base import get_adapter
from tokprune.errors import UnsupportedModelError


def droppable_layers(model: object) -> list[int]:
    """Layers from the first in front of which tokens can go: behind layer 0, and behind the DeepStack features."""
    adapter = get_adapter(model)
    depth = len(getattr(adapter.text_model, "layers", ()))
    planes = getattr(getattr(adapter.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    layers = list(range(max(1, len(planes)), depth))
    if not layers:
        raise UnsupportedModelError(
            f"the LLM of {type(model).__name__} has {depth} layers: there is none to drop behind."
        )
    return layers
