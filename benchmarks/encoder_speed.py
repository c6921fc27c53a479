"""Encoder stage on a plain ViT: CPU time of one thread, ours by hooks against the published formulation written into
the forward.

    python benchmarks/encoder_speed.py --out benchmarks/results/encoder_speed.json
    python benchmarks/encoder_speed.py --demo 160 --out benchmarks/results/encoder_demo.json

Weights are random: only time is measured, and time does not depend on them. CPU seconds of one thread, the least of
several rounds that alternate between the variants, are stable on a shared machine where wall time is not. The
written-out variant computes what the published patch computes (explicit attention with size bias, bipartite matching on
mean keys, weighted merge) without hooks.
--demo is another measurement (encoder_demo.py): accuracy and encoder time of every method on the demo VLM at equal
FLOPs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from encoder_record import save
from torch import Tensor

from tokprune.runtime.encoder import apply_encoder


def written_out(model: Any, images: Tensor, r: int) -> Tensor:
    """Forward of a plain timm ViT with ToMe in it: explicit attention, even and odd halves, r merges per block."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    size: Tensor | None = None
    for block in model.blocks:
        attention = block.attn
        batch, n, width = x.shape
        q, k, v = attention.qkv(block.norm1(x)).reshape(batch, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (q * attention.scale) @ k.transpose(-2, -1)
        if size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        x = x + attention.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, n, width))
        count = min(r, (n - 1) // 2)
        if count > 0:
            metric = k.mean(1)
            metric = metric / metric.norm(dim=-1, keepdim=True)
            scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
            scores[:, 0] = -math.inf
            best, partner = scores.max(-1)
            order = best.argsort(-1, descending=True)[..., None]
            stay, source = order[:, count:].sort(1).values, order[:, :count]
            target = partner[..., None].gather(1, source)

            def merge(
                t: Tensor, stay: Tensor = stay, source: Tensor = source, target: Tensor = target, count: int = count
            ) -> Tensor:
                even, odd = t[:, ::2], t[:, 1::2]
                c = t.shape[2]
                moved = even.gather(1, source.expand(-1, count, c))
                odd = odd.scatter_reduce(1, target.expand(-1, count, c), moved, "sum")
                return torch.cat([even.gather(1, stay.expand(-1, stay.shape[1], c)), odd], 1)

            if size is None:
                size = torch.ones_like(x[..., :1])
            x = merge(x * size)
            size = merge(size)
            x = x / size
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


def cpu_seconds(run: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def hook_cost(timm: Any, depth: int = 24, calls: int = 60) -> float:
    """CPU seconds that the hooks of one block cost, measured where there is next to nothing else to do."""
    transformer = timm.models.vision_transformer.VisionTransformer
    small = transformer(img_size=16, patch_size=8, embed_dim=8, depth=depth, num_heads=1, num_classes=1).eval()
    image = torch.zeros(1, 3, 16, 16)

    def run() -> None:
        for _ in range(calls):
            small(image)

    run()
    plain = min(cpu_seconds(run) for _ in range(7))
    with apply_encoder(small, "tome", r=0):
        hooked = min(cpu_seconds(run) for _ in range(7))
    return (hooked - plain) / calls / depth


def main() -> None:
    """Measure what was asked for, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_large_patch16_224", help="a plain timm vision transformer")
    parser.add_argument("--r", type=int, nargs="+", default=[8, 13], help="tokens merged per block")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, help="of timing; --demo takes 9 unless told")
    parser.add_argument(
        "--demo", type=int, default=0, metavar="N", help="instead: accuracy of the demo VLM on N questions"
    )
    parser.add_argument(
        "--flops", type=float, nargs="+", default=[0.75, 0.6], help="with --demo: shares of the tower's FLOPs to match"
    )
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.demo:
        import encoder_demo

        rounds = args.rounds or 9
        rows = encoder_demo.run(args.demo, args.flops, rounds)
        facts = {"questions": args.demo, "rounds": rounds, "pictures": encoder_demo.PICTURES}
        save(args.out, "tokprune.EncoderDemo", {**facts, "tolerance": encoder_demo.TOLERANCE, "rows": rows})
        return

    import timm

    rounds = args.rounds or 4
    model = timm.create_model(args.model, pretrained=False).eval()
    size = model.patch_embed.img_size[0]
    images = torch.randn(args.batch, 3, size, size)

    def ours(r: int) -> float:
        with apply_encoder(model, "tome", r=r):
            return cpu_seconds(lambda: model(images))

    variants: dict[str, Callable[[], float]] = {
        "plain": lambda: cpu_seconds(lambda: model(images)),
        "hooks, r=0": lambda: ours(0),
    }
    for r in args.r:
        variants[f"written out, r={r}"] = lambda r=r: cpu_seconds(lambda: written_out(model, images, r))
        variants[f"hooks, r={r}"] = lambda r=r: ours(r)

    with torch.no_grad():
        for r in args.r:  # they compute the same
            with apply_encoder(model, "tome", r=r):
                got = model(images)
            gap = (got - written_out(model, images, r)).abs().max().item()
            if gap > 1e-2:
                raise SystemExit(f"the two formulations differ by {gap} at r={r}; nothing to compare.")
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, run in variants.items():
                times[name].append(run())
    least = {name: min(values) for name, values in times.items()}
    rows = []
    for name, seconds in least.items():
        rows.append({"variant": name, "cpu_seconds": seconds, "speedup": least["plain"] / seconds, "all": times[name]})
        print(f"{name:20} {seconds:7.3f} s   x{least['plain'] / seconds:.2f}")
    for r in args.r:
        ratio = least[f"hooks, r={r}"] / least[f"written out, r={r}"]
        print(f"r={r}: hooks take {ratio:.3f} of the written-out forward's time")
    with torch.no_grad():
        cost = hook_cost(timm)
    share = cost * len(model.blocks) / least["plain"]
    print(f"hooks alone (r=0): {cost * 1e6:.0f} microseconds a block, {share:.2%} of the plain forward")
    facts = {"model": args.model, "batch": args.batch, "rounds": rounds, "hook_seconds_per_block": cost}
    save(args.out, "tokprune.EncoderSpeed", {**facts, "blocks": len(model.blocks), "rows": rows})


if __name__ == "__main__":
    main()
