"""CPU time of choices and pruned prefills in two checkouts of tokprune, in turns: has a change made anything slower?

    git worktree add --detach ../before 22af06d
    python benchmarks/checkouts.py ../before --json benchmarks/results/checkouts.json

Each checkout runs in a process of its own, on one thread; a ratio is this checkout's time over the other's, round by
round. Methods that either does not have, or that want a question, are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

HERE = Path(__file__).resolve().parents[1]
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "internvl")
PREFILLED = ("divprune", "hired", "visionzip", "tome")
N, KEEP, WIDTH = 2880, 288, 4096


def cells() -> dict[str, Callable[[], object]]:
    """What the checkout on the path can run: choices of 288 of 2,880 tokens, forwards of tiny models."""
    import tokprune
    from tokprune.errors import TokpruneError
    from tokprune.tokens import Layout, VisualTokens

    found: dict[str, Callable[[], object]] = {}
    seed = torch.Generator().manual_seed(0)
    features = torch.randn(N, WIDTH, generator=seed)
    layout = Layout.grid(24, 24, 5, "tiles", canvas=(2, 2), thumbnail=True)
    for name in tokprune.list_methods(stage="connector", query_aware=False):
        try:
            method = tokprune.get_method(name)
            signals = {need: signal(need, seed) for need in method.needs}
        except (TokpruneError, KeyError):
            continue
        found[f"choice, {name}"] = partial(method.select, VisualTokens(features, layout, signals), KEEP)
    for family in FAMILIES:
        for name in PREFILLED:
            found[f"prefill, tiny {family}, {name}"] = Forward(family, name)
    for name in PREFILLED[:3]:
        found[f"prefill, LLM of width 896, {name}"] = Large("llava", name)
    return found


def signal(need: str, seed: torch.Generator) -> torch.Tensor:
    """Values of a signal of the tower, by the first word of its name."""
    kind = need.split(":")[0]
    if kind in ("cls_attention", "received_attention"):
        return torch.randn(N, generator=seed).softmax(0)
    return torch.randn(N, *{"encoder_features": (1024,), "keys": (16, 64)}[kind], generator=seed)


class Forward:
    """A tiny model and two prompts with a picture each; pruned when it is first called.

    Its time is that of Python and dispatch: what a library adds to a prefill shows here undiluted.
    """

    def __init__(self, family: str, method: str) -> None:
        self._family, self._method = family, method
        self._call: Callable[[], object] | None = None

    def __call__(self) -> None:
        """A prefill."""
        if self._call is None:
            import tokprune
            from tokprune.testing import build, picture

            tiny = build(self._family)
            parts = [["a", ("image", picture(56, 56)), "what?"], ["b", ("image", picture(56, 56)), "is it?"]]
            tokprune.apply(tiny.model, self._method, ratio=0.25)
            self._call = partial(tiny.model, **tiny.inputs(parts))
        self._call()


class Large(Forward):
    """A LLaVA whose LLM is as wide as one of half a billion parameters, of 8 layers; one picture of 576 tokens."""

    def __call__(self) -> None:
        """A prefill."""
        if self._call is None:
            from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

            import tokprune

            tower = CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=336,
                patch_size=14,
            )  # fmt: skip
            language = Qwen2Config(
                hidden_size=896, intermediate_size=4864, num_hidden_layers=8, num_attention_heads=14,
                num_key_value_heads=2, vocab_size=1000,
            )  # fmt: skip
            torch.manual_seed(0)
            model = LlavaForConditionalGeneration(
                LlavaConfig(vision_config=tower, text_config=language, image_token_index=9)
            ).eval()
            tokprune.apply(model, self._method, ratio=0.25)
            ids = torch.tensor([[1, *[9] * 576, *range(10, 42)]])
            self._call = partial(
                model, input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 336, 336)
            )
        self._call()


def serve() -> None:
    """Tell the names of the cells, then run what each line of the input asks for and tell CPU milliseconds a call."""
    torch.set_num_threads(1)
    with torch.no_grad():
        known = cells()
        print(json.dumps(sorted(known)), flush=True)
        for line in sys.stdin:
            name, calls = json.loads(line)
            try:
                start = time.process_time()
                for _ in range(calls):
                    known[name]()
                print(json.dumps((time.process_time() - start) * 1e3 / calls), flush=True)
            except Exception as error:  # of whichever kind: the cell is left out, and the reason told
                print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)


class Checkout:
    """A process that runs cells of one checkout."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        )
        self.cells: list[str] = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def run(self, cell: str, calls: int) -> float | str:
        """CPU milliseconds of a call, or what went wrong."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([cell, calls]) + "\n")
        self._process.stdin.flush()
        return self._read()  # type: ignore[no-any-return]


def compare(before: Checkout, after: Checkout, cell: str, rounds: int) -> dict[str, Any]:
    """One cell in both, in changing order."""
    warm = [checkout.run(cell, 1) for checkout in (before, after)]
    if wrong := [x for x in warm if isinstance(x, str)]:
        return {"cell": cell, "left_out": wrong[0]}
    calls = max(1, round(20 / max(*warm, 1e-3)))  # type: ignore[type-var]
    pairs = []
    for i in range(rounds):
        order = (before, after) if i % 2 == 0 else (after, before)
        times = {id(checkout): checkout.run(cell, calls) for checkout in order}
        pairs.append((times[id(before)], times[id(after)]))
    low, middle, high = quantiles([float(b) / float(a) for a, b in pairs], n=4, method="inclusive")
    old, new = (median(float(x) for x in column) for column in zip(*pairs, strict=True))
    return {"cell": cell, "before_ms": old, "after_ms": new, "ratio": middle, "q1": low, "q3": high, "rounds": rounds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cells whose names begin so: choice, prefill, ...")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        serve()
        return
    if args.before is None:
        parser.error("which checkout is to be compared with this one?")
    sys.path.insert(0, str(HERE))
    from benchmarks.encoder_record import commit
    from tokprune.environment import environment

    before, after = Checkout(args.before.resolve()), Checkout(HERE)
    rows = []
    for cell in after.cells:
        if cell in before.cells and cell.startswith(args.only):
            rows.append(compare(before, after, cell, args.rounds))
            print(rows[-1], flush=True)
    if args.json:
        git = ["git", "-C", str(args.before), "rev-parse", "HEAD"]
        data = {
            "command": f"python benchmarks/checkouts.py BEFORE --rounds {args.rounds}",
            "before": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
            "commit": commit(),
            "environment": environment("cpu"),
            "rows": rows,
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
