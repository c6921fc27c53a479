"""Triton kernels beside their plain references, case by case, as JSON: {case: [same, launches]}.

TRITON_INTERPRET=1 python -m tests.ops.kernel_cases cpu      under Triton's interpreter
python -m tests.ops.kernel_cases cuda                        on a GPU
python -m tests.ops.kernel_cases compile                     for two cards that need not be there
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tokprune import tokens
from tokprune.ops import select
from tokprune.ops.similarity import cosine_distance, cosine_similarity


def features(kind: str, batch: int, n: int, width: int = 24) -> Tensor:
    """(B, N, D) of some kind, seeded by its name."""
    seed = torch.Generator().manual_seed(len(kind) * 1000 + n)
    x = torch.randn(batch, n, width, generator=seed)
    if kind == "clustered":
        x = x[:, torch.randint(5, (n,), generator=seed)] + 0.05 * x
    if kind == "duplicated":  # powers of two are exact: repeated tokens have equal distances whatever the order of sums
        x = torch.randint(-1, 2, (batch, 7, width), generator=seed).float()[:, torch.arange(n) % 7]
    if kind == "half":
        x = x.half()
    if kind == "huge":
        x = x * 1e18
    if kind == "zero":
        x[:, ::3] = 0
    return x


KINDS = ("random", "clustered", "duplicated", "half", "huge", "zero")
SIZES = ((2, 33, 10), (1, 1, 1), (1, 7, 7), (2, 16, 5))
"""Pictures, tokens, kept tokens: no multiple of the block, one token, all of them, a multiple."""


class Launches(TorchDispatchMode):
    """Counts operations that compute, and Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        alias = returns[0].alias_info if returns else None
        if (alias is None or alias.is_write) and "empty" not in func._schema.name:
            self.count += 1
        return func(*args, **(kwargs or {}))


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any, seen: Launches) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.seen.count += 1
            with _disable_current_modes():  # the interpreter is made of operations of torch and numpy
                self.kernel[grid](*args, **kwargs)

        return launch


def run(name: str, *arguments: Any) -> tuple[Any, Any, int]:
    """What the kernel answers, what the reference answers, and launches of the kernel."""
    from tokprune.ops.kernels import greedy, merge

    module, plain = (merge, tokens) if name == "weighted_sums" else (greedy, select)
    seen = Launches()
    with ExitStack() as stack:
        for kernel in ("_sums",) if module is merge else ("_max_min", "_map", "_first_gains", "_coverage"):
            stack.enter_context(patch.object(module, kernel, Counted(getattr(module, kernel), seen)))
        stack.enter_context(seen)
        found = getattr(module, name)(*arguments)
    return found, getattr(plain, name).__wrapped__(*arguments), seen.count


def max_min(kind: str, batch: int, n: int, keep: int, device: str) -> tuple[bool, int]:
    """Distances are read, so that not even ties may differ."""
    distance = cosine_distance(features(kind, batch, n)).to(device)
    distance.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    found, expected, launches = run("greedy_max_min", distance, distance.amin(-1).argmax(-1), keep)
    return torch.equal(found, expected), launches


