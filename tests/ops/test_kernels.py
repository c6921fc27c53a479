"""The Triton kernels answer like the plain loops: under Triton's interpreter here, on the card where there is one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tokprune import device
from tokprune.ops import select
from tokprune.ops.similarity import cosine_distance

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
WHERE = [
    pytest.param("cpu", id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@cache
def outcome(where: str) -> dict[str, tuple[bool, int]]:
    """The cases in a process of their own: the interpreter is chosen before Triton is imported."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if where == "cpu" else {}
    command = [sys.executable, "-m", "tests.ops.kernel_cases", where]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, tuple[bool, int]] = json.loads(done.stdout)
    return found


@NEEDS_TRITON
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kernel", ["max_min", "volume", "coverage", "sums"])
def test_a_kernel_answers_like_the_plain_form_in_three_launches_at_most(kernel: str, where: str) -> None:
    found = {name: result for name, result in outcome(where).items() if name.startswith(kernel)}
    assert len(found) == 9 + (kernel == "sums")
    assert [name for name, (same, _) in found.items() if not same] == []
    most = {"max_min": 1, "volume": 1, "coverage": 3, "sums": 1}[kernel]
    assert {launches for _, (_, launches) in found.items() if launches > most} == set()


@NEEDS_TRITON
def test_kernels_compile_without_a_card() -> None:
    found = outcome("compile")
    assert len(found) == 10
    assert all(there for there, _ in found.values()), found


def example() -> tuple[torch.Tensor, torch.Tensor, int]:
    distance = cosine_distance(torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0)))
    return distance, torch.tensor([3, 4]), 6


def module(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """`kernel` in place of the Triton one, and every tensor on a CUDA device, as far as the choice goes."""
    monkeypatch.setattr(device, "runs_kernels", lambda x: True)
    monkeypatch.setattr(torch.cuda, "device", lambda where: contextlib.nullcontext())
    monkeypatch.setattr(device, "importlib", type("Modules", (), {"import_module": staticmethod(lambda name: kernel)}))


def test_a_kernel_is_chosen_by_device_and_may_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = select.greedy_max_min(*example())
    chosen = device.with_kernel("greedy")(select.greedy_max_min.__wrapped__)  # type: ignore[attr-defined]
    answers = [torch.zeros(1), None]
    module(monkeypatch, type("Kernel", (), {"greedy_max_min": staticmethod(lambda *given: answers.pop(0))}))
    assert chosen(*example()).tolist() == [0.0]
    assert torch.equal(chosen(*example()), plain)


def test_a_kernel_that_fails_warns_once_and_the_plain_loop_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = select.greedy_max_min(*example())
    calls = []

    def breaks(*given: Any) -> None:
        calls.append(given)
        raise RuntimeError("no code for this card")

    chosen = device.with_kernel("greedy")(select.greedy_max_min.__wrapped__)  # type: ignore[attr-defined]
    module(monkeypatch, type("Kernel", (), {"greedy_max_min": staticmethod(breaks)}))
    with pytest.warns(RuntimeWarning, match="greedy_max_min does not run here.*no code for this card"):
        assert torch.equal(chosen(*example()), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(chosen(*example()), plain)
    assert len(calls) == 1


def test_memory_that_is_not_there_is_no_reason_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    chosen = device.with_kernel("greedy")(select.greedy_max_min.__wrapped__)  # type: ignore[attr-defined]
    module(monkeypatch, type("Kernel", (), {"greedy_max_min": staticmethod(full)}))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        chosen(*example())


def test_a_loop_with_a_kernel_compiles_in_one_graph() -> None:
    compiled = torch.compile(select.greedy_max_min, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*example()), select.greedy_max_min(*example()))


def test_what_is_on_no_cuda_device_takes_no_kernel() -> None:
    assert not device.runs_kernels(torch.zeros(2))
    code = "import sys, torch; from tokprune.ops.select import greedy_max_min as g; "
    code += "g(torch.rand(1, 9, 9), torch.zeros(1, dtype=torch.long), 3); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
