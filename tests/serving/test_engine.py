"""vLLM with the plug-in against transformers with tokprune: the same weights, the same method, the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serving.answers import answers, load
from tests.serving.checkpoints import ARCHITECTURES, VIDEO
from tests.serving.conftest import started
from tests.serving.engine import job

pytestmark = pytest.mark.slow

Job = dict[str, Any]
CACHED = {"enable_prefix_caching": True}
CHUNKS = {**CACHED, "max_num_batched_tokens": 512}  # all prompts together are longer: prefills are cut
OFF = {"enable_prefix_caching": False}
METHODS = {
    "llava": ("hired", "random"),
    "llava_next": ("visionzip",),
    "llava_onevision": ("vispruner",),
    "qwen2_5_vl": ("pool",),
    "qwen3_vl": ("tome_merge",),  # merges DeepStack planes, too
    "internvl": ("fastervlm",),
}
PLAIN = ("llava", "qwen2_5_vl")  # the plug-in is installed, and nobody asks for it


def jobs(folder: Path) -> dict[str, Job]:
    """All that one process of vLLM runs, by name; those of a family one after the other."""
    out: dict[str, Job] = {}
    for family in ARCHITECTURES:
        out[f"{family} cached"] = job(folder, family, rounds=2, engine=CHUNKS)
        out[f"{family} off"] = job(folder, family, ratio=0.5, engine=OFF)
        if family in VIDEO:
            out[f"{family} video"] = job(folder, family, "video", rounds=2, engine=CACHED)
        for method in METHODS[family]:
            out[f"{family} {method}"] = job(folder, family, method=method, engine=CACHED)
        if family in PLAIN:
            out[f"{family} plain"] = job(folder, family, ratio=None, engine=CACHED)
    for method in ("cdpruner", "prumerge", "adaptive_budget", "globalcom2"):
        options = {"method": {"name": "divprune"}} if method == "adaptive_budget" else {}
        out[f"refused {method}"] = job(folder, "llava", method=method, options=options)
    out["refused cls"] = job(folder, "qwen2_5_vl", method="fastervlm")
    return out


@pytest.fixture(scope="module")
def results(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM said to each job."""
    folder = tmp_path_factory.mktemp("engine")
    asked, told, log = folder / "jobs.json", folder / "out.json", folder / "log.txt"
    listed = jobs(checkpoints)
    asked.write_text(json.dumps(list(listed.values())), encoding="utf-8")
    process = started("-m", "tests.serving.engine", str(asked), str(told), log=log, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    code = process.wait(timeout=1500)
    tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    assert code == 0, tail
    return dict(zip(listed, json.loads(told.read_text(encoding="utf-8")), strict=True))


NAMES = [name for name in jobs(Path()) if not name.startswith("refused")]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_transformers(name: str, results: dict[str, Any], checkpoints: Path) -> None:
    asked, rounds = jobs(checkpoints)[name], results[name]
    assert isinstance(rounds, list), rounds
    tiny = load(checkpoints, asked["family"])
    expected = answers(tiny, asked["kind"], asked["ratio"], asked.get("method", "divprune"))
    for found in rounds:
        assert [one["prompt"] for one in found] == [one["prompt"] for one in expected]
        assert [one["tokens"] for one in found] == [one["tokens"] for one in expected]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_prefix_cache_was_used(family: str, results: dict[str, Any]) -> None:
    first, second = results[f"{family} cached"]
    total = sum(one["prompt"] for one in second)
    assert sum(one["cached"] for one in second) > total / 3
    assert sum(one["cached"] for one in second) > sum(one["cached"] for one in first)
    assert sum(one["cached"] for one in results[f"{family} off"][0]) == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cdpruner", "reads the question"),
        ("prumerge", "depends on the picture"),
        ("adaptive_budget", "shares its tokens out"),
        ("globalcom2", "loads this tower's blocks 0 to 2"),
        ("cls", "needs cls_attention"),
    ],
)
def test_what_cannot_be_right_is_refused_at_the_start(name: str, reason: str, results: dict[str, Any]) -> None:
    told = results[f"refused {name}"]
    assert isinstance(told, str)
    assert reason in told
