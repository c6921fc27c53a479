"""What the pixels stage keeps of drawn documents, interfaces, slides and a still clip, what that saves, what it costs.

python benchmarks/pixels_demo.py --json benchmarks/results/pixels.json     measures (minutes on a CPU)
python benchmarks/pixels_demo.py --tables                                  writes the tables of docs/pixels.md

Kept shares are counted from the pixels alone, with the image processor of Qwen2.5-VL. FLOPs are those of
Qwen2.5-VL-7B: torch's counter on blocks of the tower on the meta device, closed form for the LLM. Accuracy and features
are the demo VLM's, which reads drawn scenes and no text.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pixels_drawings as drawings
import torch
from encoder_record import save
from torch import Tensor

import tokprune
from tokprune.methods.pixels_base import PixelMethod, PixelUnits
from tokprune.registry import get_method
from tokprune.runtime.encoder.pixels import of_rows

PAGE = Path(__file__).parent.parent / "docs" / "pixels.md"
THRESHOLDS = (0.0, 0.02, 0.05, 0.1)
PICTURES = 6
TEXT = 64
"""Tokens of a question beside the picture."""
PUBLISHED = {0.0: 0.517, 0.02: 0.424, 0.1: 0.344}
"""Share of the prompt's tokens on a document subset, Qwen3-VL-2B (arXiv 2604.00886)."""


