"""Images per second of a timm classifier under ToMe: the same call, fewer tokens in every block.

python examples/timm_tome.py                       random weights: the time is right, the classes are not
python examples/timm_tome.py --pretrained          with weights from timm's hub
"""

from __future__ import annotations

import argparse
import time

import torch

import tokprune
from tokprune.errors import install_line

try:
    import timm
except ImportError:
    raise SystemExit(f"this example needs timm: {install_line('vision')}") from None


def images_per_second(model: torch.nn.Module, images: torch.Tensor, rounds: int = 5) -> float:
    """Best of several rounds, after one to warm up."""
    times = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    return len(images) / min(times[1:])


def main() -> None:
    """Measure with and without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="a vision transformer of timm")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--r", type=int, default=8, help="tokens merged away per block")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    model = timm.create_model(args.model, pretrained=args.pretrained).eval()
    images = torch.randn(args.batch, *model.pretrained_cfg["input_size"])
    plain = images_per_second(model, images, args.rounds)
    with tokprune.apply(model, "tome", r=args.r) as pruning:
        merged = images_per_second(model, images, args.rounds)
        print(pruning.report())
    print(f"{plain:.1f} images/s -> {merged:.1f} images/s (x{merged / plain:.2f})")


if __name__ == "__main__":
    main()
