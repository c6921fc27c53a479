"""The half of a pruned model in vLLM's front end: fewer placeholders in the prompt, and cache keys that say so.

Written as mixins before vLLM's own processors; they call what these return and shorten it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import EmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails

from tokprune.serving.plugin import check_version
from tokprune.serving.settings import ServingSettings
from tokprune.serving.signals import KINDS

check_version()
M = TypeVar("M", bound=type)


class PrunedInfo:
    """Mixin before a ProcessingInfo of vLLM."""

    get_hf_config: Callable[[], Any]

    @property
    def tokprune(self) -> ServingSettings:
        """What the model's config says about pruning."""
        return ServingSettings.of(self.get_hf_config(), KINDS)


class PrunedProcessor:
    """Mixin before a multimodal processor of vLLM."""

    info: Any
    weaves: ClassVar[frozenset[str]] = frozenset()
    """Modalities whose placeholders are several runs with words between, such as the frames of a clip."""

    def separators(self, modality: str, item: int, mm_items: Any) -> int:
        """Rows of a picture or clip that are never candidates, such as newlines; all of them stay."""
        return 0

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Any:
        settings = self.info.tokprune
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]

        def shortened(update: Any) -> Any:
            full, modality = update.replacement, update.modality
            if isinstance(mm_items.get(modality), EmbeddingItems):  # encoded elsewhere, as long as it should be
                return update

            def replacement(item: int) -> Any:
                content = full(item) if callable(full) else full
                separators = self.separators(modality, item, mm_items)
                return shorten(content, settings.config.count, separators, modality in self.weaves)

            return replace(update, replacement=replacement)

        return [shortened(update) for update in updates]

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        salt = self.info.tokprune.salt
        return {modality: [f"{h}-{salt}" for h in items] for modality, items in hashes.items()}


def served(
    processor: type, info: type, dummy: type, mixin: type = PrunedProcessor, weaves: Collection[str] = ()
) -> Callable[[M], M]:
    """Register a pruned model, and vLLM's processor of its family with placeholders for the kept tokens alone.

    processor, info, dummy: vLLM's MultiModalProcessor, ProcessingInfo and DummyInputsBuilder. mixin: what shortens
    prompts. weaves: of `PrunedProcessor`.
    """
    pruned = type(f"Pruned{processor.__name__}", (mixin, processor), {"weaves": frozenset(weaves)})
    told = type(f"Pruned{info.__name__}", (PrunedInfo, info), {})
    register: Callable[[M], M] = MULTIMODAL_REGISTRY.register_processor(pruned, info=told, dummy_inputs=dummy)
    return register


def shorten(content: Any, count: Callable[[int], int], separators: int, weave: bool) -> Any:
    """The tokens that stand for a picture or clip in the prompt, with as many placeholders as rows stay.

    content: token ids, or vLLM's PromptUpdateDetails. weave: how many placeholders fall on each frame is known only
    after the encoder, so the whole, words included, is one embedding; `weave.woven` writes the words into it.
    """
    details = isinstance(content, PromptUpdateDetails)
    ids: Sequence[int] = content.full if details else content
    placeholder = torch.ones(len(ids), dtype=torch.bool)
    if details and content.is_embed is not None:
        placeholder = content.is_embed(ids)
    n = int(placeholder.sum()) - separators
    if count(n) >= n:
        return content
    stays = ~placeholder | (placeholder.cumsum(0) <= count(n) + separators)
    short = [token for token, yes in zip(ids, stays.tolist(), strict=True) if yes]
    if not details:
        return short
    return PromptUpdateDetails(short, None if weave else content.is_embed)
