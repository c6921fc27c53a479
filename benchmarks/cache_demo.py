"""Cache methods on the demo VLM: a second question on the keys that the first one left, at equal numbers of keys.

python benchmarks/cache_demo.py --json benchmarks/results/cache_demo.json     some minutes of one CPU thread

A one-word answer comes out of the prefill, before a cache method has done anything. So every picture is shown with a
first question that is the same for all (FIRST), and the question that counts comes as a second turn, its words one by
one, as decode steps: all that they learn of the picture is in the cache. Settings are compared at the same mean number
of visual keys that a step reads, over layers; at that a step's FLOPs are equal, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from decoder_demo import VISUAL, Bench, arguments, draw
from encoder_record import save
from torch import Tensor

from tokprune.adapters.dialect import CACHE, cache_of, parameters
from tokprune.demo.asking import BATCH
from tokprune.demo.scenes import Example
from tokprune.methods.base import Method
from tokprune.profiling.memory import cached_tokens
from tokprune.registry import get_method

FIRST = "how many shapes are there ?"
SHARES = (0.5, 0.25, 0.1)
CONNECTORS = ("random", "uniform", "pool", "divprune", "dart", "visionzip", "scope", "cdpruner")
LAYERS = 4

Built = tuple[Sequence[Method], float | None]
"""Methods, and the ratio that apply() takes."""


def held(shares: Sequence[float]) -> float:
    """Mean over layers; `shares` from layer 0 on, the last one to the end."""
    return sum([*shares, *[shares[-1]] * (LAYERS - len(shares))]) / LAYERS


def solved(mean: Callable[[float], float], target: float) -> float | None:
    """The strength x in (0, 1) at which an ascending mean is `target`, to a visual token; None where there is none."""
    shares = [n / VISUAL for n in range(1, VISUAL + 1)]
    best = min(shares, key=lambda x: abs(mean(x) - target))
    return best if abs(mean(best) - target) < 1 / VISUAL else None


def after_one(name: str, **options: Any) -> Callable[[float], Built | None]:
    """A drop in front of layer 1, which leaves layer 0 whole."""

    def build(share: float) -> Built | None:
        x = solved(lambda x: held((1, x)), share)
        return None if x is None else ((get_method(name, schedule=((1, x),), **options),), None)

    return build


def in_steps(name: str, *more: str) -> Callable[[float], Built | None]:
    """Equal factors in front of layers 1, 2 and 3; with mustdrop_cache all layers hold what is left at last."""

    def build(share: float) -> Built | None:
        x = share if more else solved(lambda x: held((1, x ** (1 / 3), x ** (2 / 3), x)), share)
        if x is None:
            return None
        schedule = tuple((layer, x ** (layer / 3)) for layer in (1, 2, 3))
        return (get_method(name, schedule=schedule), *map(get_method, more)), None

    return build


def reads(share: float) -> Built | None:
    """dycoke_cache from layer 1 on, which holds all keys and reads some."""
    x = solved(lambda x: held((1, x)), share)
    return None if x is None else ((get_method("dycoke_cache", layer=1, pruning_rate=1 - x),), None)


def fastkv(share: float, propagated: float | None = None) -> Built:
    """Every layer keeps `share` of the keys; as many tokens go on behind half of the layers, or `propagated`."""
    return (get_method("fastkv", propagated=share if propagated is None else propagated, retention=share),), None


SETTINGS: dict[str, tuple[str, Callable[[float], Built | None]]] = {
    **{name: ("connector", lambda share, name=name: ((get_method(name),), share)) for name in CONNECTORS},  # type: ignore[misc]
    "fastv, layer 1": ("decoder", after_one("fastv")),
    "topv, layer 1": ("decoder", after_one("topv")),
    "dart_llm, layer 1": ("decoder", after_one("dart_llm")),
    "llavolta, layer 1": ("decoder", after_one("llavolta")),
    "pyramiddrop": ("decoder", in_steps("pyramiddrop")),
    "sparsevlm": ("decoder", in_steps("sparsevlm")),
    "sparsevlm_plus": ("decoder", in_steps("sparsevlm_plus")),
    "mustdrop": ("decoder", in_steps("mustdrop")),
    "dycoke_cache, layer 1": ("cache (reads)", reads),
    "mustdrop + mustdrop_cache": ("cache", in_steps("mustdrop", "mustdrop_cache")),
    "pyramiddrop + mustdrop_cache": ("cache", in_steps("pyramiddrop", "mustdrop_cache")),
    "fastkv, as many go on": ("cache", fastkv),
    "fastkv, all go on": ("cache", lambda share: fastkv(share, 1.0)),
    "kvmerger": ("cache", lambda share: ((get_method("kvmerger", retention=share),), None)),
}


class Turns:
    """The demo VLM in talks of two turns."""

    def __init__(self, questions: int) -> None:
        self.bench = Bench(questions)
        self.model, self.words = self.bench.model, self.bench.processor.tokenizer
        self.cache = next(name for name in CACHE if name in parameters(type(self.model).forward))
        groups: dict[int, list[Example]] = defaultdict(list)
        for example in self.bench.examples:
            groups[self._turn(example).shape[1]].append(example)
        self.batches = [g[at : at + BATCH] for g in groups.values() for at in range(0, len(g), BATCH)]

    def _turn(self, example: Example) -> Tensor:
        """(1, T) tokens behind the first answer."""
        text = f"</s> user: {example.question} assistant:"
        ids: Tensor = self.words(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return ids

    @torch.no_grad()
    def right(self) -> tuple[float, list[int]]:
        """Share of second questions answered right, and the keys that each layer held behind the first prompt."""
        right, tokens = 0, []
        for examples in self.batches:
            inputs = self.bench.asker.prepare([FIRST] * len(examples), [e.image for e in examples])
            out = self.model(**inputs, use_cache=True)
            cache, mask = cache_of(out), inputs["attention_mask"]
            tokens = cached_tokens(cache)
            answer = out.logits[:, -1].argmax(-1, keepdim=True)
            for word in torch.cat([answer, torch.cat([self._turn(e) for e in examples])], 1).T:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                out = self.model(input_ids=word[:, None], attention_mask=mask, use_cache=True, **{self.cache: cache})
            said = [self.words.decode(i).strip() for i in out.logits[:, -1].argmax(-1)]
            right += sum(s == e.answer for s, e in zip(said, examples, strict=True))
        return right / len(self.bench.examples), tokens

    def row(self, name: str, stage: str, share: float, built: Built | None) -> dict[str, Any]:
        """One setting. text: tokens of the first prompt that are not visual."""
        text = self.bench.asker.prepare([FIRST], [self.bench.examples[0].image])["input_ids"].shape[1] - VISUAL
        if built is None:
            accuracy, tokens = self.right()
            flops = 1.0
        else:
            with self.bench.under(list(built[0]), built[1]):
                accuracy, tokens = self.right()
                flops = self.bench.flops() / self.bench.whole
        visual = [n - text for n in tokens]
        found = {
            "method": name,
            "stage": stage,
            "share": share,
            "held": sum(visual) / LAYERS / VISUAL,
            "visual_keys": visual,
            "prefill_flops": flops,
            "accuracy": accuracy,
        }
        print(f"{name:32} {share:.2f}  keys {visual}  prefill {flops:.2f}  accuracy {accuracy:.3f}", flush=True)
        return found


def main() -> None:
    """Run it all, or draw what was found before."""
    options = arguments(__doc__.splitlines()[0], questions=280)
    if options.plot is not None:
        draw(
            options, "Demo VLM, second of two turns", "share", lambda r: r["share"], "visual keys that a step reads, %"
        )
        return
    torch.set_num_threads(1)
    turns = Turns(options.questions)
    rows = [turns.row("none", "", 1.0, None)]
    for share in SHARES:
        for name, (stage, build) in SETTINGS.items():
            built = build(share)
            if built is not None:
                rows.append(turns.row(name, stage, share, built))
    save(options.json, "tokprune.cache_demo", {"questions": options.questions, "first": FIRST, "rows": rows})


if __name__ == "__main__":
    main()