def units_of(picture: Any, video: bool = False) -> tuple[PixelUnits, Tensor]:
    """The units of a picture or clip as Qwen2.5-VL's processor cuts it, 1 from black to white, and its grid."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    if video:
        processor: Any = Qwen2VLVideoProcessor(do_sample_frames=False)
        made = processor(videos=[picture], return_tensors="pt")
        pixels, grid = made["pixel_values_videos"], made["video_grid_thw"]
    else:
        processor = Qwen2VLImageProcessor()
        made = processor(images=[picture], return_tensors="pt")
        pixels, grid = made["pixel_values"], made["image_grid_thw"]
    t, h, w = grid[0].tolist()
    values = of_rows(pixels, 3, 2, 4) * torch.tensor(processor.image_std)[:, None]
    return PixelUnits(values[None], (t, h // 2, w // 2)), grid


def kept(method: PixelMethod, units: PixelUnits) -> Tensor:
    """(N,) bool."""
    return method.choose(units).kept[0]


class Cost:
    """FLOPs of Qwen2.5-VL-7B's tower and LLM for pictures of which some units are kept."""

    def __init__(self) -> None:
        from tokprune.profiling.build import build_meta
        from tokprune.profiling.presets import preset

        self.preset = preset("qwen2.5-vl-7b")
        self.tower: Any = build_meta(self.preset, torch.float32).base_model.visual

    def vision(self, keep: Tensor, grid: Tensor) -> int:
        """Of the tower's blocks over the kept units, window by window or frame by frame; patch embedding and merger run
        on everything."""
        from transformers.vision_utils import get_vision_window_index

        from tokprune.profiling.flops import count

        tower = self.tower
        sizes = {n: getattr(tower, n) for n in ("spatial_merge_size", "window_size", "patch_size")}
        order, borders = get_vision_window_index(grid, **sizes)
        t, h, w = grid[0].tolist()
        keep = keep[order]
        frame = torch.arange(t).repeat_interleave(h * w // 4)
        windows = torch.unique_consecutive(torch.as_tensor(borders)) // 4
        window = torch.repeat_interleave(torch.arange(len(windows) - 1), windows.diff())
        whole = len(tower.fullatt_block_indexes)
        rows = 4 * int(keep.sum())
        total = 0
        for segment, blocks in ((frame, whole), (window, len(tower.blocks) - whole)):
            lengths = torch.bincount(segment[keep]) * 4
            total += blocks * (self.linear(rows) + self.attention(lengths[lengths > 0].tolist()))
        embed, _ = count(lambda: tower.patch_embed(torch.empty(t * h * w, 1176, device="meta")))
        width = tower.blocks[0].attn.qkv.in_features
        merger, _ = count(lambda: tower.merger(torch.empty(t * h * w, width, device="meta")))
        return total + embed + merger

    def linear(self, rows: int) -> int:
        """Projections and MLP of one block."""
        from tokprune.profiling.flops import count

        block = self.tower.blocks[0]
        x = torch.empty(rows, block.attn.qkv.in_features, device="meta")
        return sum(
            count(call)[0] for call in (lambda: block.attn.qkv(x), lambda: block.attn.proj(x), lambda: block.mlp(x))
        )

    def attention(self, lengths: list[int]) -> int:
        """Both products of attention over segments of these lengths."""
        width = self.tower.blocks[0].attn.qkv.in_features
        return sum(4 * n * n * width for n in lengths)

    def prefill(self, visual: int) -> int:
        """Of the LLM."""
        from tokprune.profiling.formulas import exact_prefill

        return exact_prefill(self.preset.decoder, visual + TEXT)


def shares() -> list[dict[str, Any]]:
    """Kept share and FLOPs of every kind of drawing at every threshold."""
    cost, rows = Cost(), []
    for kind, draw in drawings.KINDS.items():
        pictures = [units_of(draw(seed)) for seed in range(PICTURES)]
        for method, threshold in [("pixelprune", t) for t in THRESHOLDS] + [("blank", 0.0)]:
            rows.append({"kind": kind, **one_row(method, threshold, pictures, cost)})
    clips = [units_of(drawings.clip(seed), video=True) for seed in range(3)]
    for method, threshold in [("rlt", t) for t in THRESHOLDS] + [("pixelprune", 0.0)]:
        rows.append({"kind": "still clip", **one_row(method, threshold, clips, cost)})
    return rows


def one_row(method: str, threshold: float, given: list[tuple[PixelUnits, Tensor]], cost: Cost) -> dict[str, Any]:
    """Sums over pictures of one kind."""
    rule = get_method(method, threshold=threshold)
    assert isinstance(rule, PixelMethod)
    masks = [kept(rule, units) for units, _ in given]
    full = [torch.ones_like(mask) for mask in masks]
    share = [float(mask.float().mean()) for mask in masks]

    def sums(which: list[Tensor]) -> tuple[int, int]:
        grids = [grid for _, grid in given]
        vision = sum(cost.vision(mask, grid) for mask, grid in zip(which, grids, strict=True))
        return vision, sum(cost.prefill(int(mask.sum())) for mask in which)

    (vision, prefill), (vision_full, prefill_full) = sums(masks), sums(full)
    return {
        "method": method,
        "threshold": threshold,
        "units": len(masks[0]),
        "kept": sum(share) / len(share),
        "least": min(share),
        "most": max(share),
        "vision": vision / vision_full,
        "prefill": prefill / prefill_full,
        "both": (vision + prefill) / (vision_full + prefill_full),
    }


def answers(questions: int) -> dict[str, Any]:
    """Accuracy and features of the demo VLM on its scenes, before its own grainy ground and before a plain one."""
    from dataclasses import replace

    from tokprune.demo.asking import BATCH, Asker
    from tokprune.demo.drawing import render
    from tokprune.demo.sweep import is_right

    asker, examples = Asker(*tokprune.demo.load()), tokprune.demo.held_out(questions)
    size = examples[0].image.width
    flat = [replace(e, image=render(e.scene.objects, e.scene.seed, size, plain=True)) for e in examples]
    settings: list[tuple[str, float | None, str]] = [("none", None, "keep")]
    settings += [("pixelprune", threshold, "keep") for threshold in (*THRESHOLDS, 0.2)]
    settings += [("pixelprune", 0.0, "compact"), ("random", None, "keep")]
    out: list[dict[str, Any]] = []
    for ground, asked in (("plain", flat), ("grainy", examples)):
        batches = [asker.inputs(asked[at : at + BATCH]) for at in range(0, len(asked), BATCH)]
        whole = [features(asker.model, inputs) for inputs in batches]
        exact = 1.0  # what threshold 0 keeps
        for method, threshold, positions in settings:
            right, near, left, total = 0, [], 0, 0
            options = {"ratio": 1.0 if method == "none" else exact} if threshold is None else {"threshold": threshold}
            given: dict[str, Any] = {**options, "positions": positions, "processor": asker.processor}
            with tokprune.apply(asker.model, method, **given) as pruning:
                for i, inputs in enumerate(batches):
                    part = asked[i * BATCH : (i + 1) * BATCH]
                    right += sum(is_right(a, e.answer) for a, e in zip(asker.answers(inputs), part, strict=True))
                    streams = pruning.last.streams
                    left, total = left + sum(s.kept for s in streams), total + sum(s.total for s in streams)
                    now = features(asker.model, inputs)
                    for row, stream in enumerate(streams):
                        at = stream.indices
                        near.append(torch.cosine_similarity(now[row, at], whole[i][row, at], dim=-1))
            exact = left / total if threshold == 0 else exact
            similar = torch.cat(near)
            row = {"ground": ground, "method": method, "threshold": threshold, "positions": positions}
            row |= {"accuracy": right / len(asked), "kept": left / total}
            out.append({**row, "cosine": float(similar.mean()), "least": float(similar.quantile(0.05))})
            print(out[-1], flush=True)
    return {"questions": questions, "rows": out}


@torch.no_grad()
def features(model: Any, inputs: Any) -> Tensor:
    """(B, N, D) what the LLM would receive."""
    found = model.base_model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
    return torch.stack(list(found)) if not isinstance(found, Tensor) else found


def share_table(data: dict[str, Any]) -> str:
    """Kept shares and FLOPs."""
    lines = [
        "| drawn | method | threshold | kept | least to most | tower FLOPs | LLM FLOPs | both | published, prompt |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in data["shares"]:
        told = PUBLISHED.get(r["threshold"]) if (r["kind"], r["method"]) == ("documents", "pixelprune") else None
        lines.append(
            f"| {r['kind']} ({r['units']} units) | `{r['method']}` | {r['threshold']:g} | {r['kept']:.1%} | "
            f"{r['least']:.1%} to {r['most']:.1%} | {r['vision']:.1%} | {r['prefill']:.1%} | {r['both']:.1%} | "
            f"{'' if told is None else f'{told:.1%}'} |"
        )
    return "\n".join([*lines, "", "FLOPs of Qwen2.5-VL-7B, of the unpruned run's. " + source(data)])


def answer_table(data: dict[str, Any]) -> str:
    """Accuracy against threshold."""
    lines = [
        "| ground | method | positions | kept | accuracy | cosine of kept features, mean | 5 % below |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for r in data["answers"]["rows"]:
        name = r["method"] if r["threshold"] is None else f"{r['method']}, {r['threshold']:g}"
        numbers = f"{r['kept']:.1%} | {r['accuracy']:.3f} | {r['cosine']:.3f} | {r['least']:.3f}"
        lines.append(f"| {r['ground']} | {name} | {r['positions']} | {numbers} |")
    asked = data["answers"]["questions"]
    note = (
        f"{asked} questions, so one is {1 / asked:.4f}; `random` keeps as many tokens as threshold 0 does, behind the "
    )
    return "\n".join([*lines, "", f"{note}tower. {source(data)}"])


def source(data: dict[str, Any]) -> str:
    """Where numbers come from."""
    where = data["environment"]
    return f"`{data['command']}` at commit {data['commit']}, {where['machine']}, torch {where['torch']}."


def page(text: str, data: dict[str, Any]) -> str:
    """docs/pixels.md with its tables as of `data`."""
    for name, table in (("shares", share_table(data)), ("answers", answer_table(data))):
        marks = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        text = re.sub(
            f"{marks[0]}.*?{marks[1]}", lambda _, t=table, m=marks: f"{m[0]}\n{t}\n{m[1]}", text, flags=re.DOTALL
        )
    return text


def main() -> None:
    """Measure, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    results = Path(__file__).parent / "results" / "pixels.json"
    parser.add_argument("--json", type=Path, default=results)
    parser.add_argument("--questions", type=int, default=280)
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    if given.tables:
        data = json.loads(given.json.read_text(encoding="utf-8"))
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), data), encoding="utf-8")
        return
    torch.manual_seed(0)
    drawn = shares()
    for row in drawn:
        print(row, flush=True)
    save(given.json, "tokprune.pixels", {"shares": drawn, "answers": answers(given.questions)})


if __name__ == "__main__":
    main()
