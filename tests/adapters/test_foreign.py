"""What a pruning leaves on models, caches, outputs and calls is what `tokprune.adapters.foreign` declares, and it goes
away."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokprune
from tests.spelling import cache_in
from tokprune.adapters import foreign
from tokprune.adapters.foreign import FOREIGN, GENERATE_STEP
from tokprune.adapters.hooks import Hook, StandIn
from tokprune.testing import build, picture

PACKAGE = Path(tokprune.__file__).parent
CODE = [path for part in ("adapters", "runtime", "methods", "ops") for path in sorted((PACKAGE / part).rglob("*.py"))]
# Where hooks are put on and methods of one object exchanged; hooks for gradients belong to one forward.
HOOKS = {"adapters/hooks.py", "runtime/outputs.py"}


def names(*kinds: str) -> set[str]:
    return {one.name for one in FOREIGN if one.kind in kinds}


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


@pytest.mark.parametrize("path", CODE, ids=place)
def test_code_writes_on_foreign_objects_by_declared_names(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, call in calls(tree):
        where = f"{place(path)}:{call.lineno}"
        if name in ("setattr", "delattr"):
            key = call.args[1]
            assert isinstance(key, ast.Name), f"{where}: {name} with a name that foreign.py does not declare"
            assert hasattr(foreign, key.id), where
        if name.startswith("register_") and name.endswith("hook"):
            assert place(path) in HOOKS, f"{where}: hooks are put on by adapters.hooks.Attachments"
        if name == "instead" and isinstance(call.args[1], ast.Constant):
            assert call.args[1].value in names("method"), where
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        for target in targets:
            text = ast.unparse(target)
            if "__dict__" in text or text.startswith("vars("):
                assert place(path) == "adapters/hooks.py" or "[HANDLE]" in text, f"{place(path)}:{node.lineno}"
            if text.endswith(".__class__"):
                assert place(path) == "runtime/cache_record.py", f"{place(path)}:{node.lineno}"


def test_no_name_of_ours_is_spelled_out_elsewhere() -> None:
    declared = {one.name for one in FOREIGN if "tokprune" in one.name}
    for path in CODE:
        if place(path) == "adapters/foreign.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                assert node.value not in declared, f"{place(path)}:{node.lineno}"


def state(model: nn.Module) -> tuple[dict[tuple[str, str], Any], set[tuple[str, int]]]:
    """Attributes and hooks of every module."""
    attributes = {(name, key): value for name, m in model.named_modules() for key, value in vars(m).items()}
    stores = [(name, key, kept) for (name, key), kept in attributes.items() if key.endswith("_hooks")]
    hooks = {(f"{name}.{key}", id(hook)) for name, key, kept in stores if kept for hook in kept.values()}
    return attributes, hooks


def new_names(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    return set(after) - set(before)


def methods_of_every_stage() -> list[Any]:
    return [
        tokprune.get_method("tome", r=1),
        "hired",
        tokprune.get_method("dycoke_cache", layer=1),
    ]


@torch.no_grad()
def test_a_model_carries_what_is_declared_and_gives_it_back() -> None:
    tiny = build("llava")
    model, inputs = tiny.model, tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    model(**inputs, output_hidden_states=True)  # what transformers itself writes is there
    model.generate(**inputs, max_new_tokens=2)
    attributes, hooks = state(model)
    with tokprune.apply(model, methods_of_every_stage(), ratio=0.5):
        model(**inputs, output_hidden_states=True)
        model.generate(**inputs, max_new_tokens=3)
        now, hooked = state(model)
        written = {key for place, key in set(now) - set(attributes)}
        assert written <= names("attribute", "method")
        assert {"_tokprune", "prepare_inputs_for_generation", "_prefill", "get_image_features"} <= written
        exchanged = [value for key, value in now.items() if key not in attributes and key[1] != foreign.HANDLE]
        assert all(isinstance(value, StandIn) for value in exchanged)
        ours = {id(hook) for m in model.modules() for kept in stores(m) for hook in kept.values() if is_ours(hook)}
        assert {hook for _, hook in hooked - hooks} == ours != set()
    after, left = state(model)
    assert set(after) == set(attributes)
    assert left == hooks


def stores(module: nn.Module) -> list[Any]:
    return [value for key, value in vars(module).items() if key.endswith("_hooks") and value]


def is_ours(hook: Any) -> bool:
    return isinstance(hook, Hook)


@torch.no_grad()
def test_caches_outputs_and_calls_carry_what_is_declared() -> None:
    tiny = build("llava")
    model, inputs = tiny.model, tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    plain = model(**inputs, use_cache=True)
    encoded = model.base_model.get_image_features(inputs["pixel_values"])
    keywords: set[str] = set()
    handle = model.base_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: keywords.update(kwargs), with_kwargs=True
    )
    with tokprune.apply(model, "divprune", ratio=0.5):
        pruned = model(**inputs, use_cache=True)
        seen = model.base_model.get_image_features(inputs["pixel_values"])
        model.generate(**inputs, max_new_tokens=3)
        cache = cache_in(pruned)
        assert new_names(vars(cache_in(plain)), vars(cache)) <= names("attribute")
        assert type(cache).__name__ == type(cache_in(plain)).__name__
        for layer, same in zip(cache.layers, cache_in(plain).layers, strict=True):
            assert set(vars(layer)) == set(vars(same))
        assert new_names(vars(encoded), vars(seen)) == {foreign.ENCODER_RECORD}
        assert set(vars(pruned)) == set(vars(plain))
        assert GENERATE_STEP not in keywords, "the base model's hook takes it away"
    handle.remove()
    cache.reset()
    assert type(cache) is type(cache_in(plain))
    assert not names("attribute") & set(vars(cache))


def test_hooks_for_gradients_end_with_their_forward() -> None:
    tiny = build("llava")
    model, inputs = tiny.model, tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    model(**inputs, output_hidden_states=True)
    with tokprune.apply(model, "divprune", ratio=0.5):
        _, before = state(model)
        during: list[int] = []
        handle = model.base_model.language_model.layers[0].register_forward_hook(
            lambda *_: during.append(len(state(model)[1]))
        )
        model(**inputs, output_hidden_states=True)
        handle.remove()
        assert max(during) > len(before) + 1
        assert state(model)[1] == before
