"""Proof by brute force that pruning a model of any type computes what it claims, without any of the pruning code.

The unpruned model reads a prompt with the answer behind it, alone and without padding; on the way into its language
model everything that has a row per prompt column is cut to the columns that were kept. All logits must come out as the
pruned model gave them, in the prefill and in every decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import Native, recount
from tests.census.pixels import Row, prompts
from tokprune.budget import kept

STEPS = 5
RATIO = 0.4
TOLERANCE = 2e-4
NOISE = 4.0
"""Times the unpruned model's own distance from the reference that a pruned one may be from it, where that is more:
chunked kernels of recurrent layers sum in another order where a prompt is cut."""
LOUD = 0.02
"""Distance at which the unpruned model is something else than the reference."""

Inputs = dict[str, Any]
Writer = Callable[[list[Row]], Inputs]
"""Prompts -> what `model(**inputs)` takes."""


def rows_of(kind: str) -> list[Row]:
    """Two prompts of different length, the second with two pictures or clips."""
    return [["ab ", (kind, 0), " what?"], ["ab cdefg ", (kind, 1), " then ", (kind, 2), " hm?"]]


@dataclass
class Answer:
    """logits: (B, L, V) of one forward. tokens: (B, T). steps: (B, T, V) of generate()."""

    logits: Tensor
    tokens: Tensor
    steps: Tensor

    def equals(self, other: Answer) -> bool:
        """Bit for bit."""
        return all(torch.equal(a, b) for a, b in zip(vars(self).values(), vars(other).values(), strict=True))


@torch.no_grad()
def answer(model: Any, inputs: Inputs) -> Answer:
    """One forward and one greedy generation; the prompt comes back as it went in."""
    logits = model(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape, "logits have the prompt's length"
    out = model.generate(**inputs, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"])
    return Answer(logits, out.sequences[:, length:], torch.stack(out.logits, 1))


# -- the reference -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference(model: Any, inputs: Inputs, said: Tensor, keep: Tensor, positions: str) -> Tensor:
    """(K + T, V) logits of one prompt cut to the columns `keep` (L,) with the tokens `said` (T,) behind it."""
    ids = torch.cat([inputs["input_ids"], said[None]], 1)
    length, more = ids.shape[1], len(said)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in whole:
            whole[name] = torch.nn.functional.pad(whole[name], (0, more))
    stays = torch.cat([keep, torch.ones(more, dtype=torch.bool)])  # (L + T,)
    visual = torch.isin(ids[0], torch.tensor(sorted(placeholder_ids(model.config))))
    visual[-more:] = False

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(cut(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 2 and value.shape[0] == int(visual.sum()) != length:
            return value[stays[visual]]  # a plane of features
        for dim, size in enumerate(value.shape):
            if size == length and not (value.is_floating_point() and value.ndim < 4 and dim == value.ndim - 1):
                value = value.index_select(dim, stays.nonzero().flatten())
        return value

    def enter(module: Any, args: Any, kwargs: Inputs) -> Any:
        given = kwargs.get("position_ids")
        assert not args
        given = torch.arange(length)[None] if given is None else given
        new = {name: cut(value) for name, value in kwargs.items()}
        new["position_ids"] = given[..., stays] if positions == "keep" else renumbered(given, visual, stays)
        if new.get("attention_mask") is None:
            new["attention_mask"] = torch.ones(1, int(stays.sum()), dtype=torch.long)
        return args, new

    hook = language_model(model).register_forward_pre_hook(enter, with_kwargs=True)
    try:
        return model(**whole, use_cache=False).logits[0]
    finally:
        hook.remove()


def renumbered(positions: Tensor, visual: Tensor, stays: Tensor) -> Tensor:
    """Positions of the columns that stay, counted by hand. positions: (1, L), (3, 1, L), or (4, 1, L) whose first row
    counts tokens."""
    axes = positions[-3:] if positions.ndim == 3 else positions
    one = torch.ones_like(visual)[None]
    native = Native(one, one, axes, one, visual[None], one, [])
    new = recount(native, stays[None], 0)[0]  # (1 or 3, K)
    if positions.ndim == 2:
        return new
    new = new[:, None]
    return torch.cat([torch.arange(new.shape[-1])[None, None], new]) if len(positions) == 4 else new


def language_model(model: Any) -> Any:
    """The text model inside a multimodal one."""
    base = model.base_model
    return next(getattr(base, name) for name in ("language_model", "text_model") if hasattr(base, name))


def placeholder_ids(config: Any) -> set[int]:
    """Token ids that stand for visual tokens."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "image_patch_id")
    return {i for name in names if (i := getattr(config, name, None)) is not None}


# -- the checks --------------------------------------------------------------------------------------------------------


