"""The published index rules, and sampling by time."""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden_vectors import GoldenCase, claims
from tokprune.errors import OptionError
from tokprune.video import sampling

COUNTING = {
    "lin": sampling.linspace,
    "linuniq": sampling.linspace_unique,
    "internvl": sampling.centers,
    "hf": sampling.floor,
}


@claims("frame_indices")
def test_golden(case: GoldenCase) -> None:
    rates = dict(zip(case.array("N").tolist(), case.array("fps").tolist(), strict=True)) if "N" in case else {}
    tested = 0
    for key in case:
        kind, _, rest = key.partition("_N")
        if not rest:
            continue
        numbers = rest.split("_K")
        total, count = int(numbers[0]), int(numbers[-1])
        assert len(numbers) == 1 or kind == "lvb_rule" or count in case.array("K"), key
        if kind in COUNTING:
            ours = COUNTING[kind](total, count)
        elif kind == "hf_fps1":
            ours = sampling.floor_fps(total, rates[total], 1.0)
        elif kind == "llavavid_1fps":
            ours = sampling.every_second(total, rates[total])
        elif kind == "lvb_rule":
            ours = sampling.longvideobench(total, rates[total], count)
        else:
            pytest.fail(f"no rule for {key}")
        np.testing.assert_array_equal(ours, case.array(key), err_msg=key)
        assert ours.dtype == np.int64
        tested += 1
    assert tested, "the file holds no index rule"
    if "quota_dur" in case:
        ours_frames = [sampling.quota_frames(d) for d in case.array("quota_dur").tolist()]
        assert ours_frames == case.array("quota_nframes_base96_add64").tolist()


@pytest.mark.parametrize("name", sampling.RULES)
@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 7), (100, 9), (100, 99), (10**6, 64)])
def test_rules_stay_inside_and_ascend(name: str, total: int, count: int) -> None:
    found = sampling.rule(name)(total, count)
    assert len(found) == count
    assert found.min() >= 0
    assert found.max() < total
    assert (np.diff(found) >= 0).all()


def test_rounded_differs_from_floor() -> None:
    assert sampling.linspace_rounded(10, 4).tolist() == [0, 3, 6, 9]
    assert sampling.linspace_rounded(11, 4).tolist() == [0, 3, 7, 10]
    assert sampling.linspace(11, 4).tolist() == [0, 3, 6, 10]


def test_every_second_caps() -> None:
    assert sampling.every_second(300, 30.0, most=5).tolist() == sampling.linspace(300, 5).tolist()
    assert len(sampling.every_second(300, 30.0, most=10)) == 10


def test_at_times_takes_the_frame_on_screen() -> None:
    times = np.array([0.0, 0.4, 1.0, 1.1, 2.6])
    assert sampling.at_times(times, 1.0, 0.0, 3.0).tolist() == [0, 2, 3]
    assert sampling.at_times(times, 2.0, 0.5, 2.0).tolist() == [1, 2, 3]
    assert sampling.at_times(times, 100.0, 0.0, 3.0).tolist() == [0, 1, 2, 3, 4]
    assert sampling.at_times(np.arange(90) / 29.97, 29.97, 0.0, 90 / 29.97).tolist() == list(range(90))


def test_errors() -> None:
    with pytest.raises(OptionError, match="at most 3"):
        sampling.floor(3, 4)
    with pytest.raises(OptionError, match="Did you mean 'centers'"):
        sampling.rule("center")
    with pytest.raises(OptionError, match="at least 1"):
        sampling.linspace(0, 4)
    for bad in (0, -1.0, float("nan"), True, "1"):
        with pytest.raises(OptionError, match="frames per second"):
            sampling.check_rate(bad)


def test_frames_by_length() -> None:
    assert [sampling.frames_by_length("quota", d) for d in (0, 10, 60, 600, 3600, 7200)] == [96, 96, 97, 106, 160, 224]
    assert sampling.frames_by_length("quota:64:32", 3600) == 96
    assert sampling.frames_by_length("quota:8", 0) == 8
    for bad in ("quot", "quota:0", "quota:a", "quota:1:2:3", "64"):
        with pytest.raises(OptionError, match="quota:96:64"):
            sampling.frames_by_length(bad, 10)
