"""What methods inside the LLM save in memory: peak of the prefill and bytes of the KV cache, counted beside arithmetic.

python benchmarks/decoder_memory.py --json benchmarks/results/decoder_memory.json     a minute of one CPU thread

The model has LLaVA-1.5-7B's depth and prompt (32 layers, 576 visual tokens, 36 others) at a sixteenth of its width and
random weights: what is counted are bytes of live tensors, which depend on shapes alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from encoder_record import save
from torch import Tensor

import tokprune
from tokprune.adapters.dialect import cache_of
from tokprune.budget import kept
from tokprune.methods.base import Method
from tokprune.methods.cache_base import CompactMethod
from tokprune.profiling.memory import cached_tokens, kv_cache_bytes, live_peak
from tokprune.registry import get_method

LAYERS, WIDTH, HEADS, TEXT, SIDE = 32, 256, 8, 36, 24
VISUAL = SIDE * SIDE
PAIR = 2 * WIDTH * 4
"""Bytes of the key and the value of one token in one layer."""

SETTINGS: dict[str, Sequence[Method]] = {
    "none": (),
    "fastv, half": (get_method("fastv"),),
    "fastv, a tenth": (get_method("fastv", share=0.1),),
    "vtw": (get_method("vtw"),),
    "pyramiddrop": (get_method("pyramiddrop"),),
    "pyramiddrop + mustdrop_cache": (get_method("pyramiddrop"), get_method("mustdrop_cache")),
    "mustdrop to 64": (get_method("mustdrop", schedule=((3, 0.5), (7, 0.3), (11, 0.2), (15, 1 / 9))),),
    "mustdrop to 64 + mustdrop_cache": (
        get_method("mustdrop", schedule=((3, 0.5), (7, 0.3), (11, 0.2), (15, 1 / 9))),
        get_method("mustdrop_cache"),
    ),
    "fastkv": (get_method("fastkv"),),
    "fastkv, all propagated": (get_method("fastkv", propagated=1.0),),
    "kvmerger": (get_method("kvmerger"),),
    "kvmerger, a tenth": (get_method("kvmerger", retention=0.1),),
    "dycoke_cache": (get_method("dycoke_cache"),),
}


def llava(**text: int) -> Any:
    """The model, in eval mode. text: what its LLM has otherwise."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=14 * SIDE,
        patch_size=14,
    )
    size = {"hidden_size": WIDTH, "intermediate_size": 688, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**{**size, **text}, vocab_size=100), image_token_index=99
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def prompt() -> dict[str, Tensor]:
    """One picture between words."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (1, TEXT + VISUAL), generator=generator)
    ids[:, 5 : 5 + VISUAL] = 99
    pixels = torch.randn(1, 3, 14 * SIDE, 14 * SIDE, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def tokens_by_arithmetic(methods: Sequence[Method], drops: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Tokens that each layer works on, and those whose keys stay. drops: layer and visual tokens left."""
    works = [next((n for at, n in reversed(drops) if at <= i), VISUAL) for i in range(LAYERS)]
    stays = list(works)
    for method in methods:
        if getattr(method, "follows", False):
            stays = [drops[-1][1] if i >= drops[0][0] - 1 else n for i, n in enumerate(works)]
        elif isinstance(method, CompactMethod):
            stays = [min(n, kept(VISUAL, method.share)) for n in works]
    return [n + TEXT for n in works], [n + TEXT for n in stays]


def peak_by_arithmetic(row: dict[str, Any], per_token: float, beside: float) -> int:
    """The most that is alive at once: keys of the layers so far, those of the running one whole, and what it computes.

    per_token: bytes that a layer computes on the way per token. beside: what is alive beside the layers.
    """
    cut_behind_all, most, held = "mustdrop_cache" in row["setting"], 0.0, 0
    for works, stays in zip(row["works"], row["tokens"], strict=True):
        scratch = 2 * 4 * HEADS * works * works if row["setting"].startswith("kvmerger") else 0  # a map, twice
        most = max(most, held + works * PAIR + max(per_token * works, scratch) + beside)
        held += (works if cut_behind_all else stays) * PAIR
    return round(most)


@torch.no_grad()
def measure(model: Any, methods: Sequence[Method]) -> dict[str, Any]:
    """Bytes of one prefill: peak beyond weights and inputs, what the cache holds, and the same by arithmetic."""
    inputs = prompt()
    existing = [*model.parameters(), *model.buffers(), *inputs.values()]
    base = sum(t.untyped_storage().nbytes() for t in existing)

    def run() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    if not methods:
        out, peak = live_peak(run, existing)
        drops: list[tuple[int, int]] = []
    else:
        with tokprune.apply(model, list(methods)) as pruning:
            out, peak = live_peak(run, existing)
            drops = [(d.layer, d.kept[0]) for d in pruning.last.drops]
    works, stays = tokens_by_arithmetic(methods, drops)
    cache = cache_of(out)
    return {
        "peak": peak - base,
        "works": works,
        "tokens": cached_tokens(cache),
        "cache": kv_cache_bytes(cache),
        "cache_by_arithmetic": sum(stays) * PAIR,
    }


def measured(settings: dict[str, Sequence[Method]]) -> dict[str, Any]:
    """All settings, with their peaks by arithmetic; "none" and "fastv, half" must be among them.

    These two tell what no arithmetic does: bytes of a layer per token, and bytes beside the layers.
    """
    model = llava()
    rows = [{"setting": name, **measure(model, methods)} for name, methods in settings.items()]
    whole, half = (next(r for r in rows if r["setting"] == name) for name in ("none", "fastv, half"))
    (most, n), (less, few) = ((r["peak"] - r["cache"], r["works"][-1]) for r in (whole, half))
    per_token = (most - less) / (n - few)
    beside = most - per_token * n
    for row in rows:
        row["peak_by_arithmetic"] = peak_by_arithmetic(row, per_token, beside)
    shape = {"layers": LAYERS, "width": WIDTH, "visual": VISUAL, "text": TEXT, "bytes_per_token": PAIR}
    return {"shape": {**shape, "layer_bytes_per_token": per_token, "bytes_beside": beside}, "rows": rows}


def main() -> None:
    """Measure all settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(SETTINGS)
    for row in found["rows"]:
        print({k: v for k, v in row.items() if k not in ("works", "tokens")})
    save(options.json, "tokprune.decoder_memory", found)


if __name__ == "__main__":
    main()
