"""Where a vision-language model's stages begin and end: the modules that FLOPs and time are booked under."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokprune.errors import UnsupportedModelError

TOWERS = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_tower")
PROJECTORS = ("multi_modal_projector", "connector", "mm_projector", "aligner", "embed_vision")
INNER_PROJECTORS = ("merger", "deepstack_merger_list")  # these sit inside the tower (Qwen-VL)
LANGUAGE_MODELS = ("language_model", "text_model")

#: The parts of one `generate` call, in order. `select` is what happens between projector and LLM: scoring and pruning, and
#: (pruned or not) embedding the text and placing the image rows. `other` is the bookkeeping of the call itself.
STAGES = ("vision", "projector", "select", "prefill", "decode", "other")


@dataclass(frozen=True)
class StageModules:
    """The modules of one model: vision tower, projectors (several with DeepStack), LLM without head, output head."""

    base: nn.Module
    vision: nn.Module
    projectors: tuple[nn.Module, ...]
    language: nn.Module
    head: nn.Module | None


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    for name in names:
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            return part
    return None


def find_stages(model: nn.Module) -> StageModules:
    """The stages of `model`, through any wrapper (PEFT, compiled). Raises UnsupportedModelError when it has no vision tower."""
    for base in model.modules():
        vision, language = _first(base, TOWERS), _first(base, LANGUAGE_MODELS)
        if vision is None or language is None:
            continue
        outer = _first(base, PROJECTORS)
        if outer is not None:
            projectors: list[nn.Module] = [outer]
        else:
            projectors = []
            for name in INNER_PROJECTORS:
                part = getattr(vision, name, None)
                if isinstance(part, nn.ModuleList):
                    projectors += list(part)
                elif isinstance(part, nn.Module):
                    projectors.append(part)
        get_head: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        return StageModules(base, vision, tuple(projectors), language, head if isinstance(head, nn.Module) else None)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no module with both a vision tower ({', '.join(TOWERS)}) and a language model "
        f"({', '.join(LANGUAGE_MODELS)}); give a vision-language model such as LlavaForConditionalGeneration."
    )


@contextmanager
def watch(stages: StageModules, on_enter: Callable[[str], None], on_leave: Callable[[str], None]) -> Iterator[None]:
    """Call `on_enter(part)` and `on_leave(part)` around every call of a stage's module while the context is open.

    Parts are "vision", "projector", "language" and "head"; a projector inside the tower is reported nested. Hooks are
    removed on leaving, also after an error.
    """
    handles = []

    def add(module: nn.Module, part: str) -> None:
        # First to enter and last to leave: other hooks on the same module (pruning's) are booked under the module's part.
        handles.append(module.register_forward_pre_hook(lambda m, a, k: on_enter(part), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(lambda m, a, o: on_leave(part)))

    try:
        add(stages.vision, "vision")
        for projector in stages.projectors:
            add(projector, "projector")
        add(stages.language, "language")
        if stages.head is not None:
            add(stages.head, "head")
        yield
    finally:
        for handle in handles:
            handle.remove()