@contextmanager
def pruned(model: Any, method: Any = "random", **options: Any) -> Iterator[Any]:
    """The model pruned inside the with block, and plain afterwards whatever happens."""
    options = {"ratio": RATIO, **options}
    try:
        with tokprune.apply(model, method, **options) as pruning:
            yield pruning
    finally:
        tokprune.remove(model)


def check_unharmed(model: Any, inputs: Inputs) -> Answer:
    """Ratio 1 and remove() are bit-identical to the plain model. Returns its answer."""
    plain = answer(model, inputs)
    with pruned(model, ratio=1.0):
        assert answer(model, inputs).equals(plain), "ratio 1 changes the answer"
    with pruned(model):
        answer(model, inputs)
    assert answer(model, inputs).equals(plain), "remove() leaves something behind"
    return plain


def check_reference(model: Any, write: Writer, rows: list[Row], plain: Answer) -> float:
    """With everything kept, the reference is the unpruned model. Returns how far apart counts as equal."""
    apart = 0.0
    for row, prompt in enumerate(rows):
        alone = write([prompt])
        keep = torch.ones(alone["input_ids"].shape[1], dtype=torch.bool)
        wanted = reference(model, alone, plain.tokens[row], keep, "keep")[-STEPS - 1 : -1]
        apart = max(apart, float((plain.steps[row] - wanted).abs().max()))
    assert apart < LOUD, f"the unpruned model's logits are {apart:.2g} from the reference"
    return max(TOLERANCE, NOISE * apart)


def check_exact(model: Any, write: Writer, rows: list[Row], positions: str, allowed: float, plain: Answer) -> float:
    """Pruned = reference in a batch, by generate(), and alone, by forward. Returns the largest difference.

    plain: the unpruned answer, which must be another one, or nothing would be proven.
    """
    inputs = write(rows)
    with pruned(model, positions=positions) as pruning:
        got = answer(model, inputs)
        keep, streams = pruning.last.keep, list(pruning.last.streams)
        assert pruning.last.policy == positions
    check_decision(model, inputs, keep, streams)
    change = float((got.steps[:, 0] - plain.steps[:, 0]).abs().amax(-1).min())
    assert change > 10 * allowed, f"pruning changes logits by {change:.2g} only"
    apart = 0.0
    for row, prompt in enumerate(rows):
        alone = write([prompt])
        own = keep[row][inputs["attention_mask"][row].bool()]
        wanted = reference(model, alone, got.tokens[row], own, positions)[-STEPS - 1 : -1]
        apart = max(apart, float((got.steps[row] - wanted).abs().max()))
        with pruned(model, positions=positions) as pruning, torch.no_grad():
            logits = model(**alone).logits[0]
            own = pruning.last.keep[0] if pruning.last is not None else torch.ones_like(own)
        wanted = reference(model, alone, got.tokens[row], own, positions)[:-STEPS]
        apart = max(apart, float((logits[own] - wanted).abs().max()))
    assert apart < allowed, f"logits are {apart:.2g} from the reference"
    return apart


def check_words_beside_pictures(model: Any, write: Writer, allowed: float) -> None:
    """A prompt without a picture answers beside one with pictures as it does alone, and in a call of its own."""
    rows: list[Row] = [["only words stand here, no picture"], ["a ", ("image", 1), " b?"]]
    inputs = write(rows)
    try:
        plain = answer(model, inputs)
    except Exception:  # the plain model takes no such batch
        return
    with pruned(model):
        got = answer(model, inputs)
    assert float((got.steps[0] - plain.steps[0]).abs().max()) < allowed
    with pruned(model):
        alone = answer(model, write(rows[:1]))
    assert alone.equals(answer(model, write(rows[:1]))), "a call of words alone is changed"


def check_decision(model: Any, inputs: Inputs, keep: Tensor, streams: list[Any]) -> None:
    """Text stays, padding goes, and every picture keeps its share and no more."""
    visual = torch.isin(inputs["input_ids"], torch.tensor(sorted(placeholder_ids(model.config))))
    real = inputs["attention_mask"].bool()
    assert torch.equal(keep & ~visual, real & ~visual), "text was dropped or padding kept"
    claimed = torch.zeros_like(visual)
    for stream in streams:
        claimed[stream.row, stream.columns] = True
        assert stream.kept == kept(stream.total, RATIO)
        assert int(keep[stream.row, stream.columns].sum()) == stream.kept + stream.separators_kept
    assert torch.equal(claimed, visual), "every visual token belongs to a stream"
    assert int(keep[visual].sum()) < int(visual.sum()), "nothing was dropped"


def writer(model: Any) -> Writer:
    """Prompts from pixel tensors and placeholder ids."""
    return lambda rows: dict(prompts(model, rows))
