"""What every frames method promises, tried on all that are registered, with the options that change their path."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from tests.methods.frames.clips import ragged, video
from tests.methods.streams import changed
from tokprune.config import PruneConfig
from tokprune.errors import MissingQueryError, MissingSignalError, OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.frames_base import FramesMethod, PerFrame, ScoredFrames
from tokprune.registry import get_method, list_methods, method_class
from tokprune.tokens import VisualTokens

NAMES = list_methods("frames")
SIGNAL = {"score": "self"}  # scored by the signal frame_scores
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("uniform_frames", {"spread": "tokens"}),
    ("uniform_frames", {"rule": "centers"}),
    ("fps_frames", {"fps": 1.0}),
    ("fps_frames", {"fps": 30.0}),
    ("quota", SIGNAL),
    ("quota", {"score": "clip", "minimum": 2}),
    ("quota", {"granularity": "token", "calibrate": "softmax", "power": 1}),
    *(("quota", {"reducer": r}) for r in ("avgpool", "linspace", "tome", "tome_separable")),
    ("aks", SIGNAL),
    ("aks", {**SIGNAL, "threshold": 0.2, "depth": 2}),
    ("wfs_sb", {**SIGNAL, "balance": 0.0}),
    ("scenetilling", {"spread": "frames"}),
    ("scenetilling", {"boundaries": 3}),
]
every_variant = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[f"{n}-{'-'.join(map(str, o.values()))}".strip("-") for n, o in VARIANTS]
)
every_method = pytest.mark.parametrize("name", NAMES)
SCORES = {
    "nan": lambda n: torch.full((n,), torch.nan),
    "some nan": lambda n: torch.rand(n).index_fill(0, torch.arange(0, n, 2), torch.nan),
    "infinite": lambda n: torch.rand(n).index_fill(0, torch.tensor([n // 2]), torch.inf),
    "zero": torch.zeros,
    "one hot": lambda n: torch.zeros(n).index_fill(0, torch.tensor([n // 2]), 1.0),
    "negative": lambda n: -torch.arange(1.0, n + 1),
    "huge": lambda n: torch.rand(n) * 1e30,
    "tiny": lambda n: torch.rand(n) * 1e-30,
}


def build(name: str, options: dict[str, Any]) -> FramesMethod:
    method = get_method(name, **options)
    assert isinstance(method, FramesMethod)
    return method


def check(method: FramesMethod, tokens: VisualTokens, keep: int) -> list[int]:
    """Shares that fit and add up."""
    counts = method.allocate(tokens, keep)
    assert len(counts) == tokens.layout.num_groups
    assert sum(counts) == keep
    assert all(isinstance(c, int) and 0 <= c <= n for c, n in zip(counts, tokens.layout.group_sizes, strict=True))
    return counts


def select(method: FramesMethod, tokens: VisualTokens, keep: int) -> None:
    chosen = PerFrame(method).select(tokens, keep)
    indices = chosen.indices
    assert indices.shape == (keep,)
    assert (indices.diff() > 0).all()
    assert 0 <= int(indices[0]) <= int(indices[-1]) < len(tokens)
    if chosen.weights is not None:
        dense = chosen.weights.dense(keep, len(tokens))
        torch.testing.assert_close(dense.sum(1), torch.ones(keep))  # means: what all tokens share survives
    out = chosen.apply(tokens.features)
    assert out.shape == (keep, tokens.features.shape[1])
    assert out.dtype == tokens.features.dtype
    assert torch.isfinite(out).all()
    assert torch.bincount(tokens.layout.group[indices], minlength=tokens.layout.num_groups).tolist() == list(
        chosen.info["frame_tokens"].tolist()
    )


@every_variant
def test_every_budget_is_met_exactly(name: str, options: dict[str, Any]) -> None:
    method = build(name, options)
    for tokens in (video(5, (3, 3)), ragged(), video(1, (3, 4)), video(9, (1, 1)), video(3, (1, 7))):
        n = len(tokens)
        for keep in range(1, n + 1):
            check(method, tokens, keep)
        for keep in {1, 2, n // 3, n // 2 | 1, n - 1, n} & set(range(1, n + 1)):
            select(method, tokens, keep)


@every_variant
@pytest.mark.parametrize("kind", SCORES)
def test_odd_scores(name: str, options: dict[str, Any], kind: str) -> None:
    method = build(name, options)
    for tokens in (video(7, (2, 3)), ragged(), video(1, (2, 3))):
        scores = SCORES[kind](tokens.layout.num_groups)
        tokens = dataclasses.replace(tokens, signals={"frame_scores": scores})
        for keep in (1, 2, len(tokens) // 2, len(tokens) - 1, len(tokens)):
            check(method, tokens, max(keep, 1))


@every_variant
@pytest.mark.parametrize("kind", ["all equal", "zero", "repeated frames", "huge"])
def test_odd_features(name: str, options: dict[str, Any], kind: str) -> None:
    change = {
        "all equal": lambda x: x[:1].expand_as(x).clone(),
        "zero": torch.zeros_like,
        "repeated frames": lambda x: x[:6].repeat(len(x) // 6, 1),
        "huge": lambda x: x * 1e4,
    }[kind]
    method, tokens = build(name, options), video(7, (2, 3))
    tokens = dataclasses.replace(tokens, features=change(tokens.features))
    for keep in (1, 9, 31):
        check(method, tokens, keep)
        select(method, tokens, keep)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    for tokens in (video(), ragged()):
        tokens = changed(dataclasses.replace(tokens, query=video().query), lambda x: x.to(dtype))
        for keep in (1, 17):
            check(build(name, options), tokens, keep)
            select(build(name, options), tokens, keep)


@every_variant
def test_a_video_of_identical_frames_is_shared_by_place_alone(name: str, options: dict[str, Any]) -> None:
    """Rounding must not decide: scores that are constant up to noise give every frame of equal standing nearly as
    much.
    """
    tokens = video(8, (3, 3))
    noise = 1e-7 * torch.randn(72, 16, generator=torch.Generator().manual_seed(0))
    frame = tokens.features[:9].repeat(8, 1) + noise
    tokens = dataclasses.replace(tokens, features=frame, signals={"frame_scores": torch.full((8,), 0.4)})
    counts = check(build(name, options), tokens, 16)
    early, late = sum(counts[:4]), sum(counts[4:])
    assert abs(early - late) <= 9, f"{counts}: one half of a constant video got more than a frame more"


@every_variant
def test_inputs_stay_and_results_repeat(name: str, options: dict[str, Any]) -> None:
    method, tokens = build(name, options), video()
    before = tokens.features.clone(), tokens.signals["frame_scores"].clone()
    first = PerFrame(method).select(tokens, 31)
    torch.manual_seed(5)
    again = PerFrame(method).select(tokens, 31)
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.apply(tokens.features), again.apply(tokens.features))
    assert torch.equal(before[0], tokens.features)
    assert torch.equal(before[1], tokens.signals["frame_scores"])


@every_variant
def test_features_with_nan_are_refused_or_not_read(name: str, options: dict[str, Any]) -> None:
    method, clean = build(name, options), video()
    broken = dataclasses.replace(clean, features=clean.features.index_fill(0, torch.tensor([3]), torch.nan))
    try:
        counts = method.allocate(broken, 31)
    except OptionError as error:
        assert "NaN" in str(error)  # noqa: PT017 - either outcome is right, the message has to be too
    else:
        assert counts == method.allocate(clean, 31)


@every_variant
def test_needs_and_the_question(name: str, options: dict[str, Any]) -> None:
    method, tokens = build(name, options), video()
    assert set(method.needs) <= {"frame_scores"}
    assert (method.score_options is None) == (method.needs == ())
    if method.needs:
        with pytest.raises(MissingSignalError, match="frame_scores"):
            method.allocate(dataclasses.replace(tokens, signals={}), 9)
        wrong = dataclasses.replace(tokens, signals={"frame_scores": torch.rand(5)})
        with pytest.raises(OptionError, match=r"5.*for 6 frames"):
            method.allocate(wrong, 9)
    elif method.query_aware:
        with pytest.raises(MissingQueryError):
            method.allocate(dataclasses.replace(tokens, query=None), 9)
    else:
        check(method, dataclasses.replace(tokens, query=None), 9)


@every_variant
def test_config_round_trip(name: str, options: dict[str, Any]) -> None:
    config = PruneConfig.build([build(name, options), "divprune"], ratio=0.1)
    again = PruneConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again.methods[0]) == hash(build(name, options))


@every_method
def test_is_a_described_method_for_videos(name: str) -> None:
    info = method_class(name).info
    assert info.video
    assert info.paper
    assert info.complexity
    assert not (method_class(name).__doc__ or "").startswith(f"{method_class(name).__name__}(")
    built = get_method(name)
    assert built.stage == "frames"
    for field in dataclasses.fields(built):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(built, field.name, None)


@every_method
def test_its_own_reducer_is_a_connector_method(name: str) -> None:
    method = get_method(name)
    assert isinstance(method, FramesMethod)
    assert isinstance(method.inside, ConnectorMethod)
    assert method.inside.exact
    assert isinstance(method, ScoredFrames) == method.query_aware


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_variant
def test_on_a_gpu(name: str, options: dict[str, Any]) -> None:
    for tokens in (video(), ragged()):
        there = changed(dataclasses.replace(tokens, query=video().query), lambda x: x.cuda())
        there = dataclasses.replace(there, layout=tokens.layout.to("cuda"))
        chosen = PerFrame(build(name, options)).select(there, 17)
        assert chosen.indices.is_cuda
        assert chosen.apply(there.features).shape == (17, 16)
