"""CATP in the LLM: pictures of the examples by what the question starts to look at, then those of the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import kept
from tokprune.errors import OptionError
from tokprune.methods.base import check_finite
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens, at_layers
from tokprune.methods.options import option
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import cosine_similarity
from tokprune.ops.topk import top
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule
from tokprune.tokens import Selection


def context_scores(now: Tensor, before: Tensor, states: Tensor, question: Tensor, relevance: float = 0.6) -> Tensor:
    """How much more a layer looks at each token than the layer below, plus how close it is to the question.

    now, before: (V,) attention of the last token in the two layers. states: (V, D), question: (T, D) hidden states of
    all tokens of the question's own sample. Returns (V,): max(0, now - before) + relevance * cosine with their mean.
    """
    close = cosine_similarity(states, question.mean(0, keepdim=True))[:, 0]
    return (now - before).clamp(min=0) + relevance * close


@register_method(
    "catp_llm",
    paper="CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning",
    year=2026,
    url="https://arxiv.org/abs/2508.07871",
    complexity="O(nD)",
    memory="O(nD)",
    adaptive=True,
    checked=Checked("", differs="written after the paper; what happens without examples"),
)
@dataclass(frozen=True)
class CATPLLM(DecoderMethod):
    """CATP (AAAI 2026), stage 2: inside the LLM, for prompts of several examples with a picture each.

    In front of `layer` the tokens of all examples' pictures compete: by the rise of the last token's attention against
    the layer below, plus relevance (lambda_2 = 0.6) times the cosine with the mean hidden state of the question's
    sample (its picture and the words behind it); an example may lose all. In front of the next layer the last picture,
    the question's, is cut by the cosine with the mean of what the context has left. layer: 6 as for models of 7 to 8
    billion parameters (10 for 13, of 40), in proportion for other depths than 32
    where it is not given.

    share of a ratio: both cuts leave it of their tokens, so the first step leaves more than its schedule says, the
    last one exactly what was asked. The paper spends half of what goes in front of the LLM: with R to go in all, `catp`
    keeps 1 - R / 2, and this stage (1 - R) / (1 - R / 2) of those. A prompt with one picture has no context (ours): the
    picture is cut in front of `layer` by the rule for examples, with the words behind it as the question. There is no
    published default, so a ratio is needed.
    """

    layer: int | None = option(None, low=1, example=6)
    relevance: float = option(0.6, low=0)

    def plan(self, depth: int, share: float | None) -> Schedule:
        if share is None:
            raise OptionError("catp_llm has no amount of its own; write ratio=0.3, or schedule=.")
        (layer,) = at_layers(self.layer, (6,), depth)
        layer = min(layer, max(1, depth - 2)) if self.layer is None else layer
        return Schedule(tuple((at, share) for at in (layer, layer + 1) if at < depth) or ((layer, share),))

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """The examples' cut at the first layer, the question's at the second."""
        states = wide(check_finite(tokens.hidden, "the hidden states"))
        number, sizes = tokens.pictures
        if not sizes or not keep:
            return Selection(tokens.visual[:0])
        place = torch.arange(len(number), device=number.device)
        if "last" in tokens.notes:
            return self._question(tokens, states, keep)
        tokens.notes["last"] = tokens.picture[-1:]
        own = number == len(sizes) - 1
        if len(sizes) == 1:
            return Selection(top(self._relation(tokens, states, tokens.behind), keep))
        start = int(tokens.visual[own][0])
        scores = self._relation(tokens, states, torch.arange(start, len(states), device=place.device))
        context = len(number) - sizes[-1]
        count = max(kept(context, keep / len(number)), keep - sizes[-1])
        return Selection(torch.cat([top(scores[:context], count), place[context:]]), info={"scores": scores})

    def _relation(self, tokens: LayerTokens, states: Tensor, question: Tensor) -> Tensor:
        now, before = (
            check_finite(attention.weights(tokens.last)[0, tokens.visual], "the attention")
            for attention in (tokens.own, tokens.below)
        )
        return context_scores(now, before, states[tokens.visual], states[question], self.relevance)

    def _question(self, tokens: LayerTokens, states: Tensor, keep: int) -> Selection:
        """Cut the question's picture, so that `keep` are left with what the context has; the context where it must."""
        own = tokens.picture == tokens.notes["last"]
        place = torch.arange(len(own), device=own.device)
        context = place[~own]
        start = int(tokens.visual[own][0]) if len(context) < len(own) else len(states)
        mean = states[:start].mean(0, keepdim=True) if start else states.mean(0, keepdim=True)
        close = cosine_similarity(states[tokens.visual], mean)[:, 0]  # (V,)
        left = keep - min(len(context), keep)
        rest = context if left else context[top(close[context], keep)]
        asked = place[own]
        return Selection(torch.cat([rest, asked[top(close[own], left)]]).sort().values, info={"scores": close})
