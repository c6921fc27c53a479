"""The golden vectors: find the .npz files, hand them out to the tests by file-name prefix, one test per case.

    from tests.golden_vectors import GoldenCase, claims

    @claims("visionzip", anchor="hidden_states")
    def test_golden(case: GoldenCase) -> None:
        assert ours(case["hidden_states"], case.number("contextual")) ...

A test must read every array of its case, so that none that returns early or forgets an output passes: arrays that it
has no use for are named with the reason, `@claims("visionzip", unused={"seed*": "the inputs are stored"})`. A further
test of the same vectors that looks at a part of them says so, `@claims("visionzip", part="the choice alone")`; one of
them must see it all.

`claims("visionzip")` takes every `visionzip.npz` and `visionzip_*.npz` under the folder TOKPRUNE_GOLDEN (default:
golden/ beside this file), searched recursively. It may stand above several tests. Files and cases that are dropped in
are run without a change here; a prefix without a file in the default folder, or a file without a case, fails. When two
prefixes fit a file, the longer claimed one gets it. `unclaimed()` lists the files that no test claims.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent


def folder() -> Path:
    """Where the vectors lie."""
    return Path(os.environ.get("TOKPRUNE_GOLDEN") or TESTS / "golden").expanduser().resolve()


@dataclass(frozen=True)
class GoldenCase:
    """One case of one file: a read-only view of its arrays, loaded when asked for.

    name: of the case inside the file, empty when the file is the case. prefix: what stands before the array names of
    this case. Arrays are torch tensors; an array that the case lacks is looked up in the file's shared ones (such as
    weights that several cases use).
    """

    path: Path
    name: str = ""
    prefix: str = ""
    others: tuple[str, ...] = ()  # prefixes of the file's other cases, where this one is what belongs to none of them
    read: set[str] = field(default_factory=set, compare=False, repr=False)  # full names of arrays that were looked at

    def keys(self) -> list[str]:
        """Names of the case's own arrays, without the case's prefix."""
        own = [key for key in _keys(self.path) if key.startswith(self.prefix)]
        return [key[len(self.prefix) :] for key in own if not key.startswith(self.others or ("\0",))]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in _keys(self.path)

    def array(self, key: str) -> np.ndarray:
        """The array as it was stored."""
        present = _keys(self.path)
        for full in (self.prefix + key, key):
            if full in present:
                self.read.add(full)
                with np.load(self.path, allow_pickle=False) as file:
                    return np.asarray(file[full])
        raise KeyError(f"{self} has no array {key!r}; it has {', '.join(self.keys())}")

    def __getitem__(self, key: str) -> Tensor:
        """The array; what was stored in half precision in float32, in which the published code ran on it."""
        found = torch.from_numpy(self.array(key).copy())
        return found.float() if found.dtype == torch.float16 else found

    def number(self, key: str) -> Any:
        """A 0-d array as a Python number (float64 stays exact)."""
        return self.array(key).item()

    def __str__(self) -> str:
        return f"{self.path.stem}:{self.name}" if self.name else self.path.stem


@functools.cache
def _keys(path: Path) -> tuple[str, ...]:
    with np.load(path, allow_pickle=False) as file:
        return tuple(file.files)


@functools.cache
def files() -> tuple[Path, ...]:
    """All vector files, in a fixed order."""
    return tuple(sorted(folder().rglob("*.npz")))


@functools.cache
def partial() -> tuple[str, ...]:
    """Prefixes that are claimed in part alone, read from the source of the tests."""
    whole: dict[str, bool] = {}
    for prefix, call, _ in _claims():
        complete = not any(keyword.arg == "part" for keyword in call.keywords)
        whole[prefix] = whole.get(prefix, False) or complete
    return tuple(sorted(prefix for prefix, complete in whole.items() if not complete))


def _claims() -> Iterator[tuple[str, ast.Call, Path]]:
    """Prefix, call of `claims` and test file, from the source of the tests."""
    for source in sorted(TESTS.rglob("test_*.py")):
        text = source.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "claims(" in text else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "claims":
                for argument in node.args:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield argument.value, node, source


@functools.cache
def claimed() -> dict[str, tuple[str, ...]]:
    """Prefix -> test files that claim it, read from the source of the tests: no import, so one file alone runs the
    same."""
    found: dict[str, list[str]] = {}
    for prefix, _, source in _claims():
        found.setdefault(prefix, []).append(str(source.relative_to(TESTS)))
    return {prefix: tuple(sources) for prefix, sources in found.items()}


@functools.cache
def anchors() -> dict[str, tuple[str, ...]]:
    """Prefix -> anchors of the tests that read all of a case; an empty one where a test takes the file as one case."""
    found: dict[str, tuple[str, ...]] = {}
    for prefix, call, _ in _claims():
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        anchor = ast.literal_eval(given["anchor"]) if "anchor" in given else ""
        if "part" not in given:
            found[prefix] = found.get(prefix, ()) + ((anchor,) if isinstance(anchor, str) else anchor)
    return found


def orphans(path: Path) -> list[str]:
    """Arrays of a file that are named like those of its cases and belong to none: a case without the anchor."""
    named = anchors().get(owner(path.stem) or "", ("",))
    if "" in named:
        return []
    keys, cases = _keys(path), cases_of(path, named)
    separator = "/" if any("/" in key for key in keys) else "_"
    own = {case.prefix + key for case in cases for key in case}
    names = {key for case in cases for key in case}
    return [key for key in keys if key not in own and key.partition(separator)[2] in names]


def fits(stem: str, prefix: str) -> bool:
    """Whether a file called `stem`.npz belongs to `prefix`: `prumerge` does not take `prumergeplus_a`."""
    return stem == prefix or stem.startswith(prefix + "_")


def owner(stem: str) -> str | None:
    """The longest claimed prefix that fits, or None."""
    return max((p for p in claimed() if fits(stem, p)), key=len, default=None)


def unclaimed(planned: frozenset[str] = frozenset()) -> list[str]:
    """Files that no test claims and whose prefix is not `planned`."""
    return [
        str(path.relative_to(folder()))
        for path in files()
        if owner(path.stem) is None and not any(fits(path.stem, p) for p in planned)
    ]


def cases_of(path: Path, anchor: str | tuple[str, ...] | None = None) -> list[GoldenCase]:
    """The cases inside a file.

    anchor: name of an array that every case has, or several of which each case has one. Keys are then read as `anchor`
    (the file is one case), `case/anchor` or `case_anchor`; a file with both has its named cases, and one of what
    belongs to none of them. Without an anchor the file is one case.
    """
    anchors = (anchor,) if isinstance(anchor, str) else anchor or ()
    keys = _keys(path)
    separator = "/" if any("/" in key for key in keys) else "_"
    if not anchors:
        return [GoldenCase(path)]
    names = [key[: -len(separator + a)] for a in anchors for key in keys if key.endswith(separator + a)]
    names = sorted(set(names), key=names.index)
    # `a_lv_feat` is an array of case `a`, not the anchor `feat` of a case `a_lv`.
    names = [n for n in names if not any(n != other and n.startswith(other + separator) for other in names)]
    found = [GoldenCase(path, name, name + separator) for name in names]
    if set(anchors) & set(keys):
        found.append(GoldenCase(path, others=tuple(name + separator for name in names)))
    return found


def find(prefix: str, anchor: str | tuple[str, ...] | None = None) -> Iterator[GoldenCase | str]:
    """Cases of `prefix`; a string says what is wrong where a case was to be expected."""
    mine = [
        path for path in files() if owner(path.stem) == prefix or (owner(path.stem) is None and fits(path.stem, prefix))
    ]
    if not mine and not os.environ.get("TOKPRUNE_GOLDEN"):  # a folder of one's own may hold some prefixes only
        yield f"no golden vector {prefix}.npz or {prefix}_*.npz under {folder()}"
    for path in mine:
        try:
            cases = cases_of(path, anchor)
        except Exception as error:
            yield f"cannot read {path}: {error}"
            continue
        if not cases:
            yield f"{path.name} holds no case: none of its keys is or ends in {anchor!r}: {', '.join(_keys(path))}"
        yield from cases


def close(actual: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    """Whether what was computed is what was stored, but for `within` of the largest value: what rounding leaves where
    large values cancel. Values that are all numbers of half precision were stored as coarsely as that is.
    """
    if torch.equal(expected, expected.half().to(expected)):
        within = max(within, torch.finfo(torch.float16).eps)
    most = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, atol=within * most, rtol=within)


# Arrays that no test reads. How narrow the closest decision was when the vector was made; and what others say as well,
# which tests/test_golden.py holds true.
MARGINS = ("min_margin", "min_rel_margin")
REPEATED = {"mask": "kept_sorted", "kept_idx_sorted": "kept_idx_topk_order"}


def left_unread(case: GoldenCase, unused: Mapping[str, str]) -> list[str]:
    """Arrays of a case that a test has not looked at and does not name as unused."""
    ignored = {key for key in case for pattern in (*unused, *MARGINS) if fnmatch.fnmatchcase(key, pattern)}
    ignored |= {key for key, other in REPEATED.items() if case.prefix + other in case.read}
    return sorted(key for key in case if case.prefix + key not in case.read and key not in ignored)


def claims(
    *prefixes: str,
    anchor: str | tuple[str, ...] | None = None,
    unused: Mapping[str, str] | None = None,
    part: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: run the test once per case of these prefixes, as its argument `case`. The prefixes must be literals.

    unused: names (or patterns) of arrays that the test does not read, and why; any other that it leaves unread fails
    it.
    part: which part of the arrays this test is about, for one beside another test that reads them all.
    """
    found = [case for prefix in prefixes for case in find(prefix, anchor)]
    ids = [str(c) if isinstance(c, GoldenCase) else "missing-" + re.sub(r"\W+", "-", prefixes[0]) for c in found]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(case: GoldenCase | str, **fixtures: Any) -> None:
            if isinstance(case, str):
                pytest.fail(case)
            case.read.clear()
            test(case=case, **fixtures)
            left = left_unread(case, unused or {})
            if part and not case.read:
                pytest.fail(f"{case}: the test read nothing of it.")
            if left and not part:
                pytest.fail(
                    f"{case} holds arrays that the test did not read: {', '.join(left)}. Compare with them, or say "
                    f"why not: @claims(..., unused={{{left[0]!r}: 'the reason'}})"
                )

        return pytest.mark.parametrize("case", found, ids=ids)(run)

    return decorate
