"""Encoder methods on the demo VLM at matched FLOPs of its tower: accuracy and encoder time. Run by encoder_speed.py
--demo."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from encoder_record import flops, wall

import tokprune
import tokprune.demo
from tokprune.demo.asking import BATCH, Asker
from tokprune.runtime.encoder import apply_encoder

TOLERANCE = 0.02
PICTURES = 8  # on which FLOPs and time are measured


@dataclass(frozen=True)
class Setting:
    """A method, and the option that sets its strength: a share, larger = more tokens."""

    name: str
    method: str
    knob: str = "ratio"
    options: tuple[tuple[str, Any], ...] = ()

    def arguments(self, share: float) -> dict[str, Any]:
        """Of apply."""
        return {**dict(self.options), self.knob: share}


SETTINGS = (
    Setting("tome", "tome"),
    Setting("tome, random pairs", "tome", options=(("matching", "random"),)),
    Setting("auroracap, as published", "auroracap", "keep", (("compat", "published"),)),
    Setting("pitome", "pitome"),
    Setting("tofu", "tofu"),
    Setting("evit", "evit"),
    Setting("ats", "ats"),
    Setting("ats, from block 2", "ats", options=(("first", 2),)),
    Setting("ats, from block 3", "ats", options=(("first", 3),)),
    Setting("zerotprune", "zerotprune"),
    Setting("apt, resize", "apt"),
    Setting("apt, mean", "apt", options=(("embed", "mean"),)),
    Setting("ipcv", "ipcv", "keep", (("first", 0), ("steady", 1))),
    Setting("toc3d router", "toc3d", "keep", (("first", 0),)),
)


def matched(count: Callable[[float], float], target: float, steps: int = 10) -> tuple[float, float]:
    """The share at which `count` (a share of the tower's FLOPs, growing with it) comes closest to `target`."""
    low, high = 0.02, 1.0
    best = (high, count(high))
    if best[1] < target - TOLERANCE:  # even the weakest setting saves more
        return best
    for _ in range(steps):
        middle = (low + high) / 2
        found = count(middle)
        if abs(found - target) < abs(best[1] - target):
            best = (middle, found)
        if abs(found - target) < TOLERANCE / 4:
            break
        low, high = (middle, high) if found < target else (low, middle)
    return best


def run(questions: int, targets: list[float], rounds: int) -> list[dict[str, Any]]:
    """One row per method and target.

    places: the LLM sees one token per group (methods that restore the sequence: all tokens). copies: it sees all
    places, merged tokens repeated; None for methods that drop tokens. encoder_ms: one picture in the tower, median over
    rounds that alternate with the unreduced tower, whose median in these rounds stands beside.
    """
    model, processor = tokprune.demo.load()
    asker, tower = Asker(model, processor), model.model.vision_tower
    examples = tokprune.demo.held_out(questions)
    pixels = processor.image_processor([e.image for e in examples[:PICTURES]], return_tensors="pt")["pixel_values"]

    def encode() -> Any:
        with torch.no_grad():
            return tower(pixels)

    def right() -> float:
        batches = [examples[at : at + BATCH] for at in range(0, len(examples), BATCH)]
        words = [word for batch in batches for word in asker.answers(asker.inputs(batch))]
        return sum(word == example.answer for word, example in zip(words, examples, strict=True)) / len(examples)

    whole = flops(encode)
    encode()
    base = right()
    plain = 1e3 * statistics.median(wall(encode) for _ in range(rounds)) / PICTURES
    rows: list[dict[str, Any]] = [
        {
            "method": "none",
            "target": 1.0,
            "flops": 1.0,
            "matched": True,
            "left": 1.0,
            "places": base,
            "copies": base,
            "encoder_ms": plain,
            "baseline_ms": plain,
            "speedup": 1.0,
        }
    ]
    print(f"{'none':32} accuracy {base:.3f}  {plain:.2f} ms a picture")
    for target in targets:
        for setting in SETTINGS:
            row = measure(setting, target, model, processor, encode, right, whole, rounds)
            rows.append(row)
            print(
                f"{setting.name:32} FLOPs {row['flops']:.3f}{'' if row['matched'] else ' (not matched)'}  "
                f"left {row['left']:.2f}  accuracy {row['places']:.3f} ({row['copies'] or '-'} with copies)  "
                f"{row['encoder_ms']:.2f} ms  x{row['speedup']:.2f}",
                flush=True,
            )
    return rows


def measure(
    setting: Setting,
    target: float,
    model: Any,
    processor: Any,
    encode: Callable[[], Any],
    right: Callable[[], float],
    whole: int,
    rounds: int,
) -> dict[str, Any]:
    """One method at one share of the tower's FLOPs."""

    def count(share: float) -> float:
        with apply_encoder(model, setting.method, processor=processor, **setting.arguments(share)):
            return flops(encode) / whole

    share, found = matched(count, target)
    arguments = setting.arguments(share)
    plain, reduced = [], []
    for _ in range(rounds):
        plain.append(wall(encode))
        with apply_encoder(model, setting.method, processor=processor, **arguments) as pruning:
            reduced.append(wall(encode))
    report = pruning.report()
    copies = None
    with tokprune.apply(model, setting.method, processor=processor, **arguments):
        places = right()
    if pruning.encoder.method.info.merges:
        with apply_encoder(model, setting.method, processor=processor, **arguments):
            copies = right()
    before, after = (1e3 * statistics.median(v) / PICTURES for v in (plain, reduced))
    return {
        "method": setting.name,
        "arguments": {"method": setting.method, **arguments},
        "target": target,
        "flops": found,
        "matched": abs(found - target) <= TOLERANCE * target,
        "left": sum(report.left) / len(report.left) / report.start,
        "places": places,
        "copies": copies,
        "encoder_ms": after,
        "baseline_ms": before,
        "speedup": before / after,
    }