def volume(kind: str, batch: int, n: int, keep: int, device: str) -> tuple[bool, int]:
    """In float64, where rounding decides no near tie."""
    weight = torch.rand(batch, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    weight = (8 * weight).round() / 8 if kind == "duplicated" else weight
    kernel = weight[..., :, None] * cosine_similarity(features(kind, batch, n).double()) * weight[..., None, :]
    found, expected, launches = run("greedy_map", kernel.to(device), keep, weight.to(device))
    return torch.equal(found, expected), launches


def coverage(kind: str, batch: int, n: int, keep: int, device: str) -> tuple[bool, int]:
    """Optional terms in turn; fewer rows than columns."""
    similarity = cosine_similarity(features(kind, batch, n)).double()[:, : n // 2 + 1].to(device)
    seed = torch.Generator().manual_seed(n)
    weights, bonus, barred = (torch.rand(batch, n, generator=seed).double().to(device) for _ in range(3))
    start = torch.rand(batch, n // 2 + 1, generator=seed).double().to(device) - 0.5
    same, most = True, 0
    terms: tuple[dict[str, Tensor], ...] = (
        {},
        {"weights": weights},
        {"start": start, "bonus": bonus},
        {"barred": barred > 0.3},
    )
    for given in terms if kind in ("random", "duplicated") else terms[1:2]:
        extra = [given.get(name) for name in ("weights", "start", "bonus", "barred")]
        (order, gains), (expected, gained), launches = run("greedy_coverage_gains", similarity, keep, *extra)
        same &= torch.equal(order, expected) and torch.allclose(gains, gained)
        most = max(most, launches)
    return same, most


def sums(kind: str, batch: int, n: int, keep: int, device: str) -> tuple[bool, int]:
    """Bit by bit, for rows are added in one order; the same again, alone, and among other neighbours."""
    x = features(kind, batch, n).to(device)
    seed = torch.Generator().manual_seed(n)
    target = torch.randint(-1, keep, (batch, n), generator=seed)
    target = (target >= 0).long() * (target % 2) if kind == "clustered" else target  # many rows a sum, sums of none
    target, scale = target.to(device), torch.rand(batch, n, generator=seed).to(device)
    found, expected, launches = run("weighted_sums", x, target, scale, keep)
    same = torch.equal(found, expected) and found.dtype == expected.dtype
    alone, _, _ = run("weighted_sums", x[-1:], target[-1:], scale[-1:], keep)
    only = torch.where(target == 0, target, -1)
    first, _, _ = run("weighted_sums", x, only, scale, 1)
    same &= torch.equal(alone[0], found[-1]) and torch.equal(first[:, 0], found[:, 0])
    wide, exact, _ = run("weighted_sums", x.double(), target, scale, keep)
    return same and torch.equal(wide, exact) and wide.dtype == torch.float64, launches


def cases(device: str) -> Iterator[tuple[str, tuple[bool, int]]]:
    """Name and outcome of every case."""
    for case in (max_min, volume, coverage, sums):
        for kind in KINDS:
            for batch, n, keep in SIZES if kind == "random" else SIZES[:1]:  # the interpreter takes its time
                yield f"{case.__name__} {kind} {batch} x {n} -> {keep}", case(kind, batch, n, keep, device)
    yield "sums of more rows than are looked at together", sums("random", 1, 1100, 3, device)


def compiled() -> Iterator[tuple[str, tuple[bool, int]]]:
    """Each kernel as machine code of an A100 and an H100, made without a card: [is there, bytes]."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from tokprune.ops.kernels import greedy, merge

    sizes = {"n": "i32", "keep": "i32", "rows": "i32", "width": "i32", "noise": "fp32"}
    pointers = {"first": "*i64", "order": "*i64", "barred": "*u8", "target": "*i64"}
    kernels = (
        (greedy._max_min, {"BLOCK": 4096}),
        (greedy._map, {"BLOCK": 4096, "CHUNK": 4}),
        (greedy._first_gains, {"ROWS": 4096, "START": True, "WEIGHTS": True, "BONUS": True}),
        (
            greedy._coverage,
            {"ROWS": 4096, "BLOCK": 4096, "START": False} | dict.fromkeys(("WEIGHTS", "BONUS", "BARRED"), True),
        ),
        (merge._sums, {"COLUMNS": 1024, "CHUNK": 1024}),
    )
    for kernel, constants in kernels:
        for card in (80, 90):
            types = {x: sizes.get(x) or pointers.get(x, "*fp32") for x in kernel.arg_names}
            source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
            code = compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": 16}).asm["cubin"]
            yield f"{kernel.__name__} sm_{card}", (len(code) > 0, len(code))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(dict(compiled() if sys.argv[1] == "compile" else cases(sys.argv[1]))))
