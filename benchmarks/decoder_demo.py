"""Decoder methods on the demo VLM beside connector methods, at equal FLOPs of the LLM's prefill.

python benchmarks/decoder_demo.py --json benchmarks/results/decoder_demo.json     a few minutes of one CPU thread
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from encoder_record import save

import tokprune
import tokprune.demo
from tokprune.demo.asking import BATCH, Asker
from tokprune.methods.base import Method
from tokprune.methods.decoder.atp import calibrate, redundancy, spatial_scores
from tokprune.methods.decoder.fitprune import fit, sums
from tokprune.methods.decoder.watch import Watch
from tokprune.methods.decoder_base import at_layers
from tokprune.profiling.flops import stage_flops
from tokprune.profiling.formulas import DecoderShape, exact_prefill, prefill_share
from tokprune.registry import get_method
from tokprune.schedule import Schedule

TARGETS = (0.6, 0.4)
TOLERANCE = 0.02
SAMPLES = 32  # pictures for fitting and calibration, none of them among the questions
VISUAL = 256
CONNECTORS = (
    "random",
    "uniform",
    "pool",
    "divprune",
    "dart",
    "catp",
    "visionzip",
    "scope",
    "cdpruner",
)


@dataclass(frozen=True)
class Setting:
    """A method under the name of its row, and its options but for the strength."""

    name: str
    method: str
    stage: str = "decoder"
    options: tuple[tuple[str, Any], ...] = ()


DECODERS = (
    Setting("fastv", "fastv"),
    Setting("fastv, layer 1", "fastv", options=(("layer", 1),)),
    Setting("pyramiddrop", "pyramiddrop"),
    Setting("sparsevlm", "sparsevlm"),
    Setting("sparsevlm_plus", "sparsevlm_plus"),
    Setting("mustdrop", "mustdrop"),
    Setting("fitprune, the published curve", "fitprune"),
    Setting("topv", "topv"),
    Setting("dart_llm", "dart_llm"),
    Setting("dart_llm, layer 1", "dart_llm", options=(("layer", 1),)),
    Setting("promptdistill", "promptdistill"),
    Setting("promptdistill, layer 1", "promptdistill", options=(("layers", (1,)),)),
    Setting("llavolta", "llavolta"),
    Setting("llavolta, layer 1", "llavolta", options=(("layer", 1),)),
    Setting("catp_llm", "catp_llm"),
    Setting("atp_llava", "atp_llava"),
)
SETTINGS = (*(Setting(name, name, "connector") for name in CONNECTORS), *DECODERS)


class Bench:
    """The demo VLM, its questions, and what a setting costs and answers."""

    def __init__(self, questions: int) -> None:
        self.model, self.processor = tokprune.demo.load()
        self.scorer = tokprune.demo.load_scorer()
        self.asker = Asker(self.model, self.processor)
        self.examples = tokprune.demo.held_out(questions)
        self.one = self.asker.inputs(self.examples[:1])
        self.whole = self.flops()
        self.shape = DecoderShape.of(self.model.config)
        self.text = self.one["input_ids"].shape[1] - VISUAL

    def flops(self) -> int:
        """Of the LLM's prefill of one picture and of what is computed to choose."""
        counted = stage_flops(self.model, self.one)
        return counted.prefill + counted.select

    def right(self) -> float:
        """Share of the questions answered right."""
        batches = [self.examples[at : at + BATCH] for at in range(0, len(self.examples), BATCH)]
        words = [word for batch in batches for word in self.asker.answers(self.asker.inputs(batch))]
        return sum(w == e.answer for w, e in zip(words, self.examples, strict=True)) / len(self.examples)

    def under(self, method: Any, ratio: float | None = None) -> Any:
        """The model with a method on, for a `with` block."""
        return tokprune.apply(self.model, method, ratio=ratio, processor=self.processor, scorer=self.scorer)

    def watched(self, look: Callable[[Any], Any]) -> list[list[Any]]:
        """What `look` says of the layers, for pictures that are in no question."""
        watch = Watch(look=look)
        with torch.no_grad(), self.under(watch):
            self.model(**self.asker.inputs(tokprune.demo.held_out(SAMPLES, seed=7)))
        return watch.samples()

    def row(self, setting: Setting, target: float, method: Any, ratio: float | None) -> dict[str, Any]:
        """Cost and accuracy under a method that is on already known strength."""
        with self.under(method, ratio) as pruning:
            cost = self.flops() / self.whole
            kept = [drop.kept[0] for drop in pruning.last.drops] or [pruning.report().kept]
            accuracy = self.right()
        found = {
            "method": setting.name,
            "stage": setting.stage,
            "target": target,
            "ratio": ratio,
            "flops": cost,
            "matched": abs(cost - target) <= TOLERANCE * target,
            "kept": kept,
            "accuracy": accuracy,
        }
        print(f"{setting.name:32} FLOPs {cost:.3f}  kept {kept}  accuracy {accuracy:.3f}", flush=True)
        return found

    def forecast(self, setting: Setting, share: float) -> float:
        """FLOPs of the prefill at a ratio by arithmetic, what choosing costs left out."""
        if setting.stage == "connector":
            sizes = [round(VISUAL * share) + self.text, VISUAL + self.text]
            few, all_ = (exact_prefill(self.shape, n, head=False) for n in sizes)
            return few / all_
        method = get_method(setting.method, **dict(setting.options))
        return prefill_share(method.plan(self.shape.layers, share), self.shape, VISUAL, self.text)  # type: ignore[attr-defined]

    def aimed(
        self, setting: Setting, target: float, make: Callable[[float], Method], ratio: Callable[[float], float | None]
    ) -> dict[str, Any] | None:
        """A method at the strength that costs `target`; None where it cannot be met.

        make, ratio: the method and its ratio for a cost by arithmetic. What choosing costs, and counts that depend on
        the picture, are measured and taken off the aim.
        """
        aim = target
        for _ in range(4):
            method, share = make(aim), ratio(aim)
            with self.under(method, share):
                found = self.flops() / self.whole
            if abs(found - target) <= TOLERANCE * target / 2:
                break
            aim += target - found
        if abs(found - target) > TOLERANCE * target:
            print(f"{setting.name:32} cannot be {target:.0%}, nearest {found:.3f}")
            return None
        return self.row(setting, target, method, share)

    def at(self, setting: Setting, target: float) -> dict[str, Any] | None:
        """A method at the ratio whose FLOPs are `target`; None where it cannot go so low."""
        shares = [s / VISUAL for s in range(1, VISUAL + 1)]
        return self.aimed(
            setting,
            target,
            lambda aim: get_method(setting.method, **dict(setting.options)),
            lambda aim: min(shares, key=lambda s: abs(self.forecast(setting, s) - aim)),
        )


