"""Where a vision-language model's stages begin and end: the modules that FLOPs and time are booked under."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from tokprune.adapters.base import TEXT_MODELS
from tokprune.adapters.towers import TOWERS, first_child, projectors_of
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.lookahead import looking_ahead

#: The parts of one `generate` call, in order. `select` is what happens between projector and LLM: scoring and pruning,
#: and (pruned or not) embedding the text and placing the image rows. `other` is the bookkeeping of the call itself.
STAGES = ("vision", "projector", "select", "prefill", "decode", "other")


@dataclass(frozen=True)
class StageModules:
    """The modules of one model: vision tower, projectors (several with DeepStack), LLM without head, output head."""

    base: nn.Module
    vision: nn.Module
    projectors: tuple[nn.Module, ...]
    language: nn.Module
    head: nn.Module | None

    @property
    def vision_parameters(self) -> int:
        """Numbers in the weights of tower and projectors, shared ones once."""
        held = {id(p): p.numel() for module in (self.vision, *self.projectors) for p in module.parameters()}
        return sum(held.values())


def find_stages(model: nn.Module) -> StageModules:
    """The stages of `model`, through any wrapper (PEFT, compiled).

    Raises UnsupportedModelError when it has no vision tower.
    """
    for base in model.modules():
        vision, language = first_child(base, TOWERS), first_child(base, TEXT_MODELS)
        if vision is None or language is None:
            continue
        get_head: Callable[[], object] | None = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        return StageModules(
            base, vision, projectors_of(base, vision), language, head if isinstance(head, nn.Module) else None
        )
    raise UnsupportedModelError(
        f"{type(model).__name__} has no module with both a vision tower ({', '.join(TOWERS)}) and a language model "
        f"({', '.join(TEXT_MODELS)}); give a vision-language model such as LlavaForConditionalGeneration."
    )


@contextmanager
def watch(stages: StageModules, on_enter: Callable[[str], None], on_leave: Callable[[str], None]) -> Iterator[None]:
    """Call `on_enter(part)` and `on_leave(part)` around every call of a stage's module while the context is open.

    Parts are "vision", "projector", "language" and "head"; a projector inside the tower is reported nested. Hooks are
    removed on leaving, also after an error.
    """
    handles = []

    def add(module: nn.Module, part: str) -> None:
        # First to enter and last to leave: other hooks on the same module (pruning's) are booked under its part.
        def enter(module: nn.Module, args: object, kwargs: object) -> None:
            if not looking_ahead():  # a method's first pass through the LLM is a part of its choice
                on_enter(part)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(lambda m, a, o: None if looking_ahead() else on_leave(part)))

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
