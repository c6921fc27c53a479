"""Brute force: what a pruned model must compute, worked out without any of the pruning code.

The language model inside an unpruned model is watched once: the embeddings, positions and DeepStack planes that it is
given are the full prompt. From them and a decision `keep` the answer follows in two ways that share nothing with the
adapters: a sequence cut by hand with positions counted by hand ("compact"), or the whole sequence with the dropped
tokens masked for everybody else and all positions as they were ("keep").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.spelling import with_cache
from tokprune.testing import Part, TinyVLM, build, clip, picture

MAIN = (
    "llava",
    "vipllava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "internvl",
)
QUICK = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")  # one of each kind of layout and position
HYBRID = ("qwen3_5", "minicpmv4_6")  # every second layer is recurrent
VIDEO = (
    "llava_next_video",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "internvl",
    "perception_lm",
    "glm4v",
    "video_llama_3",
    "minicpmv4_6",
    "molmo2",
)
MIXED = tuple(f for f in VIDEO if f not in ("perception_lm", "glm4v", "minicpmv4_6", "molmo2"))


_built = functools.lru_cache(None)(build)
used: set[str] = set()
"""Families whose shared model the running test was given: conftest takes off what it may have left there."""


def shared(family: str) -> TinyVLM:
    """One model per family for all tests that leave it as they found it."""
    tiny = _built(family)  # a family that cannot be built fails its own tests alone
    used.add(family)
    return tiny


def slow_unless(quick: bool, *values: Any) -> Any:
    """Parameters of a test, of a quick one or of one that `make test-slow` runs."""
    return pytest.param(*values, marks=[] if quick else [pytest.mark.slow])


def samples(kind: str) -> list[list[Part]]:
    """Two prompts of different length with different numbers of pictures or clips; both end with text."""
    if kind == "image":
        return [
            ["Hello ", ("image", picture(60, 40, 1)), " what is this?"],
            ["Longer text before ", ("image", picture(40, 40, 2)), " and ", ("image", picture(40, 60, 3)), " compare."],
        ]
    if kind == "video":
        return [
            ["v ", ("video", clip(4, seed=1)), " what?"],
            ["a longer question about ", ("video", clip(4, seed=2)), " ok?"],
        ]
    return [
        ["v ", ("video", clip(4, seed=1)), " and ", ("image", picture(60, 40, 1)), " what?"],
        [
            *("first ", ("image", picture(40, 60, 3)), " then ", ("video", clip(4, seed=2))),
            *(" then text and ", ("image", picture(40, 40, 7)), " ok?"),
        ],
    ]


# -- the unpruned prompt -----------------------------------------------------------------------------------------------


@dataclass
class Native:
    """What the language model of the unpruned model is given for a prompt.

    ids, real, visual, types: (B, L); real: not padding. embeds: (B, L, D). positions: (B, L) or (3, B, L). planes:
    DeepStack features as (B, L, D) each, zero at text.
    """

    ids: Tensor
    embeds: Tensor
    positions: Tensor
    real: Tensor
    visual: Tensor
    types: Tensor
    planes: list[Tensor]

    @property
    def mrope(self) -> bool:
        """Whether positions have three axes."""
        return self.positions.ndim == 3


def language_model(model: Any) -> Any:
    """The text model inside a multimodal one."""
    base = model.base_model
    return base.language_model if hasattr(base, "language_model") else base.text_model


def placeholder_ids(config: Any) -> set[int]:
    """Token ids that stand for visual tokens in a processed prompt."""
    names = ("image_token_id", "video_token_id", "image_patch_id")
    return {getattr(config, name) for name in names if getattr(config, name, None) is not None}


@torch.no_grad()
def observe(tiny: TinyVLM, inputs: Any, through: str = "generate") -> Native:
    """Watch the unpruned model read a prompt, through generate() or through forward (they number positions
    differently)."""
    calls: list[dict[str, Any]] = []
    hook = language_model(tiny.model).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    try:
        tiny.model.generate(**inputs, max_new_tokens=1) if through == "generate" else tiny.model(**inputs)
    finally:
        hook.remove()
    call = calls[0]
    ids, embeds = inputs["input_ids"], call["inputs_embeds"]
    batch, length = ids.shape
    positions = call.get("position_ids")
    if positions is None:
        positions = torch.arange(length)[None]
    if positions.ndim == 3:
        positions = positions[-3:]  # a fourth row in front only counts tokens
    positions = positions.expand(*positions.shape[:-2], batch, length)
    visual = torch.isin(ids, torch.tensor(sorted(placeholder_ids(tiny.model.config))))
    planes = []
    for rows in call.get("deepstack_visual_embeds") or ():
        plane = embeds.new_zeros(embeds.shape)
        plane[call["visual_pos_masks"]] = rows
        planes.append(plane)
    types = inputs.get("token_type_ids", inputs.get("mm_token_type_ids"))
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(ids, dtype=torch.bool)
    types = torch.zeros_like(ids) if types is None else types
    return Native(ids, embeds, positions, real, visual & real, types, planes)


def newlines(tiny: TinyVLM, native: Native) -> Tensor:
    """(B, L) bool: visual columns whose embedding is the model's newline vector."""
    vector = getattr(tiny.model.base_model, "image_newline", None)
    if vector is None:
        return torch.zeros_like(native.visual)
    return native.visual & (native.embeds == vector.detach()).all(-1)


