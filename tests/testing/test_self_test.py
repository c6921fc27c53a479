"""The self-test passes on every family that works, and fails on models in which something is broken on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.reference import QUICK
from tokprune.testing import FAMILIES, Check, build, prompts, self_test
from tokprune.testing.self_test import _language_model

SLOW = [f for f in FAMILIES if f not in QUICK]


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)])
def test_every_check_holds(family: str) -> None:
    tiny = build(family)
    checks = self_test(tiny.model, prompts(tiny.model, tiny.processor))
    assert [c for c in checks if not c.ok] == []
    assert len(checks) == 7
    assert "tokprune" not in str(sorted(vars(tiny.model))), "the model comes back unpruned"


def broken(monkeypatch: pytest.MonkeyPatch, spoil: Any, only: Any) -> dict[str, Check]:
    """The checks on a model whose language model is spoiled while it is pruned. only: for which calls, by their
    width."""
    tiny = build("llava")
    real = tokprune.apply

    def apply(model: Any, **options: Any) -> Any:
        pruning = real(model, **options)

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if only(kwargs["inputs_embeds"], options):
                spoil(output.last_hidden_state)

        handle = _language_model(model).register_forward_hook(hook, with_kwargs=True)
        remove = pruning.remove
        pruning.remove = lambda: (handle.remove(), remove())
        return pruning

    monkeypatch.setattr(tokprune, "apply", apply)
    return {c.name: c for c in self_test(tiny.model, prompts(tiny.model, tiny.processor))}


def noise(hidden: torch.Tensor) -> None:
    hidden += 0.01


def failed(checks: Mapping[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if check.ok is False]


def test_a_broken_decode_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = broken(monkeypatch, noise, lambda embeds, options: embeds.shape[1] == 1 and options["ratio"] < 1)
    names = failed(checks)
    assert sum("with a cache" in name for name in names) == 2
    assert sum("by hand" in name for name in names) == 2


def test_a_prefill_that_is_wrong_with_and_without_a_cache_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = broken(monkeypatch, noise, lambda embeds, options: embeds.shape[1] > 1 and options["ratio"] < 1)
    assert sum("by hand" in name for name in failed(checks)) == 2


def test_a_batch_that_mixes_its_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = broken(monkeypatch, noise, lambda embeds, options: embeds.shape[0] == 2)
    assert failed(checks) == ["a prompt in a batch of two = the prompt alone"]


def test_a_ratio_of_1_that_changes_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def nudge(hidden: torch.Tensor) -> None:
        hidden *= 1 + 1e-6

    checks = broken(monkeypatch, nudge, lambda embeds, options: options["ratio"] == 1)
    assert failed(checks) == ["ratio 1 answers as the plain model, bit for bit"]


def test_what_stays_on_a_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build("llava")
    real = tokprune.apply

    def apply(model: Any, **options: Any) -> Any:
        model.model.left_behind = object()
        return real(model, **options)

    monkeypatch.setattr(tokprune, "apply", apply)
    checks = self_test(tiny.model, prompts(tiny.model, tiny.processor))
    assert failed({c.name: c for c in checks}) == ["remove() gives the model back, bit for bit"]


def test_an_error_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(model: Any, **options: Any) -> Any:
        raise AttributeError("no such hook")

    monkeypatch.setattr(tokprune, "apply", apply)
    tiny = build("llava")
    checks = self_test(tiny.model, prompts(tiny.model, tiny.processor))
    assert {c.ok for c in checks} == {False}
    assert all("no such hook" in c.detail for c in checks)


def test_a_model_without_batches_is_told_apart() -> None:
    tiny = build("llava")
    make = prompts(tiny.model, tiny.processor)

    def alone(rows: Sequence[int]) -> Mapping[str, Any]:
        if len(rows) > 1:
            raise ValueError("no padding token")
        return make(rows)

    *others, batch = self_test(tiny.model, alone)
    assert all(c.ok for c in others)
    assert batch.ok is None
    assert "no padding token" in batch.detail


def test_low_precision_has_its_own_tolerance() -> None:
    tiny = build("qwen2_5_vl", dtype=torch.bfloat16)
    checks = self_test(tiny.model, prompts(tiny.model, tiny.processor))
    assert [c for c in checks if c.ok is False] == []
