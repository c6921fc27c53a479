"""Images per second of whole vision transformers, with and without the encoder stage.

    python benchmarks/images_per_second.py --out benchmarks/results/encoder_images.json
    python benchmarks/images_per_second.py --device cuda --models vit_large_patch16_224 --batch 64 --half

Models of timm with random weights on random pictures: only time is measured, and time does not depend on either (APT,
which chooses by the picture, is left out for that reason). Every method leaves the same share of patches at the end;
ToMe runs with its published r as well. Medians of rounds that go through all variants in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from encoder_record import flops, save, wall

import tokprune

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
METHODS = ("tome", "tofu", "pitome", "evit", "ats", "zerotprune")


@dataclass(frozen=True)
class Variant:
    """What is applied to the model; nothing when `method` is empty."""

    name: str
    method: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    def applied(self, model: Any) -> Any:
        """A context in which the model runs so."""
        return tokprune.apply(model, self.method, **self.arguments) if self.method else contextlib.nullcontext()


def variants(methods: list[str], ratio: float, r: int) -> list[Variant]:
    """The plain model, ToMe by its published number a block, and every method at the same share left."""
    out = [Variant("none")]
    if "tome" in methods and r > 0:
        out.append(Variant(f"tome, r={r}", "tome", {"r": r}))
    return out + [Variant(f"{m}, ratio={ratio:g}", m, {"ratio": ratio}) for m in methods]


@torch.no_grad()
def measure(name: str, batch: int, wanted: list[Variant], rounds: int, device: str, half: bool) -> list[dict[str, Any]]:
    """Rows of one model at one batch size."""
    import timm

    torch.manual_seed(0)
    dtype = torch.float16 if half else torch.float32
    model = timm.create_model(name, pretrained=False).eval().to(device, dtype)
    size = model.patch_embed.img_size[0]
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)

    def run() -> Any:
        return model(images)

    work = {}
    for variant in wanted:  # warms up, too
        with variant.applied(model):
            work[variant.name] = flops(run)
    times: dict[str, list[float]] = {v.name: [] for v in wanted}
    for _ in range(rounds):
        for variant in wanted:
            with variant.applied(model):
                times[variant.name].append(wall(run, device))
    rate = {key: batch / statistics.median(value) for key, value in times.items()}
    rows = []
    for variant in wanted:
        row = {
            "model": name,
            "batch": batch,
            "variant": variant.name,
            "images_per_second": rate[variant.name],
            "speedup": rate[variant.name] / rate["none"],
            "flops": work[variant.name] / work["none"],
            "seconds": times[variant.name],
        }
        rows.append(row)
        print(
            f"{name:24} batch {batch:3}  {variant.name:22} {row['images_per_second']:8.2f} images/s  "
            f"x{row['speedup']:.2f}  (FLOPs {row['flops']:.2f})",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="plain vision transformers of timm")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="batch sizes")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--ratio", type=float, default=0.5, help="share of patches left at the end")
    parser.add_argument("--r", type=int, default=8, help="ToMe's tokens a block in its published form; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch on the CPU; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--half", action="store_true", help="float16")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    wanted = variants(args.methods, args.ratio, args.r)
    rows = []
    for name in args.models:
        for batch in args.batch:
            rows += measure(name, batch, wanted, args.rounds, args.device, args.half)
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu"
    facts = {"device": device, "dtype": "float16" if args.half else "float32", "rounds": args.rounds}
    save(args.out, "tokprune.EncoderImages", {**facts, "rows": rows})


if __name__ == "__main__":
    main()
