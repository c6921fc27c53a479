"""Has the VLM name what a question is about, before its frames are scored by these things."""

from __future__ import annotations

import torch

from tokprune.adapters.base import Adapter
from tokprune.adapters.dialect import as_cache
from tokprune.adapters.query import tokenizer_of
from tokprune.adapters.types import Model, Processor
from tokprune.errors import MissingSignalError

MOST_TOKENS = 128


def decoupled(adapter: Adapter, processor: Processor, question: str) -> tuple[tuple[str, ...], str]:
    """The entities that answer a question by being seen, and how they were found; none where the question itself
    serves.

    One greedy answer of at most 128 tokens, without pictures. What cannot be read as a list counts as none.
    """
    from tokprune.methods.frames.decouple import decoupling_prompt, parse_decoupling

    if processor is None:
        raise MissingSignalError(
            "decouple=True asks the model about the question and needs its processor for that: apply(..., "
            "processor=processor)."
        )
    said = text_answer(adapter, processor, decoupling_prompt(question), MOST_TOKENS)
    entities = tuple(parse_decoupling(said) or ())
    if entities:
        return entities, f"entities named by the model: {', '.join(entities)}"
    return (), "decoupling named no entities"


@torch.no_grad()
def text_answer(adapter: Adapter, processor: Processor, words: str, max_new_tokens: int) -> str:
    """The greedy answer to a user turn that says `words`, at most `max_new_tokens` long: by the language model alone,
    with no pictures and no pruning.

    `generate` is not used: it may run inside a forward of the same model, whose own position record (rope_deltas) it
    would overwrite. The cache is thrown away.
    """
    from transformers import DynamicCache

    from tokprune.adapters.prompting import inputs_of

    model, device = adapter.model, next(adapter.base.get_input_embeddings().parameters()).device
    chat = [{"role": "user", "content": [{"type": "text", "text": words}]}]
    ids = inputs_of(model, processor, [chat])["input_ids"].to(device)
    table, head = adapter.base.get_input_embeddings(), model.get_output_embeddings()
    axes = (3, 1) if hasattr(adapter.base, "compute_3d_position_ids") else (1,)
    ends = _ends(model, processor)
    cache = DynamicCache(config=adapter.config.get_text_config())
    answer: list[int] = []
    position = adapter.family.first_position
    total = 0
    for _ in range(max_new_tokens):
        length = ids.shape[1]
        total += length
        # Not through __call__: whoever times the model by its hooks must not take this pass for the prefill.
        hidden = adapter.text_model.forward(
            inputs_embeds=table(ids),
            attention_mask=torch.ones(1, total, dtype=torch.long, device=device),
            position_ids=torch.arange(position, position + length, device=device).expand(*axes, -1),
            **as_cache(type(adapter.text_model).forward, cache),
            use_cache=True,
        ).last_hidden_state
        position += length
        token = int(head.forward(hidden[:, -1]).argmax(-1))
        if token in ends:
            break
        answer.append(token)
        ids = torch.tensor([[token]], device=device)
    return str(tokenizer_of(processor).decode(answer, skip_special_tokens=True)).strip()


def _ends(model: Model, processor: Processor) -> set[int]:
    """Tokens that end an answer."""
    ends = [getattr(model.generation_config, "eos_token_id", None), tokenizer_of(processor).eos_token_id]
    return {int(i) for ids in ends if ids is not None for i in (ids if isinstance(ids, list | tuple) else [ids])}
