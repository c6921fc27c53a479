"""The comparison with official checkouts itself, on stand-ins for one: what agrees passes, what differs is said and
fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.official import Checkout, agreement, main

SCORE = """
import a_package_that_nobody_has

def compute_score(cls_attn: torch.Tensor, semantic_attn, value) -> torch.Tensor:
    share = cls_attn / cls_attn.sum(-1, keepdim=True) + semantic_attn / semantic_attn.sum(-1, keepdim=True)
    return share * value.{norm}.sum(-1)
"""


def flowcut_checkout(path: Path, norm: str = "abs()") -> Path:
    (path / "flowcut").mkdir()
    (path / "flowcut" / "utils_flowcut.py").write_text(SCORE.format(norm=norm), encoding="utf-8")
    return path


def test_one_command_says_that_both_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["flowcut", "--checkout", str(flowcut_checkout(tmp_path)), "--inputs", "8"])
    out = capsys.readouterr().out
    assert out.count("2 of 2 identical, least 1.000") == 4
    assert "flowcut against TungChintao/FlowCut, clustered" in out


def test_a_difference_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["flowcut", "--checkout", str(flowcut_checkout(tmp_path, "square()")), "--inputs", "4"])
    assert end.value.code == 1
    assert "0 of 1 identical" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="root of the official repository"):
        main(["gprune", "--checkout", str(tmp_path)])
    checkout = Checkout(flowcut_checkout(tmp_path))
    with pytest.raises(SystemExit, match="has no other"):
        checkout.entry("flowcut/utils_flowcut.py", "compute_score", "other")
    with pytest.raises(SystemExit, match="assigns no first"):
        checkout.steps("flowcut/utils_flowcut.py", "compute_score", "first", "share")


def test_statements_of_a_long_function_run_alone(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(
        "def long(self):\n    a = 1 / 0\n    b = x + 1\n    c = 5\n    d = b * c\n    d = d + 1\n    e = oops\n",
        encoding="utf-8",
    )
    run = Checkout(tmp_path).steps("long.py", "long", "b", "d", leave="c")
    assert run(x=2, c=10)["d"] == 31


def test_agreement_counts_common_indices_of_the_worst_row() -> None:
    assert agreement(torch.tensor([3, 1]), torch.tensor([1, 3])) == 1.0
    assert agreement(torch.tensor([[1, 2], [1, 2]]), torch.tensor([[1, 2], [2, 3]])) == pytest.approx(1 / 3)
    assert agreement(torch.tensor([1.0]), torch.tensor([1.0 + 1e-6])) == 1.0
    assert agreement(torch.tensor([1.0]), torch.tensor([1.1])) == 0.0
