"""Does a method choose what its official code chooses? Runs both on many inputs, with the official code from a
checkout.

    python -m tools.official gprune --checkout ../G-Prune

A comparison knows the files and entry functions of the official repository and nothing else of it: functions are taken
out of their file by name, so that what the file imports need not be installed. It runs code of the checkout; read it
first. The next method is one function here, with @compares above it.
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("random", "clustered", "alike", "repeated")
Pair = tuple[str, Tensor, Tensor]  # kind of input, theirs, ours
Comparison = Callable[["Checkout", "Inputs"], Iterator[Pair]]


class Checkout:
    """A folder with official code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tree(self, file: str) -> ast.Module:
        """The syntax tree of one of its files."""
        path = self.path / file
        if not path.is_file():
            raise SystemExit(f"{path} does not exist: is --checkout the root of the official repository?")
        return ast.parse(path.read_text(encoding="utf-8"))

    def entry(self, file: str, *names: str, **given: Any) -> SimpleNamespace:
        """Functions and classes of a file, also those inside classes, without the rest of it. given: what they use by
        name."""
        names_used = {"torch": torch, "nn": torch.nn, "F": F, "np": np, "math": math, **given}
        found = []
        for node in ast.walk(self.tree(file)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
                found.append(node.name)
                if isinstance(node, ast.FunctionDef):
                    node.decorator_list, node.returns = [], None
                    for argument in node.args.args:
                        argument.annotation = None
                exec(compile(ast.Module([node], []), file, "exec", dont_inherit=True), names_used)
        missing = set(names) - set(found)
        if missing:
            raise SystemExit(f"{self.path / file} has no {', '.join(sorted(missing))}; another version?")
        return SimpleNamespace(**{name: names_used[name] for name in names})

    def steps(self, file: str, function: str, first: str, last: str, leave: str = "") -> Callable[..., dict[str, Any]]:
        """The statements of a long function from the first assignment to `first` to the last one to `last`, without
        those to `leave`."""
        body = next(n for n in ast.walk(self.tree(file)) if isinstance(n, ast.FunctionDef) and n.name == function).body
        names = [ast.unparse(n.targets[0]) if isinstance(n, ast.Assign) else "" for n in body]
        if first not in names or last not in names:
            raise SystemExit(f"{function} in {self.path / file} assigns no {first} or no {last}; another version?")
        part = range(names.index(first), len(names) - names[::-1].index(last))
        code = compile(ast.Module([body[i] for i in part if names[i] != leave], []), file, "exec", dont_inherit=True)

        def run(**variables: Any) -> dict[str, Any]:
            space = {"torch": torch, **variables}
            exec(code, space)
            return space

        return run


@dataclass
class Inputs:
    """Seeded inputs. count: how many a comparison should make."""

    count: int
    generator: torch.Generator

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return ((i, KINDS[i % len(KINDS)]) for i in range(self.count))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def attention(self, *shape: int) -> Tensor:
        """Rows that a softmax made."""
        return (2 * self.normal(*shape)).softmax(-1)

    def features(self, batch: int, n: int, width: int, kind: str) -> Tensor:
        """(B, N, C) features of a kind of KINDS."""
        x = self.normal(batch, n, width)
        if kind == "clustered":
            centres = 2 * self.normal(12, width)
            return centres[torch.randint(12, (batch, n), generator=self.generator)] + 0.5 * x
        if kind == "alike":
            return x + 1.5 * self.normal(batch, 1, width)
        return x[:, torch.arange(n) // 4] + 1e-2 * self.normal(batch, n, width) if kind == "repeated" else x


COMPARISONS: dict[str, tuple[str, Comparison]] = {}


def compares(name: str, repository: str) -> Callable[[Comparison], Comparison]:
    """Registers a comparison under the name of our method."""

    def register(function: Comparison) -> Comparison:
        COMPARISONS[name] = repository, function
        return function

    return register


@compares("flowcut", "TungChintao/FlowCut")
def flowcut(checkout: Checkout, inputs: Inputs) -> Iterator[Pair]:
    """The score, accumulated over the blocks of a tower that keeps all tokens."""
    from tokprune.methods.connector.flowcut import flowcut_scores
    from tokprune.runtime.signals import mean_value_norm

    official = checkout.entry("flowcut/utils_flowcut.py", "compute_score")
    for _, kind in inputs:
        rows, likeness = inputs.attention(22, 96), inputs.attention(22, 96)
        values = torch.stack([inputs.features(4, 96, 16, kind) for _ in range(22)])
        theirs: Tensor | None = None
        for a, s, v in zip(rows, likeness, values, strict=True):
            now = official.compute_score(a[None], s[None], v.mean(0)[None])[0]
            theirs = now if theirs is None else 0.5 * theirs + 0.5 * now
        assert theirs is not None
        yield kind, theirs, flowcut_scores(rows, likeness, mean_value_norm(values))


@compares("prunesid", "ZhengyaoFang/PruneSID")
def prunesid(checkout: Checkout, inputs: Inputs) -> Iterator[Pair]:
    """Kept patches behind the same seed: the form for LLaVA in batches, and that for Qwen2-VL."""
    from tokprune.methods.connector.prunesid import prunesid

    file = "prunesid/prunesid_llava/clip_encoder.py"
    llava = checkout.entry(file, "batch_similarity_nms", "batch_pca")
    llava = checkout.entry(file, "forward", **vars(llava))
    file = "prunesid/prunesid_qwen/modeling_qwen2_vl.py"
    qwen = checkout.entry(file, "pca_group", "nms", List=list, Optional=None)
    tower_class = checkout.entry(
        file, "Qwen2VisionTransformerPretrainedModel_prunesid", Qwen2VLPreTrainedModel=object, **vars(qwen)
    )
    for i, kind in inputs:
        n, keep = (64, 144, 100)[i % 3], (15, 31, 20)[i % 3]
        x, a = inputs.features(2, n, 64, kind), inputs.attention(2, 4, n)
        whole = torch.cat([inputs.normal(2, 1, 64), x], 1)
        tower = SimpleNamespace(attentions=[F.pad(a, (1, 0))[:, :, None]] * 2, hidden_states=[whole] * 2)
        model = SimpleNamespace(
            vision_tower=lambda *_, tower=tower, **__: tower,
            need_token_num=keep + 1,
            device="cpu",
            dtype=torch.float32,
        )
        torch.manual_seed(i)
        theirs = llava.forward(model, x)[1][:, 1:].sort(-1).values - 1
        yield kind, theirs, prunesid(x, a.sum(1), keep, seed=i)
        forward = tower_class.Qwen2VisionTransformerPretrainedModel_prunesid.forward
        visual = SimpleNamespace(
            patch_embed=lambda h: h, rot_pos_emb=lambda g: g, blocks=[], merger=lambda h: h, need_token_num=160
        )
        torch.manual_seed(i)
        theirs = forward(visual, x[0].clone(), torch.tensor([[1, 4, 4]]))[1].sort().values
        yield f"{kind}, Qwen2-VL", theirs, prunesid(x[0], None, max(round(n * 160 / 576), 16), seed=i)


@compares("mmtok", "Ironieser/MMTok")
def mmtok(checkout: Checkout, inputs: Inputs) -> Iterator[Pair]:
    """Kept tokens of a tiled picture, at the temperatures of both families."""
    from tokprune.registry import get_method
    from tokprune.tokens import Layout, Query, VisualTokens

    file = "mmtok/core/semantic_selector.py"
    kernel = checkout.entry(file, "greedy_merged_jit_kernel")
    names = {"Optional": typing.Optional, "List": list, "Tuple": tuple, "os": os}
    selector = checkout.entry(file, "SemanticTokenSelector", **names, **vars(kernel)).SemanticTokenSelector
    for i, kind in inputs:
        tiles, side, keep = (1, 3, 5)[i % 3], (8, 12, 10)[i % 3], (7, 24, 16)[i % 3]
        n, qwen = side * side, i % 2 == 1
        x, v, text = (
            inputs.features(tiles, n, 48, kind),
            inputs.features(tiles, n, 32, kind),
            inputs.normal(1 + i % 6, 48),
        )
        choose = selector(keep, 0.5).mm_coverage_selection
        kept = [choose(text, *xv, 0.01 if qwen else 0.02, 0.2)[0] for xv in zip(x, v, strict=True)]
        theirs = torch.cat([torch.tensor(k) + t * n for t, k in enumerate(kept)])
        layout = Layout.grid(side, side, tiles, "tiles", canvas=(1, max(1, tiles - 1)), thumbnail=tiles > 1)
        method = get_method("mmtok", **({"preset": "qwen2_5_vl"} if qwen else {"stop_words": False}))
        signals = {"encoder_features": v.flatten(0, 1)}
        tokens = VisualTokens(x.flatten(0, 1), layout, signals, Query(None, text))
        yield kind, theirs, method.select(tokens, tiles * keep).indices  # type: ignore[attr-defined]


@compares("gprune", "jytmelon/G-Prune")
def gprune(checkout: Checkout, inputs: Inputs) -> Iterator[Pair]:
    """Kept tokens of thumbnail and canvas, up to 2,880 tokens."""
    from tokprune.methods.connector.gprune import gprune

    file, function = "LLaVA-NeXT/llava/model/llava_arch.py", "prepare_inputs_labels_for_multimodal"
    run = checkout.steps(file, function, "system_prompt_length", "keep_indices2", leave="keep_ratio")
    for i, kind in inputs:
        rows, cols, ratio = *((24, 24), (36, 48), (17, 48), (48, 48))[i % 4], (0.5, 0.25, 0.1)[i % 3]
        x = inputs.features(1, 576 + rows * (cols + 1), 64, kind)[0]
        seen = SimpleNamespace(device="cpu")
        space = run(self=seen, image_feature=x, row_num=rows, col_num=cols, keep_ratio=ratio)
        patch = (torch.arange(rows * (cols + 1)) % (cols + 1) < cols).nonzero()[:, 0] + 576
        yield kind, space["keep_indices1"], gprune(x[:576]).topk(int(ratio * 576)).indices
        yield kind, space["keep_indices2"], patch[gprune(x[patch]).topk(int(ratio * rows * cols)).indices]


@compares("globalcom2", "xuyang-liu16/GlobalCom2")
def globalcom2(checkout: Checkout, inputs: Inputs) -> Iterator[Pair]:
    """The tokens of a tiled picture with newlines in their order, padded at the sides or above and below."""
    from tests.published.globalcom2 import globalcom2_published

    file = "llava/model/llava_arch.py"
    helpers = ["extract_actual_dimensions", "get_original_indices", "get_actual_crop_dimensions"]
    helpers += ["interpolate_and_split_cls_attn_scores", "select_topk_crop_features"]
    used = vars(checkout.entry(file, *helpers))
    official = checkout.entry(file, "generate_scale_for_crop_features", "compress_crops", retention_ratio=0.25, **used)
    for i, kind in inputs:
        side, (down, across) = (8, 12)[i % 2], ((2, 2), (1, 2), (2, 1), (1, 3), (3, 1))[i % 5]
        shrink = 0.55 + 0.45 * torch.rand(2, generator=inputs.generator)
        size = (int(14 * side * across * shrink[0]), int(14 * side * down * shrink[1]))
        thumbnail, crops = inputs.normal(side**2), inputs.normal(down * across, side**2)
        x, newline = inputs.features(down * across, side**2, 4, kind), torch.full((4,), 7.0)
        model = SimpleNamespace(model=SimpleNamespace(image_newline=newline))
        scales = official.generate_scale_for_crop_features(thumbnail, across, down, 0.25)
        theirs = official.compress_crops(model, x, crops, thumbnail, across, down, side, side, size, scales)
        yield kind, theirs.float(), globalcom2_published(thumbnail, crops, x, (down, across), size, newline)[2]


@compares("apt", "delude729/apt")
def apt(checkout: Checkout, inputs: Inputs) -> Iterator[Pair]:
    """Entropies of coloured pictures from normalised pixels. The commit must be one without a divergence in the
    score."""
    from tokprune.methods.encoder.apt import patch_entropy

    file = "src/models/entropy_utils.py"
    official = checkout.entry(file, "compute_patch_entropy_vectorized").compute_patch_entropy_vectorized
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    for i, kind in inputs:
        coarse = torch.randint(0, 256, (1, 3, 9, 13), generator=inputs.generator).float()
        smooth = F.interpolate(coarse, size=(112, 160), mode="bicubic") + i % 5 * inputs.normal(1, 3, 112, 160)
        levels = smooth.round().clamp(0, 255)
        pixels = (levels / 255 - mean) / std
        theirs = official(levels[0] / 255 * 255.0, 8, 3)
        for level in (1, 2):
            ours = patch_entropy((pixels * std + mean) * 255, 8, level)[0]
            yield kind, theirs[8 * 2**level][: ours.shape[0], : ours.shape[1]], ours


@compares("pixelprune", "OPPO-Mente-Lab/PixelPrune")
def pixelprune(checkout: Checkout, inputs: Inputs) -> Iterator[Pair]:
    """Kept units of one picture: at threshold 0 and above, anchored and not, by every metric."""
    from tokprune.methods.pixels.pixelprune import PixelPrune
    from tokprune.methods.pixels_base import PixelUnits

    file = "pixelprune/methods/pred_2d.py"
    official = checkout.entry(file, "_sim2d", "_select_2d_loco_fast", "_select_2d_loco_anchored")
    for i, kind in inputs:
        h, w = ((9, 11), (1, 14), (13, 1), (6, 7))[i % 4]
        x = (inputs.features(1, h * w, 12, kind)[0] * 2).round() / 8 + 0.01 * inputs.normal(h * w, 12) * (i % 3)
        x = x.view(h, w, 12)
        x[h // 3 :, w // 3 :] = x[h // 3, w // 3]  # a plain part
        x = x.flatten(0, 1)
        for metric, theirs in (("max", "max"), ("mean", "mae"), ("rms", "rmse")):
            for threshold in (0.0, 0.05, 0.2):
                for anchored in (True, False):
                    selector = SimpleNamespace(method=theirs, threshold=threshold)
                    exact = not anchored or (metric == "max" and threshold == 0)
                    run = official._select_2d_loco_fast if exact else official._select_2d_loco_anchored
                    ours = PixelPrune(threshold=threshold, metric=metric, anchored=anchored)  # type: ignore[arg-type]
                    kept = ours.choose(PixelUnits(x[None, :, None, None], (1, h, w))).kept[0]
                    yield kind, run(selector, x, h, w, x.device), kept.nonzero()[:, 0]


def agreement(theirs: Tensor, ours: Tensor) -> float:
    """1 where both are the same: numbers within rounding, indices as sets; else the share of indices in common, or
    0."""
    if theirs.is_floating_point():
        same = theirs.shape == ours.shape and torch.allclose(theirs, ours.to(theirs), atol=1e-4, rtol=1e-4)
        return float(same)
    pairs = zip(torch.atleast_2d(theirs).tolist(), torch.atleast_2d(ours).tolist(), strict=True)
    return min(len(set(a) & set(b)) / max(1, len(set(a) | set(b))) for a, b in pairs)


def main(arguments: list[str] | None = None) -> None:
    """Run one comparison and print it; exit code 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(COMPARISONS))
    parser.add_argument("--checkout", type=Path, required=True, help="root of the official repository on this machine")
    parser.add_argument("--inputs", type=int, default=40, help="how many inputs (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    repository, comparison = COMPARISONS[asked.method]
    inputs = Inputs(asked.inputs, torch.Generator().manual_seed(asked.seed))
    runs: Counter[str] = Counter()
    worst: dict[str, float] = {}
    same: Counter[str] = Counter()
    with torch.no_grad():
        for kind, theirs, ours in comparison(Checkout(asked.checkout), inputs):
            share = agreement(theirs, ours)
            runs[kind] += 1
            same[kind] += share == 1.0
            worst[kind] = min(share, worst.get(kind, 1.0))
    for kind in sorted(runs):
        print(
            f"{asked.method} against {repository}, {kind}: {same[kind]} of {runs[kind]} identical, "
            f"least {worst[kind]:.3f}"
        )
    if same != runs:
        sys.exit(1)


if __name__ == "__main__":
    main()
