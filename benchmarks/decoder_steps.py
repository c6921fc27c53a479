"""What a decode step costs behind a drop inside the LLM, beside the plain model on a cache of the same keys.

python benchmarks/decoder_steps.py --json benchmarks/results/decoder_steps.json     five minutes of one quiet CPU thread

Two models on the same weights (`decoder_memory.llava`, random) write the same tokens in turns: the pruned
one on the cache that its prefill left, the other on a plain cache of the same keys. What differs is what the pruning
does in a step. Times are the thread's CPU time, in pairs, the first of a pair taking turns; the same is done with two
plain ones, which shows what chance does. One LLM is so narrow that its steps are mostly Python, the other is the
smallest that people use.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from decoder_memory import llava, prompt
from encoder_record import save
from transformers import DynamicCache

import tokprune
from tokprune.adapters.dialect import CACHE, cache_of, parameters
from tokprune.profiling.memory import cached_tokens
from tokprune.registry import get_method

STEPS, WARM_UP = 200, 20
SIZES: dict[str, dict[str, int]] = {
    "32 layers of width 256": {},
    "24 layers of width 896 (0.5B)": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}  # fmt: skip
SETTINGS = {
    "fastv": get_method("fastv"),
    "pyramiddrop": get_method("pyramiddrop"),
    "pyramiddrop, kept positions": get_method("pyramiddrop"),
}


class Writer:
    """One model that writes an answer token by token."""

    def __init__(self, model: Any, cache: Any, at: int) -> None:
        self.model, self.cache, self.at = model, cache, at
        self.name = next(name for name in CACHE if name in parameters(type(model).forward))

    def step(self, token: int) -> tuple[float, torch.Tensor]:
        """Seconds of one step, and its logits."""
        call = {"input_ids": torch.tensor([[token]]), "position_ids": torch.tensor([[self.at]]), self.name: self.cache}
        start = time.thread_time()
        out = self.model(**call, use_cache=True)
        seconds = time.thread_time() - start
        self.at += 1
        return seconds, out.logits[0, -1]


def twin(model: Any) -> Any:
    """Another model on the same weights: copied ones would lie elsewhere in memory, which alone is a few percent."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def plain_cache(cache: Any) -> DynamicCache:
    """The keys of a cache in one that knows nothing of a pruning."""
    plain = DynamicCache()
    for i, layer in enumerate(cache.layers):
        plain.update(layer.keys.clone(), layer.values.clone(), i)
    return plain


def ratios(first: Writer, second: Writer, steps: int) -> tuple[list[float], list[float], list[float], float]:
    """first / second of each pair, the seconds of each, and how far apart the logits were at most."""
    times: tuple[list[float], list[float]] = ([], [])
    far = 0.0
    for n in range(WARM_UP + steps):
        token, order = 3 + n % 80, (0, 1) if n % 2 else (1, 0)
        told: list[Any] = [None, None]
        for which in order:
            told[which] = (first, second)[which].step(token)
        far = max(far, float((told[0][1] - told[1][1]).abs().max()))
        if n >= WARM_UP:
            times[0].append(told[0][0])
            times[1].append(told[1][0])
    return [a / b for a, b in zip(*times, strict=True)], *times, far


def summary(found: list[float]) -> dict[str, float]:
    """Median of the ratios, and half the width of its 95 % interval by order statistics."""
    ordered, n = sorted(found), len(found)
    half = round(0.98 * n**0.5)
    return {"median": statistics.median(found), "low": ordered[n // 2 - half], "high": ordered[n // 2 + half]}


@torch.no_grad()
def measure(steps: int = STEPS) -> list[dict[str, Any]]:
    """For each size, one row for each setting, and one for two plain copies."""
    rows = []
    for size, text in SIZES.items():
        model = llava(**text)
        other = twin(model)
        inputs = prompt()
        n = inputs["input_ids"].shape[1]
        for name, method in {"none": None, **SETTINGS}.items():
            if method is None:
                cache = cache_of(model(**inputs, use_cache=True))
            else:
                positions = "keep" if "kept positions" in name else "auto"
                pruning = tokprune.apply(model, method, positions=positions)
                cache = cache_of(model(**inputs, use_cache=True))
            tokens, drops = cached_tokens(cache), 0 if method is None else len(pruning.last.drops)
            found, mine, plain, far = ratios(Writer(model, cache, n), Writer(other, plain_cache(cache), n), steps)
            if method is not None:
                pruning.remove()
            row = {"size": size, "setting": name, "drops": drops, "keys": tokens, "apart": far, **summary(found)}
            row |= {"ms": 1e3 * statistics.median(mine), "plain_ms": 1e3 * statistics.median(plain)}
            rows.append(row)
            print({k: v for k, v in row.items() if k != "keys"}, flush=True)
    return rows


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    save(options.json, "tokprune.decoder_steps", {"steps": options.steps, "rows": measure(options.steps)})


if __name__ == "__main__":
    main()
