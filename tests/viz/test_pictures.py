"""Frame strips, heat maps and plots: what they show is what was given."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.viz.cuts import cropped
from tokprune.errors import MissingExtraError, OptionError, install_line
from tokprune.profiling.plots import latency_bars
from tokprune.profiling.report import ProfileReport, RunResult
from tokprune.profiling.timing import Measurement
from tokprune.tokens import Layout, Selection
from tokprune.viz import geometry as geo
from tokprune.viz import plots
from tokprune.viz.heatmap import draw_heatmap, scaled
from tokprune.viz.plots import Point
from tokprune.viz.strip import frame_budgets, frame_layout, frame_strip

FRAMES = [Image.new("RGB", (160, 90), (190, 200, 210)) for _ in range(4)]
CLIP = Layout.grid(3, 4, 4, "video", timestamps=(0.0, 0.5, 1.0, 1.5))
GREY = Image.new("RGB", (320, 240), (200, 180, 160))


def test_budgets_and_layouts_of_frames() -> None:
    kept = torch.tensor([0, 1, 13, 40])
    assert frame_budgets(CLIP, kept) == [2, 1, 0, 1]
    assert frame_budgets(CLIP, Selection(kept)) == [2, 1, 0, 1]
    local, where = frame_layout(CLIP, 3)
    assert where.tolist() == list(range(36, 48))
    assert local.grids == ((3, 4),)


def test_a_strip_shows_each_frame_with_its_own_tokens() -> None:
    empty = np.asarray(frame_strip(FRAMES, CLIP, torch.tensor([0]), frame_width=160, columns=4), dtype=int)
    full = np.asarray(frame_strip(FRAMES, CLIP, torch.tensor([0, 36]), frame_width=160, columns=4), dtype=int)
    changed = np.abs(full - empty).max(2) > 40
    columns = np.flatnonzero(changed[: 24 + 90 + 60].any(0))
    left = 24 + 3 * (160 + 14)
    assert columns.min() >= left - 1 or changed[:70].any()  # the headline counts tokens, too
    picture = changed[60:140, left : left + 160]
    assert picture.any()
    assert not changed[60:140, 24 : 24 + 160].any()


def test_many_frames_are_thinned_and_pairs_show_one() -> None:
    long = Layout.grid(2, 2, 100, "video")
    thinned = frame_strip([FRAMES[0]] * 100, long, torch.tensor([0]), most=8, frame_width=60, columns=8)
    all_of = frame_strip([FRAMES[0]] * 100, long, torch.tensor([0]), most=100, frame_width=60, columns=8)
    assert thinned.height < all_of.height / 4
    pairs = frame_strip(FRAMES, Layout.grid(2, 2, 2, "video"), torch.tensor([0]), frame_width=60)
    assert pairs.width < 250
    with pytest.raises(OptionError, match="3 frames for a layout of 4"):
        frame_strip(FRAMES[:3], CLIP, torch.tensor([0]))


def test_heat_is_brightest_where_the_value_is_highest() -> None:
    layout = Layout.grid(6, 6)
    where = cropped((240, 320))
    values = torch.linspace(0, 1, 36)
    picture = np.asarray(draw_heatmap(GREY, layout, values, where, name="cls_attention", longest=320), dtype=float)
    boxes = geo.rectangles(where, layout)
    light = [picture[int((b[1] + b[3]) / 2), int((b[0] + b[2]) / 2)] @ [0.299, 0.587, 0.114] for b in boxes.tolist()]
    assert (np.diff(light) >= -1).all()
    assert light[-1] - light[0] > 80
    assert picture[100, 10].mean() > 200  # cropped away: pale


def test_scaling_survives_odd_values() -> None:
    level, low, high = scaled(torch.tensor([0.0, 1.0, 2.0, float("nan"), float("inf")]), clip=0.0)
    assert (low, high) == (0.0, 2.0)
    assert level.tolist() == [0.0, 0.5, 1.0, 0.0, 1.0]
    assert scaled(torch.full((3,), 7.0))[0].tolist() == [0.5] * 3
    assert scaled(torch.full((2,), float("nan")))[0].tolist() == [0.0, 0.0]
    with pytest.raises(OptionError, match=r"\(36,\)"):
        draw_heatmap(GREY, Layout.grid(6, 6), torch.zeros(36, 2))


def points() -> list[Point]:
    return [
        Point("divprune", 0.5, 0.80, 0.78, 0.82, 90.0),
        Point("divprune", 0.1, 0.70, None, None, 40.0),
        Point("random", 0.5, 0.75, None, None, 88.0),
        Point("random", 0.1, 0.50, None, None, 41.0),
    ]


def test_the_front_holds_what_nothing_beats() -> None:
    assert [(p.method, p.ratio) for p in plots.front(points())] == [
        ("divprune", 0.1),
        ("random", 0.5),
        ("divprune", 0.5),
    ]
    assert plots.front([Point("a", 1.0, 0.5)]) == []


def test_lines_and_bars_carry_the_numbers() -> None:
    axes = plots.accuracy_over_ratio(points(), full=0.83).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["divprune"].get_xdata()) == [0.5, 0.1]
    assert list(lines["divprune"].get_ydata()) == [0.8, 0.7]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["10 %", "50 %"]
    axes = plots.pareto(points(), Point("full", 1.0, 0.83, cost=150.0)).axes[0]
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {"divprune", "random", "all tokens"}
    axes = latency_bars(report()).axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert sum(widths) == pytest.approx(2 * 6 * 10.0)
    assert any("1.00 x" in t.get_text() for t in axes.texts)


@pytest.mark.parametrize("count", [11, 15, 24])
def test_no_two_of_many_methods_look_alike(count: int) -> None:
    names = ["random", *(f"method {i}" for i in range(count))]
    looks = plots.looks(names)
    assert list(looks) == names
    assert len({colour for colour, _ in looks.values()}) == count + 1
    markers = [marker for _, marker in looks.values()]
    assert len(set(markers)) == min(count, len(plots.MARKERS)) + 1
    colours = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour, _ in looks.values()], float)
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 1e3 * np.eye(count + 1)
    assert apart.min() > (60 if count < 16 else 20)
    figure = plots.accuracy_over_ratio([Point(n, r, 0.5 + 0.01 * i) for i, n in enumerate(names) for r in (0.5, 0.1)])
    figure.canvas.draw()
    axes = figure.axes[0]
    box, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
    assert legend.x0 >= box.x1, "the legend lies on the plot"
    assert 0 <= legend.y0 < legend.y1 <= figure.bbox.height, "the legend is cut off"
    assert legend.x1 <= figure.bbox.width, "the legend is cut off"


def test_the_parts_of_a_bar_add_up_to_the_number_beside_it() -> None:
    """Each run is slow in another stage, so that no run is as quick as the medians of the stages together."""
    stages = ("vision", "projector", "select", "prefill", "decode", "other")
    times = {
        stage: Measurement(stage, "ms", tuple(40.0 + i if i == at else 10.0 for i in range(6)))
        for at, stage in enumerate(stages)
    }
    total = [sum(times[stage].samples[i] for stage in stages) for i in range(6)]
    times |= {name: Measurement(name, "ms", tuple(total)) for name in ("ttft", "total")}
    times["decode_tokens_per_s"] = Measurement("d", "tokens/s", (5.0,) * 6)
    noisy = ProfileReport("tiny", (RunResult("plain", "plain", times, 9, 9, 20),), 4, 1, {"repeats": 6})
    axes = latency_bars(noisy).axes[0]
    assert sum(bar.get_width() for bar in axes.patches) == sorted(total)[2] == 92.0
    assert any(text.get_text().startswith("92 ms") for text in axes.texts)


def report() -> ProfileReport:
    def cell(name: str, kind: str) -> RunResult:
        parts = ("vision", "projector", "select", "prefill", "decode", "other")
        times = {part: Measurement(part, "ms", (10.0,)) for part in parts}
        times |= {name: Measurement(name, "ms", (60.0,)) for name in ("ttft", "total")}
        return RunResult(name, kind, times | {"decode_tokens_per_s": Measurement("d", "tokens/s", (5.0,))}, 9, 9, 20)

    return ProfileReport("tiny", (cell("plain", "plain"), cell("divprune 0.1", "pruned")), 4, 1, {"repeats": 1})


def test_files_are_written_equal_and_wrong_endings_refused(tmp_path: Path) -> None:
    files = [plots.save(latency_bars(report(), decode=False), tmp_path / f"{i}.png") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert Image.open(files[0]).width > 600
    with pytest.raises(OptionError, match=r"\.png, \.svg or \.pdf"):
        plots.save(latency_bars(report()), tmp_path / "x.bmp")


def test_records_are_read_from_json(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    record = {"method": "hired", "ratio": 0.2, "accuracy": 0.7, "ttft_ms": 31}
    file.write_text(json.dumps({"results": [record]}))
    assert Point.read(file, cost="ttft_ms") == [Point("hired", 0.2, 0.7, cost=31)]
    with pytest.raises(OptionError, match='"score"'):
        Point.read([{"method": "hired"}])
    with pytest.raises(OptionError, match="cannot read"):
        Point.read(tmp_path / "none.json")
    with pytest.raises(OptionError, match="has a cost"):
        plots.pareto([Point("a", 0.1, 0.5)])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=re.escape(install_line("plot"))):
        plots.accuracy_over_ratio(points())
