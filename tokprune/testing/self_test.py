"""Proves pruning on a model that nobody has tried, in seconds: `self_test(model, prompts(model, processor))`.

Everything is compared with the unpruned model or with embeddings that are cut by hand; no other code of tokprune is
asked what is right. All prompts hold one small picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tokprune
from tokprune.adapters.prompting import build_inputs
from tokprune.methods.base import Method
from tokprune.runtime.handle import Pruning
from tokprune.testing.media import picture
from tokprune.types import VLM, Fields, Inputs, JsonObject, Processor

QUESTIONS = ("what is this ?", "what is the colour of the thing in the middle of this picture ?")
STEPS = 4  # tokens to generate
NOISE = 8.0  # times the unpruned model's own difference between cached and uncached generation counts as equal …
ROUNDING = 16.0  # … and so many rounding errors of the largest logit

Prompts = Callable[[Sequence[int]], Fields]
"""(0,), (1,) or (0, 1) -> what `model(**inputs)` takes for these prompts, in one batch."""


@dataclass(frozen=True)
class Check:
    """One thing that was tested. ok: None where it could not be tested. detail: why it failed or was left out.

    apart: largest difference between the logits that should agree. allowed: how far apart counts as equal; 0: bit for
    bit.
    """

    name: str
    ok: bool | None
    detail: str = ""
    apart: float | None = None
    allowed: float | None = None


@dataclass
class Generated:
    """What generate() gave. tokens: (B, T). logits: (B, T, V)."""

    tokens: Tensor
    logits: Tensor

    def apart(self, other: Generated, row: int = 0, other_row: int = 0) -> float:
        """Largest difference of the logits of two answers, up to the step at which they say different tokens."""
        mine, yours = self.tokens[row].tolist(), other.tokens[other_row].tolist()
        same = next((i for i, pair in enumerate(zip(mine, yours, strict=True)) if pair[0] != pair[1]), len(mine))
        steps = slice(0, min(same + 1, len(mine)))
        return float((self.logits[row, steps] - other.logits[other_row, steps]).abs().max())

    def equals(self, other: Generated) -> bool:
        """Whether two answers agree bit for bit."""
        return torch.equal(self.tokens, other.tokens) and torch.equal(self.logits, other.logits)


def prompts(model: VLM, processor: Processor) -> Prompts:
    """Two questions of different length about two pictures, written by the processor's own chat template."""

    def make(rows: Sequence[int]) -> Fields:
        pictures = [[picture(96 + 32 * row, 96, seed=row + 1)] for row in rows]
        return dict(build_inputs(model, processor, [QUESTIONS[row] for row in rows], images=pictures))

    return make


def self_test(
    model: VLM,
    make: Prompts,
    *,
    ratio: float = 0.3,
    method: str | Method = "divprune",
    processor: Processor | None = None,
) -> list[Check]:
    """Test pruning on `model`; it comes back unpruned. An error inside a check is that check's failure.

    make: builds inputs, see `prompts`. ratio: share of visual tokens kept. processor: for a method that reads the
    question.
    """
    test = _Test(model, make, ratio, method, processor)
    with torch.no_grad(), _evaluating(model):
        test.untouched()
        for positions in ("keep", "compact"):
            test.exact(positions)
        test.batch()
    return test.checks


