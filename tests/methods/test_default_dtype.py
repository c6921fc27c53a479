"""People load models under torch.set_default_dtype(torch.bfloat16) or float64: every method decides as under
float32."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import tokprune
from tests.encoder.all_towers import timm_vit
from tests.methods.frames.test_frames_contract import VARIANTS
from tests.methods.streams import LAYOUTS, stream, untrained
from tokprune.errors import OptionError, TokpruneError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.cache_base import CacheMethod, CacheStep
from tokprune.methods.connector.prunesid import group_budgets
from tokprune.methods.frames_base import PerFrame
from tokprune.registry import get_method, list_methods, method_class
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import build, clip, picture
from tokprune.tokens import Layout, Selection, VisualTokens

DEFAULTS = [torch.bfloat16, torch.float16, torch.float64]
COMPAT = [
    (name, {"compat": how})
    for name in list_methods("connector")
    if hasattr(method_class(name), "compat")
    for how in ("published",)
]
CONNECTORS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"weights": untrained()} if name == "explain" else {}) for name in list_methods("connector")),
    *COMPAT,
    ("pool", {"dims": 2}),
    ("storm", {"mode": "pool"}),
    ("adaptive_budget", {"method": "merge"}),
    ("per_tile", {"split": "hired"}),
    ("per_tile", {"split": "globalcom2"}),
]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def under_each_default(ask: Callable[[], Any]) -> Iterator[tuple[torch.dtype, Any, Any]]:
    """What is answered under the usual default, and under each of the others."""
    with default_dtype(torch.float32):
        expected = ask()
    for dtype in DEFAULTS:
        with default_dtype(dtype):
            got = ask()
        yield dtype, got, expected


def labels(variants: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [f"{name}-{'-'.join(map(str, options.values()))}".strip("-") for name, options in variants]


def alike(got: Selection, expected: Selection, tokens: VisualTokens) -> None:
    """The same tokens, bit by bit, and nothing of another type."""
    assert torch.equal(got.indices, expected.indices)
    out, right = got.apply(tokens.features), expected.apply(tokens.features)
    assert out.dtype == right.dtype
    assert torch.equal(out, right)
    assert got.info.keys() == expected.info.keys()
    for name, value in expected.info.items():
        assert got.info[name].dtype == value.dtype, name
        torch.testing.assert_close(got.info[name], value, equal_nan=True, rtol=0, atol=0)
    if expected.weights is not None and got.weights is not None:
        dense = got.weights.dense(len(got), len(tokens))
        assert dense.dtype == torch.float32
        assert torch.equal(dense, expected.weights.dense(len(got), len(tokens)))


@pytest.mark.parametrize(("name", "options"), CONNECTORS, ids=labels(CONNECTORS))
def test_connector_methods(name: str, options: dict[str, Any]) -> None:
    method = get_method(name, **options)
    assert isinstance(method, ConnectorMethod)
    layouts = {**LAYOUTS, "long": Layout.grid(2, 3, 12, "video")}
    decided = 0
    for where, keep in (("image", 16), ("unpadded", 21), ("video", 24), ("seven", 3), ("long", 30)):
        tokens = stream(layouts[where], method.needs, seed=4)
        try:
            method.select(tokens, keep)
        except OptionError:  # published code knows fewer shapes
            assert options.get("compat") == "published"
            continue
        for _, got, expected in under_each_default(lambda t=tokens, k=keep: method.select(t, k)):  # type: ignore[misc]
            alike(got, expected, tokens)
        decided += 1
    assert decided > 0
    batch = [stream(LAYOUTS[w], method.needs, seed) for seed, w in enumerate(["image", "image", "seven"])]
    for _, shared, right in under_each_default(lambda: method.budgets(batch, [9, 9, 3])):
        assert shared == right


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=labels(VARIANTS))
def test_frames_methods(name: str, options: dict[str, Any]) -> None:
    method = PerFrame(get_method(name, **options))  # type: ignore[arg-type]
    tokens = stream(LAYOUTS["video"], method.needs, seed=4)
    for keep in (7, 24):
        for _, got, expected in under_each_default(lambda k=keep: method.select(tokens, k)):  # type: ignore[misc]
            alike(got, expected, tokens)


ENCODERS: dict[str, dict[str, Any]] = {
    "apt": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "tome": {"r": 8},
    "tofu": {"r": 8},
}
NEEDS_MORE = {"dynamicvit": "trained predictors", "dtop": "trained heads"}


@pytest.mark.parametrize("name", [n for n in list_methods("encoder") if n not in NEEDS_MORE])
@torch.no_grad()
def test_encoder_methods(name: str) -> None:
    tower = timm_vit()
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def ask() -> tuple[Tensor, Tensor]:
        with apply_encoder(tower, name, **ENCODERS.get(name, {})) as pruning:
            return tower(pictures), pruning.trace.survivor.float()

    for _, got, expected in under_each_default(ask):
        for value, right in zip(got, expected, strict=True):
            assert value.dtype == torch.float32
            assert torch.equal(value, right)


@pytest.mark.parametrize("name", [n for n in list_methods("cache") if issubclass(method_class(n), CacheMethod)])
def test_cache_methods(name: str) -> None:
    method = get_method(name)
    assert isinstance(method, CacheMethod)
    attention = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    later = attention.flip(1)
    keep = torch.tensor([5, 7, 3])

    def ask() -> tuple[CacheStep, CacheStep]:
        first = method.step(attention, keep, 7, None)
        return first, method.step(later, keep, 7, first)

    for _, got, expected in under_each_default(ask):
        for value, right in zip(got, expected, strict=True):
            assert torch.equal(value.indices, right.indices)


def test_budgets_of_groups() -> None:
    """A share of whole numbers is no number of the default type."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (50, 16), generator=generator)
    survivors = (torch.rand(50, 16, generator=generator) * sizes).long()
    for _, got, expected in under_each_default(lambda: group_budgets(sizes, survivors, 64, 65)):
        assert torch.equal(got, expected)


