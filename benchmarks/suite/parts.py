"""The sections beside the LLM: choosing, the encoder stage, video, starting, and counts on a stand-in device."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from benchmarks import encoder_speed, methods, video_decoding
from benchmarks import selection as divprune
from benchmarks.naive.pairs import CASES, PAIRS, Pair
from benchmarks.suite.rows import Row, number, paired, ratio, threads
from tests.adapters.counted import BUDGETED, Counts, added
from tokprune.profiling.timing import Measurement
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import FAMILIES

STEP = 4
NEXT = "LLaVA-NeXT, 288 of 2880"
RANKS = "the dispatch of a few dozen operations: it ranks scores that the tower made, without arithmetic to save"
SAME = "none was measured; as the published form, it spends its time in matrix products, copies and small operations"


def selection(seconds: float = 1.0) -> Iterator[Row]:
    """Every connector method on 2880 tokens beside its published formulation, and beside what it cannot do without
    where that is said; one thread."""
    threads(1)
    for pair in (p for p in PAIRS if p.fits(CASES[NEXT])):
        race = methods.race(pair, CASES[NEXT], 7, seconds)
        what = f"{pair.name}, {NEXT}: CPU time over the published formulation's"
        measured = Measurement(what, "", (race.ratio_q1, race.ratio, race.ratio_q3))
        limit = RANKS if pair.ranks else SAME
        beside = {"published_ms": race.published.cpu_ms, "ours_ms": race.ours.cpu_ms, "rounds": race.rounds}
        if pair.least is not None:
            limit = pair.least_is
            beside |= _over_least(pair)
        yield Row(what, measured, 0.5, False, limit, {**beside, "quartiles": True})
    found = divprune.halves(1, 2880, 288, 5)
    what = f"divprune, {NEXT}: speed of half a matrix over the whole product"
    over = ratio(what, found["whole_ms"], found["halves_ms"])
    beside = {f"{name}_ms": median(found[f"{name}_ms"]) for name in ("whole", "halves", "product")}
    yield Row(what, over, 1.6, True, "half of the bare product, beside", beside)


def _over_least(pair: Pair, repeats: int = 9) -> dict[str, float]:
    """Milliseconds of the least that a method must do, and how many times that the method takes."""
    assert pair.least is not None
    inputs = pair.inputs(CASES[NEXT], torch.Generator().manual_seed(0))
    calls = max(1, round(20.0 / max(methods.once(pair.ours, inputs, 2)[0], 1e-3)))  # twenty milliseconds

    def often(function: Callable[..., object]) -> None:
        for _ in range(calls):
            function(*inputs)

    with torch.no_grad():
        cells = {"ours": partial(often, pair.ours), "least": partial(often, pair.least)}
        found = paired(cells, time.process_time, repeats)
    over = ratio("", found["ours"], found["least"])
    return {
        "limit_ms": median(found["least"]) / calls * pair.least_share,
        "over_limit": over.median / pair.least_share,
    }


def encoder(repeats: int = 5) -> list[Row]:
    """ToMe by hooks beside the published patch written into the forward, ViT-B of timm, one thread."""
    import timm

    threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
    images = torch.randn(4, 3, 224, 224)

    def ours() -> None:
        with apply_encoder(model, "tome", r=8):
            model(images)

    cells = {
        "hooks": ours,
        "written": lambda: encoder_speed.written_out(model, images, 8),
        "plain": lambda: model(images),
    }
    with torch.no_grad():
        found = paired(cells, time.process_time, repeats)
    beside = {f"{name}_ms": sorted(times)[repeats // 2] for name, times in found.items()}
    what = "ToMe on ViT-B/16, r=8: CPU time over the published patch in the forward"
    faster = "ToMe on ViT-B/16, r=8: speed of the tower over the unpruned one"
    return [
        Row(what, ratio(what, found["hooks"], found["written"]), 1.05, False, "the hooks of each block", beside),
        Row(faster, ratio(faster, found["plain"], found["hooks"]), None, True, "", beside),
    ]


def video(seconds: int = 10, frames: int = 32, repeats: int = 3) -> list[Row]:
    """Reading frames of a 720p file: the default reader beside the fastest that is right."""
    threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        video_decoding.write(path, seconds, 250)
        cells = video_decoding.measure(path, frames, ["auto", "torchcodec", "decord"], repeats)
    by_name = {c["backend"]: c for c in cells}
    right = [c for c in cells if not c.get("error") and not c["wrong"] and c["returned"] == frames]
    fastest = min(right, key=lambda c: float(c["median_cpu_s"]))
    what = f"{frames} frames of {seconds} s of 720p: CPU time of the default reader over the fastest right one's"
    beside = {f"{c['backend']}_s": c["median_cpu_s"] for c in right} | {"fastest": fastest["backend"]}
    wrong = f"{frames} frames of {seconds} s of 720p: wrong frames of the default reader"
    return [
        Row(what, ratio(what, by_name["auto"]["cpu_s"], fastest["cpu_s"]), 1.1, False, "", beside),
        Row(wrong, number(wrong, by_name["auto"].get("wrong", frames)), 0, False, ""),
    ]


IMPORT = """
import time, torch
start = time.perf_counter()
import tokprune
after = time.perf_counter()
tokprune.list_methods()
print(after - start, time.perf_counter() - start)
"""


def start(repeats: int = 7) -> list[Row]:
    """Starting: the package over torch, and the command line's help, each in a process of its own."""

    def run(*words: str) -> tuple[float, str]:
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        return time.perf_counter() - begun, done.stdout

    loaded = [[float(x) for x in run("-c", IMPORT)[1].split()] for _ in range(repeats + 1)][1:]
    alone_s, listed_s = (tuple(column) for column in zip(*loaded, strict=True))
    shown = [run("-m", "tokprune", "--help")[0] for _ in range(repeats + 1)][1:]
    alone = [run("-c", "import typer, rich.progress")[0] for _ in range(repeats)]
    over, listed = "import tokprune, over torch", "import tokprune and the list of its methods, over torch"
    whole = "tokprune --help, the whole process"
    beside = {"python_with_typer_ms": 1e3 * sorted(alone)[repeats // 2]}
    return [
        Row(over, Measurement(over, "s", alone_s), 0.3),
        Row(listed, Measurement(listed, "s", listed_s), 0.3, False, "a module for each of the methods"),
        Row(
            whole,
            Measurement(whole, "s", tuple(shown)),
            0.5,
            False,
            "Python itself, typer, and the console and progress bar of rich",
            beside,
        ),
    ]


LOOPS = ("ops/", "methods/")
"""Where choices are made; the rest is what the runtime adds whatever the method."""


def _counts(methods: tuple[str, ...], family: str) -> dict[str, Counts]:
    """Of one family, whose models are built once; without the methods for which its tower has not the signals."""
    torch.set_num_threads(1)
    found = {method: added(family, method) for method in methods}
    return {method: one for method, one in found.items() if one is not None}


def counts(families: tuple[str, ...] = FAMILIES, methods: tuple[str, ...] = BUDGETED) -> list[Row]:
    """Waits and operations that pruning adds to two prompts with a picture each, on the stand-in device."""
    found: dict[str, dict[str, Counts]] = {method: {} for method in methods}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # counts do not depend on who else computes
        for family, by_method in zip(families, pool.map(partial(_counts, methods), families), strict=True):
            for method, one in by_method.items():
                found[method][family] = one
    rows = []
    for method, at in found.items():
        kinds: list[tuple[str, Callable[[Counts], int], float | None]] = [
            ("operations added to a prefill, the choice left out", lambda one: one.prefill.outside(*LOOPS), 120),
        ]
        if method == "hired":  # its choice has no loop
            kinds = [("operations added to a prefill, the choice with them", lambda one: one.prefill.launches, 150)]
        kinds = [
            ("waits that pruning adds to a prefill", lambda one: one.prefill.syncs, 2),
            ("waits that pruning adds to generate()", lambda one: one.answer.syncs, 3),
            *kinds,
            ("operations of the choice", lambda one: one.prefill.launches - one.prefill.outside(*LOOPS), None),
            ("waits added to a decode step", lambda one: one.step.syncs, 0),
            ("operations added to a decode step", lambda one: one.step.launches, STEP),
        ]
        for kind, value, target in kinds:
            values = {family: value(one) for family, one in at.items()}
            worst = max(values, key=values.__getitem__)
            what = f"{method}: {kind}, most of {len(values)} families"
            rows.append(Row(what, number(what, values[worst]), target, False, worst, values))
    return rows