# -- counting positions by hand ----------------------------------------------------------------------------------------


def recount(native: Native, keep: Tensor, row: int) -> tuple[Tensor, int]:
    """Positions of one prompt's kept tokens after re-numbering, (1 or 3, K), and the position after the last token.

    One axis: consecutive numbers from where the prompt starts. Three axes: inside a run of visual tokens each axis
    counts the distinct coordinates that are left, and the text after it starts right behind what is left of height or
    width.
    """
    columns = native.real[row].nonzero().flatten().tolist()
    if not native.mrope:
        start = int(native.positions[row, columns[0]])
        count = int(keep[row].sum())
        return torch.arange(start, start + count)[None], start + count
    here = native.positions[:, row].tolist()
    out: list[list[int]] = []
    run: list[int] = []
    next_free = 0  # where the next token would stand had nothing been dropped …
    gone = 0  # … and how far everything has moved towards the front

    def close(run: list[int]) -> None:
        nonlocal gone
        stay = [c for c in run if keep[row, c]]
        first = min(here[axis][c] for axis in range(3) for c in run)
        ranks = [{v: i for i, v in enumerate(sorted({here[axis][c] for c in stay}))} for axis in range(3)]
        out.extend([first - gone + ranks[axis][here[axis][c]] for axis in range(3)] for c in stay)
        before = max(len({here[axis][c] for c in run}) for axis in (1, 2))
        after = max(len(ranks[axis]) for axis in (1, 2))
        gone += before - after

    for column in columns:
        if native.visual[row, column]:
            run.append(column)
            continue
        if run:
            close(run)
            run = []
        assert keep[row, column], "a text token was dropped"
        out.append([here[axis][column] - gone for axis in range(3)])
        next_free = here[0][column] + 1
    assert not run, "the samples end with text"
    return torch.tensor(out).T, next_free - gone


def visible(family: str, types: Tensor, present: Tensor) -> Tensor:
    """(n, n) bool: which query sees which key. types: (n,). present: (n,) bool, False for tokens that were dropped.

    Causal, and both ways inside each image block (Gemma 3), over the whole prompt (PaliGemma), among all image tokens
    (Molmo 2). A dropped token sees only itself: nobody reads its row, but it must stay finite.
    """
    n = len(types)
    allowed = torch.tril(torch.ones(n, n, dtype=torch.bool))
    if family == "gemma3":
        block = torch.cumsum((types == 1) & (torch.nn.functional.pad(types, (1, 0))[:-1] != 1), 0)
        image = types == 1
        allowed |= (block[:, None] == block) & image[:, None] & image
    elif family == "paligemma":
        allowed |= (types[:, None] == 0) & (types == 0)
    elif family == "molmo2":
        allowed |= (types[:, None] == 1) & (types == 1)
    return (allowed & present) | torch.eye(n, dtype=torch.bool)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(q, k) bool as a (1, 1, q, k) additive mask, which every attention implementation takes."""
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[None, None]


# -- the answers -------------------------------------------------------------------------------------------------------

Change = Callable[[int, Tensor], Tensor]
"""(row, (L, D) embeddings or DeepStack plane of that prompt) -> the same with merged tokens written in."""


@dataclass
class Answer:
    """prompt: per row the logits (K, V) at its kept tokens. steps: (B, T, V) logits after each forced token."""

    prompt: list[Tensor]
    steps: Tensor


@torch.no_grad()
def reference(
    tiny: TinyVLM, native: Native, keep: Tensor, positions: str, forced: Tensor, change: Change | None = None
) -> Answer:
    """Logits of the pruned prompt and of `forced` (B, T) tokens after it; every row is computed alone, without padding.

    keep: (B, L) bool columns that survive. positions: "keep" or "compact". change: writes merged features. Recurrent
    layers know no masking (a masked token still decays their state), so hybrid models run the cut sequence in both
    modes.
    """
    from transformers import DynamicCache

    model, embed = tiny.model, tiny.model.get_input_embeddings()
    lm = language_model(model)
    cut = positions == "compact" or tiny.family in HYBRID
    prompt, steps = [], []
    for row in range(keep.shape[0]):
        used = native.real[row] & keep[row] if cut else native.real[row]
        if positions == "compact":
            where, next_position = recount(native, keep, row)
        else:
            where = native.positions[:, row, used] if native.mrope else native.positions[row, used][None]
            next_position = int(where[:, -1].max()) + 1
        embeds, planes = native.embeds[row], [plane[row] for plane in native.planes]
        if change is not None:
            embeds, planes = change(row, embeds), [change(row, plane) for plane in planes]
        present = keep[row][used]
        cache = DynamicCache(config=model.config.get_text_config())
        call: dict[str, Any] = {
            "inputs_embeds": embeds[used][None],
            "position_ids": where[:, None] if native.mrope else where,
            **with_cache(cache),
            "use_cache": True,
        }
        if planes:
            visual = native.visual[row][used]
            call["visual_pos_masks"] = visual[None]
            call["deepstack_visual_embeds"] = [plane[used][visual] for plane in planes]
        if tiny.family in HYBRID:
            call["attention_mask"] = torch.ones(1, int(used.sum()), dtype=torch.long)
        else:
            call["attention_mask"] = additive(visible(tiny.family, native.types[row][used], present), embeds.dtype)
        hidden = lm(**call).last_hidden_state
        prompt.append(model.lm_head(hidden)[0][present])
        told = []
        for step, token in enumerate(forced[row]):
            present = torch.cat([present, torch.ones(1, dtype=torch.bool)])
            at = torch.full((1, 1), next_position + step)
            if tiny.family in HYBRID:
                mask = torch.ones(1, len(present), dtype=torch.long)
            else:
                mask = additive(present[None], embeds.dtype)
            hidden = lm(
                inputs_embeds=embed(token[None, None]),
                position_ids=at.expand(3, 1, 1) if native.mrope else at,
                **with_cache(cache),
                attention_mask=mask,
                use_cache=True,
            ).last_hidden_state
            told.append(model.lm_head(hidden)[0, 0])
        steps.append(torch.stack(told) if told else embeds.new_zeros(0))
    return Answer(prompt, torch.stack(steps))


# -- the pruned model's side -------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a model gave for a prompt. logits: (B, L, V) of a forward. tokens: (B, T). steps: (B, T, V) logits of
    generate()."""

    logits: Tensor
    tokens: Tensor
    steps: Tensor