@contextmanager
def _evaluating(model: VLM) -> Iterator[None]:
    """Dropout off, and back to how it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass
class _Test:
    """The checks on one model, in order. plain: the unpruned answer. allowed: how far apart counts as equal."""

    model: VLM
    make: Prompts
    ratio: float
    method: str | Method
    processor: Processor | None
    checks: list[Check] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inputs = self.make([0])
        self.plain = self.answer(self.inputs)
        noise = self.plain.apart(self.answer(self.inputs, use_cache=False))
        rounding = torch.finfo(self.model.dtype).eps * float(self.plain.logits.abs().max())
        self.allowed = max(NOISE * noise, ROUNDING * rounding)

    def answer(self, inputs: Inputs, **more: object) -> Generated:
        """Greedy tokens, none of them a placeholder, and the logits that they were taken from."""
        config = self.model.config
        names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
        placeholders = {getattr(config, name, None) for name in names}
        out = self.model.generate(
            **inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            suppress_tokens=sorted(i for i in placeholders if isinstance(i, int)) or None,
            return_dict_in_generate=True,
            output_logits=True,
            **more,
        )
        return Generated(out.sequences[:, -STEPS:], torch.stack(out.logits, 1).float())

    def pruned(self, **options: Any) -> Pruning:
        """The model pruned inside a with block."""
        return tokprune.apply(self.model, method=self.method, processor=self.processor, **options)

    @contextmanager
    def reported(self, name: str) -> Iterator[None]:
        """Turn an error into the failure of the check called `name`."""
        try:
            yield
        except Exception as error:  # whatever it is, it must not keep the other checks from running
            self.checks.append(Check(name, False, f"{type(error).__name__}: {error}"))

    def add(self, name: str, ok: bool | None, apart: float, allowed: float, detail: str = "") -> None:
        self.checks.append(Check(name, ok, detail, apart, allowed))

    def untouched(self) -> None:
        """Ratio 1 and remove() leave the model as it was, bit for bit."""
        before = _traces(self.model)
        name = "ratio 1 answers as the plain model, bit for bit"
        with self.reported(name), self.pruned(ratio=1.0):
            got = self.answer(self.inputs)
            self.add(name, got.equals(self.plain), got.apart(self.plain), 0.0)
        name = "remove() gives the model back, bit for bit"
        with self.reported(name):
            with self.pruned(ratio=self.ratio):
                self.answer(self.inputs)
            got, clean = self.answer(self.inputs), _traces(self.model) == before
            self.add(
                name, clean and got.equals(self.plain), got.apart(self.plain), 0.0, "" if clean else "hooks are left"
            )

    def exact(self, positions: str) -> None:
        """The pruned answer with a cache, without one, and from embeddings cut by hand."""
        name = f"with a cache = without, positions={positions!r}"
        with self.reported(name), self.pruned(ratio=self.ratio, positions=positions) as pruning:
            with _watched(self.model) as calls:
                cached = self.answer(self.inputs)
            keep, uncached = pruning.last.keep[0].clone(), self.answer(self.inputs, use_cache=False)
            apart = cached.apart(uncached)
            self.add(name, apart <= self.allowed, apart, self.allowed)
            name = f"= embeddings cut by hand, positions={positions!r}"
            merges = any(m.info.merges for m in pruning.config.methods)
            pruning.remove()
            if merges:
                self.checks.append(Check(name, None, "the method merges: cutting tokens out is not what it does"))
                return
            self.by_hand(name, positions, keep, calls[0], cached)

    def by_hand(self, name: str, positions: str, keep: Tensor, seen: Fields, got: Generated) -> None:
        """Compare `got` with what the language model says about the kept embeddings. seen: its first pruned call."""
        with _watched(self.model) as calls:
            self.answer(self.inputs)
        prompt = _Prompt.of(self.model, calls[0])
        whole = torch.ones_like(keep)
        control = prompt.answer(whole, prompt.positions, self.plain).apart(self.plain)
        if control > self.allowed:
            self.add(name, None, control, self.allowed, "this model's language model cannot be fed by hand here")
            return
        where = prompt.positions[..., keep] if positions == "keep" else _Prompt.of(self.model, seen).positions
        if positions == "compact" and len(prompt.positions) == 1:
            where = prompt.positions[:, :1] + torch.arange(int(keep.sum()), device=keep.device)
        wanted = prompt.answer(keep, where, got)
        apart, change = got.apart(wanted), got.apart(self.plain)
        if change <= self.allowed:
            self.add(
                name, None, apart, self.allowed, "pruning changes less than rounding does; the check could not fail"
            )
            return
        self.add(name, apart <= self.allowed, apart, self.allowed)

    def batch(self) -> None:
        """A prompt answers in a batch of two as it does alone."""
        name = "a prompt in a batch of two = the prompt alone"
        try:
            both, alone = self.make([0, 1]), [self.make([0]), self.make([1])]
            whole = self.answer(both)
            plain = max(whole.apart(self.answer(one), row) for row, one in enumerate(alone))
        except Exception as error:  # the plain model or its processor takes no batch
            self.checks.append(Check(name, None, f"the plain model refuses a batch: {type(error).__name__}: {error}"))
            return
        allowed = max(self.allowed, NOISE * plain)
        with self.reported(name), self.pruned(ratio=self.ratio):
            batch = self.answer(both)
            apart = max(batch.apart(self.answer(one), row) for row, one in enumerate(alone))
            self.add(name, apart <= allowed, apart, allowed)


def _traces(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """What a pruning could leave on a model: hooks, replaced methods, attributes, classes."""
    return {
        name: (type(m).__name__, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
        for name, m in model.named_modules()
    }


# -- the language model, fed by hand -----------------------------------------------------------------------------------


def _language_model(model: VLM) -> nn.Module:
    base = model.base_model
    for name in ("language_model", "text_model"):
        if isinstance(getattr(base, name, None), nn.Module):
            part: nn.Module = getattr(base, name)
            return part
    decoder: nn.Module = model.get_decoder()
    return decoder


@contextmanager
def _watched(model: VLM) -> Iterator[list[JsonObject]]:
    """The keyword arguments of every call of the language model inside the with block."""
    calls: list[JsonObject] = []
    hook = _language_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


@dataclass
class _Prompt:
    """One prompt as the language model gets it. embeds: (1, L, D). positions: (1, L), or (3, L) for M-RoPE. masks: by
    name, (1, 1, L, L) or None for a causal one; under "" when there is only one. planes: DeepStack features, (visual
    tokens, D) each."""

    model: VLM
    embeds: Tensor
    positions: Tensor
    masks: dict[str, Tensor | None]
    visual: Tensor | None
    planes: Sequence[Tensor]

    @classmethod
    def of(cls, model: VLM, call: Fields) -> _Prompt:
        embeds = call["inputs_embeds"]
        length, position_ids = embeds.shape[1], call.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(length, device=embeds.device)[None]
        positions = (
            position_ids[-3:, 0] if position_ids.ndim == 3 else position_ids[:1]
        )  # a fourth row in front only counts tokens
        mask = call.get("attention_mask")
        masks = dict(mask) if isinstance(mask, Mapping) else {"": mask}
        square = {k: v[..., :length] if isinstance(v, Tensor) and v.ndim == 4 else None for k, v in masks.items()}
        return cls(
            model, embeds, positions, square, call.get("visual_pos_masks"), call.get("deepstack_visual_embeds") or ()
        )

    def answer(self, keep: Tensor, where: Tensor, said: Generated) -> Generated:
        """Logits of the prompt's kept columns followed by the tokens of `said`, in one call without a cache.

        keep: (L,) bool. where: (1 or 3, kept) positions.
        """
        tokens, model = said.tokens[:1, :-1], _language_model(self.model)
        tail = self.model.get_input_embeddings()(tokens)
        embeds = torch.cat([self.embeds[:, keep], tail.to(self.embeds.dtype)], 1)
        steps = torch.arange(1, tokens.shape[1] + 1, device=where.device)
        positions = torch.cat([where, where[:, -1:].max() + steps.expand(where.shape[0], -1)], 1)
        if set(self.masks) == {""} and self.masks[""] is None:
            mask: object = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        else:
            cut = {name: self.grown(m, keep, embeds.shape[1]) for name, m in self.masks.items()}
            mask = cut[""] if set(cut) == {""} else cut
        more: JsonObject = {}
        if self.visual is not None and len(self.planes):
            visual = self.visual[:1, keep]
            stays = keep[self.visual[0]]
            more["visual_pos_masks"] = torch.cat([visual, torch.zeros_like(tokens, dtype=torch.bool)], 1)
            more["deepstack_visual_embeds"] = [plane[stays] for plane in self.planes]
        out = model(
            inputs_embeds=embeds,
            position_ids=positions[:, None] if len(positions) == 3 else positions,
            attention_mask=mask,
            use_cache=False,
            **more,
        )
        logits = self.model.get_output_embeddings()(out.last_hidden_state[:, -tokens.shape[1] - 1 :]).float()
        return Generated(said.tokens[:1], logits)

    @staticmethod
    def grown(mask: Tensor | None, keep: Tensor, length: int) -> Tensor | None:
        """The mask of the kept columns with causal rows for the tokens after them, (1, 1, length, length)."""
        if mask is None:
            return None
        kept = mask[:1, :1, keep][..., keep]
        allowed = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()[None, None]
        hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
        grown = allowed if mask.dtype == torch.bool else torch.zeros_like(allowed, dtype=mask.dtype)
        grown = grown.masked_fill(~allowed, hidden) if mask.dtype != torch.bool else grown.clone()
        grown[..., : kept.shape[-2], : kept.shape[-1]] = kept
        return grown