def fitted(bench: Bench, targets: tuple[float, ...]) -> list[dict[str, Any]]:
    """FitPrune with schedules fitted to this model, and ATP-LLaVA with thresholds calibrated on it."""
    statistics = bench.watched(sums)
    scores = bench.watched(lambda t: (redundancy(t).mean(0), spatial_scores(t.row, t.col)))
    layers = at_layers(None, (8, 16, 24), bench.shape.layers)

    def cost(schedule: Schedule) -> float:
        return prefill_share(schedule, bench.shape, VISUAL, bench.text)

    def fitprune(aim: float) -> Method:
        return get_method("fitprune", schedule=fit(statistics, cost, aim).steps)

    def atp(aim: float) -> Method:
        """Each stage calibrated on the whole picture to keep what a geometric schedule of that cost would."""
        shares = (s / VISUAL for s in range(VISUAL, 0, -1))
        steps = next(p for s in shares if cost(p := Schedule.geometric(layers, s)) <= aim).steps
        found = []
        for layer, left in steps:
            pairs = [sample[layer - 1] for sample in scores]
            found.append(calibrate([s for s, _ in pairs], [cover for _, cover in pairs], left))
        return get_method("atp_llava", thresholds=tuple(found))

    makers = {"fitprune, fitted": fitprune, "atp_llava, calibrated": atp}
    asked = [(Setting(name, name), target, make) for target in targets for name, make in makers.items()]
    rows = [bench.aimed(setting, target, make, lambda aim: None) for setting, target, make in asked]
    return [row for row in rows if row is not None]


def draw(
    options: argparse.Namespace, title: str, group: str, cost: Callable[[dict[str, Any]], float], axis: str
) -> None:
    """Accuracy against cost, of all rows of --json that are no worse than random in front of the LLM at their `group`.

    cost: of a row, 1 at all tokens.
    """
    from tokprune.viz import plots

    data = json.loads(options.json.read_text(encoding="utf-8"))
    rows = data["rows"]
    least = {r[group]: r["accuracy"] for r in rows if r["method"] == "random"}
    points = [
        plots.Point(r["method"], r.get("ratio") or r[group], r["accuracy"], cost=100 * cost(r))
        for r in rows[1:]
        if r[group] and (r["accuracy"] >= least[r[group]])
    ]
    full = plots.Point("none", 1.0, rows[0]["accuracy"], cost=100.0)
    title = f"{title}, {data['questions']} questions, none below random"
    plots.save(plots.pareto(points, full, cost=axis, title=title), options.plot)


def arguments(description: str, questions: int) -> argparse.Namespace:
    """What the demo benchmarks of decoder and cache take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--questions", type=int, default=questions)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="draw the numbers of --json instead of making them")
    return parser.parse_args()


def main() -> None:
    """Run it all, or draw what was found before."""
    options = arguments(__doc__.splitlines()[0], questions=140)
    if options.plot is not None:
        draw(options, "Demo VLM", "target", lambda r: r["flops"], "FLOPs of the LLM's prefill, %")
        return
    torch.set_num_threads(1)
    bench = Bench(options.questions)
    full = {"method": "none", "stage": "", "target": 1.0, "flops": 1.0, "accuracy": bench.right(), "kept": [VISUAL]}
    print(f"all tokens: {full['accuracy']:.3f}")
    rows: list[dict[str, Any]] = [full]
    for target in TARGETS:
        rows += [row for setting in SETTINGS if (row := bench.at(setting, target)) is not None]
    rows += fitted(bench, TARGETS)
    for layer in (1, 2, 3):
        name = f"vtw, layer {layer}"
        rows.append(bench.row(Setting(name, "vtw"), 0.0, get_method("vtw", layer=layer), None))
    save(options.json, "tokprune.decoder_demo", {"questions": options.questions, "tolerance": TOLERANCE, "rows": rows})


if __name__ == "__main__":
    main()