@torch.no_grad()
def run(tiny: TinyVLM, inputs: Any, new_tokens: int = 5) -> Run:
    """One forward and one greedy generation, with the prompt checked to come back as it went in."""
    logits = tiny.model(**inputs).logits
    out = tiny.model.generate(**inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True)
    ids = inputs["input_ids"]
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    assert logits.shape[:2] == ids.shape
    return Run(logits, out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1))


def apart(got: Sequence[Tensor] | Tensor, wanted: Sequence[Tensor] | Tensor) -> float:
    """Largest absolute difference over all pairs."""
    return max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))


@dataclass
class Prompt:
    """A batch of prompts for one family, and what its unpruned model makes of it by either way."""

    tiny: TinyVLM
    inputs: Any
    forward: Native
    generate: Native
    unpruned: Run

    def __post_init__(self) -> None:
        self.real = self.generate.real
        self.visual = self.generate.visual

    def distance(self, keep: Tensor, positions: str, got: Run, change: Change | None = None) -> float:
        """How far `got` is from the reference: logits at kept prompt columns, first logits of generate(), decode
        steps."""
        forward = reference(self.tiny, self.forward, keep, positions, got.tokens[:, :0], change)
        generate = reference(self.tiny, self.generate, keep, positions, got.tokens[:, :-1], change)
        return max(
            apart([got.logits[row][keep[row]] for row in range(len(keep))], forward.prompt),
            apart(got.steps[:, 0], [logits[-1] for logits in generate.prompt]),
            apart(got.steps[:, 1:], generate.steps),
        )


def prompt_of(tiny: TinyVLM, parts: list[list[Part]], padding_side: str = "left") -> Prompt:
    """Watch the unpruned model on `parts`."""
    inputs = tiny.inputs(parts, padding_side)
    return Prompt(tiny, inputs, observe(tiny, inputs, "forward"), observe(tiny, inputs), run(tiny, inputs))


@functools.lru_cache(None)
def _watched(family: str, kind: str) -> Prompt:
    return prompt_of(_built(family), samples(kind))


def prompt(family: str, kind: str = "image") -> Prompt:
    """The samples of a kind for a family, watched once for all tests."""
    used.add(family)
    return _watched(family, kind)


def cases(families: Sequence[str]) -> list[tuple[str, str]]:
    """(family, kind of prompt) pairs that these families take."""
    kinds = {"image": families, "video": VIDEO, "mixed": MIXED}
    return [(family, kind) for family in families for kind, takers in kinds.items() if family in takers]
