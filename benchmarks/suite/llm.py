"""Prefill and decode of pruned models beside the LLM fed the reduced embeddings by hand, and what signals cost a tower.

Weights are random: time does not depend on them. Every run is a generate(); of the time to the first token the tower is
left out, which is the same for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

import tokprune
from benchmarks.suite.rows import Row, paired, ratio, threads
from tokprune.profiling.build import build_random
from tokprune.profiling.inputs import random_inputs
from tokprune.profiling.presets import Preset, preset
from tokprune.profiling.runs import Profiler, ProfileRun
from tokprune.profiling.timing import Measurement, interleave
from tokprune.types import JsonObject

METHODS = ("divprune", "hired")
KEEP = 0.1
SMALL = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2,
}  # fmt: skip
"""The LLM of half a billion parameters that LLaVA-OneVision-0.5B and InternVL3-1B have."""


@dataclass(frozen=True)
class Aims:
    """What the rows of one device aim at."""

    ideal: float
    """Speed of the prefill over that of the reduced embeddings fed by hand, at least."""
    share: float | None = None
    """Share of the pruned prefill that selection and hooks take, at most."""
    decode: float | None = None
    """Speed of decoding over that behind reduced embeddings, at least."""


def shrunk(name: str, text: Mapping[str, Any], tower: Mapping[str, Any]) -> Preset:
    """A known model with another LLM and fewer blocks in its tower: the pictures become as many tokens as before."""
    known = preset(name)
    config = {**known.config, "text_config": {**known.config["text_config"], **text}}
    config["vision_config"] = {**known.config["vision_config"], **tower}
    if name.startswith("qwen"):
        heads = config["text_config"]["hidden_size"] // config["text_config"]["num_attention_heads"]
        rope = {**config["text_config"]["rope_parameters"], "mrope_section": _sections(heads // 2)}
        config["text_config"]["rope_parameters"] = rope
        config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
        config["vision_config"]["fullatt_block_indexes"] = [config["vision_config"]["depth"] - 1]
    return replace(known, config=config)


def _sections(pairs: int) -> list[int]:
    """Time, height and width of M-RoPE, split as Qwen does: a quarter, and the rest in halves."""
    first = pairs // 4
    return [first, (pairs - first) // 2, pairs - first - (pairs - first) // 2]


def half_billion(name: str) -> Preset:
    """As many tokens, from a tiny tower, in front of an LLM of half a billion parameters."""
    return shrunk(name, {**SMALL}, _tower(name))


def _tower(name: str) -> dict[str, Any]:
    """A tower that takes next to no time."""
    blocks = (
        {"depth": 2, "num_heads": 2} if name.startswith("qwen") else {"num_hidden_layers": 3, "num_attention_heads": 2}
    )
    return {"hidden_size": 32, "intermediate_size": 64, **blocks}


def tiny(name: str) -> Preset:
    """A size that any machine runs in seconds."""
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    return shrunk(name, text, _tower(name))


def ragged(known: Preset, model: Any, batch: int, size: tuple[int, int] | None = None) -> JsonObject:
    """Prompts of different lengths, padded on the left; pictures of two sizes where size decides their tokens."""
    size = size or known.default_size
    sizes = [size, (size[0] * 3 // 4, size[1])]
    parts = [random_inputs(known, model, sizes[i % 2], text=32 + 12 * i, seed=i) for i in range(batch)]
    longest = max(part["input_ids"].shape[1] for part in parts)

    def column(name: str) -> torch.Tensor:
        values = [part[name] for part in parts]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            values = [nn.functional.pad(v, (longest - v.shape[1], 0)) for v in values]
        return torch.cat(values)

    return {name: column(name) for name in parts[0]}


def prefill_rows(
    title: str, model: Any, inputs: JsonObject, aims: Aims, *, repeats: int, new_tokens: int = 9, plain: int = 3
) -> list[Row]:
    """Rows of one model and batch. plain: runs of it unpruned, for the speed-up itself."""
    device = next(model.parameters()).device
    profiler = Profiler(model, new_tokens, device)
    runs = {m: ProfileRun(m, "pruned", inputs, m, m, KEEP) for m in METHODS}
    with torch.no_grad():
        runs["ideal"] = profiler.ideal(ProfileRun("uniform", "pruned", inputs, "uniform", ratio=KEEP), "ideal")
        found = interleave({name: partial(profiler.once, run) for name, run in runs.items()}, repeats, 1)
        whole = [_prefill(profiler.once(ProfileRun("plain", "plain", inputs))) for _ in range(plain)]
    first = {name: _column(times) for name, times in found.items()}
    ideal = Measurement("ideal", "ms", tuple(first["ideal"]))
    rows = []
    for method in METHODS:
        beside = {"pruned_ms": Measurement("", "ms", tuple(first[method])).median, "ideal_ms": ideal.median}
        beside |= {"columns": runs[method].prompt, "visual": runs[method].visual}
        # From the projector to the LLM, over the same of the run that chooses nothing (embedding the text).
        chosen = [found[n]["select"].median for n in (method, "ideal")]
        beside |= {"choice_ms": chosen[0] - chosen[1]}
        if whole:
            beside |= {"plain_ms": median(whole), "speedup": median(whole) / beside["pruned_ms"]}
        what = f"{title}: prefill with {method}, speed against embeddings by hand"
        limit = LIMITS["prefill"].format(**beside)
        rows.append(Row(what, ratio(what, first["ideal"], first[method]), aims.ideal, True, limit, beside))
        if aims.share is not None:
            what = f"{title}: selection and hooks of {method}, share of the pruned prefill"
            shares = tuple(1 - i / p for i, p in zip(first["ideal"], first[method], strict=True))
            rows.append(Row(what, Measurement(what, "", shares), aims.share, False, limit, beside))
        what = f"{title}: decoding behind {method}, speed against embeddings by hand"
        speeds = [found[n]["decode_tokens_per_s"].samples for n in (method, "ideal")]
        beside = {f"{n}_tokens_per_s": found[n]["decode_tokens_per_s"].median for n in (method, "ideal")}
        rows.append(Row(what, ratio(what, *speeds), aims.decode, True, LIMITS["decode"], beside))
    return rows


LIMITS = {
    "prefill": "in the same runs the choice took {choice_ms:.0f} of {pruned_ms:.0f} ms; the rest is the LLM's own, "
    "over as many columns as by hand",
    "decode": "four operations a step; the few long steps of eight rows differ by more than those take",
    "signals": "queries and keys of the block are made ready in float32, beside the tower's own",
}


def _prefill(times: Mapping[str, float]) -> float:
    return times["ttft"] - times["vision"] - times["projector"]


def _column(times: Mapping[str, Measurement]) -> list[float]:
    names = ("ttft", "vision", "projector")
    return [
        _prefill(dict(zip(names, row, strict=True))) for row in zip(*(times[n].samples for n in names), strict=True)
    ]


def prefill(name: str, title: str, size: tuple[int, int] | None = None) -> Iterator[Row]:
    """The pictures of a known model in front of half a billion parameters, batch 1 and ragged 8. size: of a picture."""
    threads(1)
    aims = Aims(0.95, decode=0.95)
    known = half_billion(name)
    model = build_random(known, "cpu", torch.float32)
    what = f"{title} pictures, LLM 0.5B"
    yield from prefill_rows(
        f"{what}, batch 1", model, random_inputs(known, model, size), aims, repeats=5, new_tokens=17, plain=1
    )
    # Without an unpruned run, which would take minutes.
    eight = ragged(known, model, 8, size)
    yield from prefill_rows(f"{what}, ragged batch of 8", model, eight, aims, repeats=3, new_tokens=9, plain=0)


def signals(repeats: int = 15, blocks: int = 3) -> list[Row]:
    """What reading attention costs CLIP-L/14 at 336 pixels under its own SDPA.

    At most two of its 24 blocks are read, whatever is between: so what reading adds is measured on a tower of few
    blocks, where it is not lost in the spread of the others, and told as a share of 24.
    """
    threads(1)
    known = shrunk("llava-1.5-7b", {**SMALL, "num_hidden_layers": 1}, {"num_hidden_layers": blocks})
    model = build_random(known, "cpu", torch.float32)
    pixels = random_inputs(known, model)["pixel_values"]
    named = {"visionzip": "one row of [CLS]", "hired": "rows of [CLS]", "hiprune": "received attention of two blocks"}

    def encode(method: str | None) -> None:
        with torch.no_grad():
            if method is None:
                model.model.get_image_features(pixels)
                return
            with tokprune.apply(model, method, ratio=KEEP):
                model.model.get_image_features(pixels)

    cells = {"plain": partial(encode, None)} | {name: partial(encode, name) for name in named}
    found = paired(cells, time.process_time, repeats)
    rows = []
    for method, kind in named.items():
        what = f"CLIP-L/14-336 on one thread: {kind} ({method}), time over the tower's"
        over = tuple((a / b - 1) * blocks / 24 for a, b in zip(found[method], found["plain"], strict=True))
        beside = {"plain_ms": sorted(found["plain"])[repeats // 2], "blocks": blocks}
        rows.append(Row(what, Measurement(what, "", over), 0.02, False, LIMITS["signals"], beside))
    return rows
