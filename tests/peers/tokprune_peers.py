"""A pytest plug-in that puts tokprune on every model which another project's tests build; for `tests/peers/run.py`.

    PYTHONPATH=<this folder> pytest -p tokprune_peers --tokprune-ratio 0.5 tests/models/llava   # in a checkout of
    transformers PYTHONPATH=<this folder> pytest -p tokprune_peers --tokprune-r 4 tests/test_models.py       # in one of
    timm

Only the test process is changed: classes are wrapped as they are defined there, nothing of tokprune works that way.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from expected import CANNOT_HOLD

BUILDING = threading.local()
SEEN: dict[str, Counter[str]] = {"pruned": Counter(), "refused": Counter()}
OUTCOMES: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tokprune")
    group.addoption("--tokprune-ratio", type=float, help="prune every model of transformers at this keep ratio")
    group.addoption("--tokprune-method", default="divprune", help="with this method")
    group.addoption("--tokprune-r", type=int, help="merge so many tokens a block (tome) in every model of timm")
    group.addoption("--tokprune-out", type=Path, help="write test id -> outcome to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--tokprune-ratio") is not None:
        method, ratio = config.getoption("--tokprune-method"), config.getoption("--tokprune-ratio")
        _on_transformers(lambda apply, model: apply(model, method=method, ratio=ratio))
    if config.getoption("--tokprune-r") is not None:
        r = config.getoption("--tokprune-r")
        _on_timm(lambda apply, model: apply(model, method="tome", r=r))


def _prune(how: Any, model: Any) -> None:
    """Prune a finished model; one that is no VLM or ViT of ours stays as it is."""
    import tokprune
    from tokprune.errors import UnsupportedModelError

    name = type(model).__name__
    try:
        how(tokprune.apply, model)
    except UnsupportedModelError:
        SEEN["refused"][name] += 1
    else:
        SEEN["pruned"][name] += 1


def _on_transformers(how: Any) -> None:
    from transformers import PreTrainedModel

    plain = PreTrainedModel.__init_subclass__.__func__  # type: ignore[attr-defined]

    def watch(cls: Any, **kwargs: Any) -> None:
        plain(cls, **kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _pruned_once_built(cls.__init__, how)

    PreTrainedModel.__init_subclass__ = classmethod(watch)  # type: ignore[assignment, method-assign]


def _pruned_once_built(init: Any, how: Any) -> Any:
    """`init`, with pruning after the outermost constructor of a model that holds others."""

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        depth = getattr(BUILDING, "depth", 0)
        BUILDING.depth = depth + 1
        try:
            init(self, *args, **kwargs)
        finally:
            BUILDING.depth = depth
        if depth == 0 and hasattr(self.config, "vision_config"):
            _prune(how, self)

    return wrapped


def _on_timm(how: Any) -> None:
    import timm

    plain = timm.create_model

    @functools.wraps(plain)
    def create_model(*args: Any, **kwargs: Any) -> Any:
        model = plain(*args, **kwargs)
        _prune(how, model)
        return model

    timm.create_model = timm.models.create_model = create_model


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ratio, r = config.getoption("--tokprune-ratio"), config.getoption("--tokprune-r")
    if (ratio is None or ratio == 1) and not r:
        return
    for item in items:
        for pattern, reason in CANNOT_HOLD.items():
            if fnmatch(item.name, pattern):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=False))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The outcome of a test: failed if any phase did."""
    if report.failed or (report.when == "call" and OUTCOMES.get(report.nodeid) != "failed"):
        OUTCOMES[report.nodeid] = "expected" if hasattr(report, "wasxfail") else report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    out = session.config.getoption("--tokprune-out")
    if out is not None and not hasattr(session.config, "workerinput"):
        out.write_text(json.dumps(OUTCOMES, indent=1))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for what, names in SEEN.items():
        if names:
            told = ", ".join(f"{name} ({count})" for name, count in sorted(names.items()))
            terminalreporter.write_line(f"tokprune {what}: {told}")
