"""Scores of a schedule on a model: whether it answers as the whole model, or right, or how far its next word is off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

import torch
from torch import Tensor

import tokprune
from tokprune.adapters.base import get_adapter
from tokprune.adapters.prompting import answer
from tokprune.config import PruneConfig
from tokprune.errors import OptionError, UnsupportedModelError, unknown
from tokprune.methods.decoder_base import DecoderMethod
from tokprune.profiling.runs import placeholders
from tokprune.registry import get_method, list_methods, method_class
from tokprune.schedule import Schedule
from tokprune.types import VLM, Inputs, Processor

R = TypeVar("R")
KINDS = ("agreement", "accuracy", "kl")


def scheduled(method: str, schedule: Schedule | None, **options: object) -> PruneConfig | None:
    """The config that prunes by a decoder method under a schedule; None where the schedule drops nothing.

    options: other fields of the method.
    """
    check_decoder(method)
    if schedule is None:
        return None
    return PruneConfig((get_method(method, **options, schedule=schedule.steps),))


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


def check_decoder(method: str) -> None:
    """Refuse what is no method of the decoder stage, with those that there are."""
    if not issubclass(method_class(method), DecoderMethod):
        raise OptionError(
            f"method {method!r} belongs to the stage {method_class(method).stage!r}; a search finds the schedule of a "
            f"method of the decoder stage: {', '.join(list_methods('decoder')) or 'none is registered'}."
        )


@dataclass(frozen=True)
class ModelScore:
    """The score of a schedule by the model's answers to some questions; call it with a schedule, or None.

    kind: "agreement", the share of answers that are those of the whole model; "accuracy", the share that are right, by
    `right`; "kl", minus the mean divergence of the next token's distribution, KL(pruned || whole), as VTW measures it.
    """

    model: VLM
    processor: Processor
    method: str
    batches: Sequence[Inputs]
    """Processor outputs, padded on the left."""
    kind: str = "agreement"
    right: Callable[[int, str], bool] | None = None
    """Whether an answer to question number i is right."""
    new_tokens: int = 16
    """Length of the answers."""
    options: dict[str, object] = field(default_factory=dict)
    """Of the decoder method."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("score", self.kind, KINDS)
        if self.kind == "accuracy" and self.right is None:
            raise OptionError("score='accuracy' needs right=, which says whether an answer to a question is right.")
        if not self.batches:
            raise OptionError("there are no questions to score by.")
        check_decoder(self.method)

    def __call__(self, schedule: Schedule | None) -> float:
        """The score, higher is better; the whole model's is 1 (agreement), its accuracy, or 0 (kl)."""
        if self.kind == "kl":
            return 0.0 if schedule is None else -self._divergence(schedule)
        answers = self._whole if schedule is None else self._pruned(schedule, self._answers)
        if self.kind == "agreement":
            hits = [a == b for a, b in zip(answers, self._whole, strict=True)]
        else:
            assert self.right is not None  # checked when it was built
            hits = [self.right(i, text) for i, text in enumerate(answers)]
        return sum(hits) / len(hits)

    def _pruned(self, schedule: Schedule, ask: Callable[[], R]) -> R:
        config = scheduled(self.method, schedule, **self.options)
        with tokprune.apply(self.model, cast(PruneConfig, config), processor=self.processor):
            return ask()

    def _answers(self) -> list[str]:
        return [a for inputs in self.batches for a in answer(self.model, self.processor, inputs, self.new_tokens)]

    @torch.no_grad()
    def _next(self) -> Tensor:
        """(Q, words) log-probabilities of the first token of each answer."""
        rows = [self.model(**inputs, logits_to_keep=1).logits[:, -1].float() for inputs in self.batches]
        return torch.cat(rows).log_softmax(-1)

    def _divergence(self, schedule: Schedule) -> float:
        pruned = self._pruned(schedule, self._next)
        return float((pruned.exp() * (pruned - self._whole_next)).sum(-1).mean())

    @cached_property
    def _whole(self) -> list[str]:
        return self._answers()

    @cached_property
    def _whole_next(self) -> Tensor:
        return self._next()

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """Mean visual tokens and mean other tokens of a prompt, rounded: what its cost is counted with."""
        visual = total = rows = 0
        for inputs in self.batches:
            ids = inputs["input_ids"]
            mask = inputs.get("attention_mask")
            real = torch.ones_like(ids) if mask is None else mask
            visual += int((placeholders(self.model, ids) & real.bool()).sum())
            total, rows = total + int(real.sum()), rows + len(ids)
        return round(visual / rows), round((total - visual) / rows)