class MadeOfNothing(TorchDispatchMode):
    """Notes the lines of ours that make a tensor of type `dtype` from tensors that have other types."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.lines = dtype, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))

        def some(tree: Any) -> bool:
            return any(isinstance(t, Tensor) and t.dtype == self.dtype for t in tree_flatten(tree)[0])

        if some(out) and not some((args, kwargs)) and func is not torch.ops.aten.scalar_tensor.default:
            frame = next(f for f in reversed(traceback.extract_stack()[:-1]) if "torch/" not in f.filename)
            if "tokprune/" in frame.filename:
                self.lines.add(f"{frame.filename}:{frame.lineno}: {frame.line}")
        return out


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llava_next", "image"), ("internvl", "image"), ("qwen2_5_vl", "image"), ("qwen2_5_vl", "video")],
)
@torch.no_grad()
def test_no_number_takes_the_default_type(family: str, kind: str) -> None:
    """Of a float32 model's numbers none becomes bfloat16, which holds whole numbers up to 256."""
    tiny = build(family)
    part = ("video", clip(6, 56, 56)) if kind == "video" else ("image", picture(60, 40))
    inputs = tiny.inputs([["a ", part, " or ", part, "?"]])
    lines: set[str] = set()
    for name in list_methods():
        options: dict[str, Any] = {"layer": 1} if name == "dycoke_cache" else {}
        spy = MadeOfNothing(torch.bfloat16)
        with contextlib.suppress(TokpruneError), default_dtype(torch.bfloat16):
            amount = {} if name in ("ipcv", "toc3d") else {"ratio": 0.4}
            method = get_method(name, **options)
            with tokprune.apply(tiny.model, method, query="which?", processor=tiny.processor, **amount), spy:
                tiny.model(**inputs)
        lines |= spy.lines
    assert lines == set()


WHOLE: dict[str, Any] = {
    "divprune": "divprune",
    "merge": "merge",
    "hired": "hired",
    "encoder": [get_method("tome", r=1), "adaptive_budget"],
    "frames": ["quota", "divprune"],
    "cache": ["dycoke", get_method("dycoke_cache", layer=1)],
}


@pytest.mark.parametrize("how", WHOLE)
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_in_a_model(family: str, how: str) -> None:
    tiny = build(family)
    part = (
        ("video", clip(6, 56, 56))
        if family == "qwen2_5_vl" and how in ("frames", "cache")
        else ("image", picture(60, 40))
    )
    inputs = tiny.inputs([["a ", part, " or ", part, "?"]])

    def ask() -> tuple[Tensor, Tensor]:
        with tokprune.apply(tiny.model, WHOLE[how], ratio=0.4, query="which one?", processor=tiny.processor):
            answer = tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False)
            return tiny.model(**inputs).logits, answer

    for _, got, expected in under_each_default(ask):
        assert got[0].dtype == torch.float32
        assert torch.equal(got[1], expected[1])
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
