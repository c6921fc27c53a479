"""vLLM with the plug-in against transformers with tokprune: the same weights, the same method, the same answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokprune
from tests.serving.answers import answers, greedy, load
from tests.serving.checkpoints import ARCHITECTURES, VIDEO, requests
from tests.serving.conftest import ENVIRONMENT, started
from tests.serving.engine import job
from tokprune.serving import encode
from tokprune.serving.embeds import FAMILIES

pytestmark = pytest.mark.slow

Job = dict[str, Any]
CACHED = {"enable_prefix_caching": True}
CHUNKS = {**CACHED, "max_num_batched_tokens": 512}  # all prompts together are longer: prefills are cut
OFF = {"enable_prefix_caching": False}
METHODS = {
    "llava": ("hired", "random"),
    "llava_next": ("visionzip",),
    "llava_onevision": ("vispruner",),
    "qwen2_5_vl": ("pool", "fastervlm", "hiprune", "visionzip"),  # a whole block, one of windows, keys before rotation
    "qwen3_vl": ("tome_merge", "vispruner"),  # merges DeepStack planes, too; what goes into the merger
    "internvl": ("fastervlm",),
}
CLIPS = {
    "llava_onevision": ("evs", "vidcom2", "holitom", "dycoke", "fastvid", "storm"),
    "qwen2_5_vl": ("evs", "vidcom2", "flashvid", "holitom"),
    "qwen3_vl": ("evs", "vidcom2", "prunevid", "framefusion"),
    "internvl": ("evs", "vidcom2", "auroracap_frames"),
}
HALF = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl")  # in bfloat16, too
EMBEDDED = range(3)  # requests with one picture; their embeddings are made here
BUDGET = 16
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
        for method in CLIPS.get(family, ()):
            out[f"{family} video {method}"] = job(folder, family, "video", method=method, engine=CACHED)
        if family in HALF:
            half = {**CACHED, "dtype": "bfloat16"}
            out[f"half {family}"] = job(folder, family, engine=half)
        if family in FAMILIES:
            file = str(folder / f"{family}.safetensors")
            out[f"embedded {family}"] = job(folder, family, ratio=None, engine={"enable_mm_embeds": True}, embeds=file)
        if family in PLAIN:
            out[f"{family} plain"] = job(folder, family, ratio=None, engine=CACHED)
    for method in ("cdpruner", "prumerge", "adaptive_budget", "globalcom2", "gemfilter"):
        options = {"method": {"name": "divprune"}} if method == "adaptive_budget" else {}
        out[f"refused {method}"] = job(folder, "llava", method=method, options=options)
    compiled = {"compilation_config": {"compile_mm_encoder": True}}
    out["refused compiled"] = job(folder, "qwen2_5_vl", method="fastervlm", engine=compiled)
    return out


@pytest.fixture(scope="module")
def results(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM said to each job."""
    folder = tmp_path_factory.mktemp("engine")
    asked, told, log = folder / "jobs.json", folder / "out.json", folder / "log.txt"
    for family in FAMILIES:
        tiny, asked_of = load(checkpoints, family), requests("image", family)
        pictures = [part for i in EMBEDDED for kind, part in asked_of[i][:-1] if kind == "image"]  # type: ignore[misc]
        rows = encode(tiny.model, tiny.processor, pictures, budget=BUDGET)
        save_file({str(i): x for i, x in zip(EMBEDDED, rows, strict=True)}, checkpoints / f"{family}.safetensors")
    listed = jobs(checkpoints)
    asked.write_text(json.dumps(list(listed.values())), encoding="utf-8")
    process = started("-m", "tests.serving.engine", str(asked), str(told), log=log, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    code = process.wait(timeout=2400)
    tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    assert code == 0, tail
    return dict(zip(listed, json.loads(told.read_text(encoding="utf-8")), strict=True))


NAMES = [name for name in jobs(Path()) if not name.startswith(("refused", "half", "embedded"))]


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
        ("gemfilter", "a pass through the LLM"),
        ("compiled", "compiled vision tower"),
    ],
)
def test_what_cannot_be_right_is_refused_at_the_start(name: str, reason: str, results: dict[str, Any]) -> None:
    told = results[f"refused {name}"]
    assert isinstance(told, str)
    assert reason in told


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_here_are_answered_as_here(family: str, results: dict[str, Any], checkpoints: Path) -> None:
    """vLLM's own model, which never saw the picture, against apply(); newlines go with their lines in both."""
    found = results[f"embedded {family}"]
    assert isinstance(found, list), found
    tiny, sent = load(checkpoints, family), load_file(checkpoints / f"{family}.safetensors")
    for i, one in zip(EMBEDDED, found[0], strict=True):
        inputs = tiny.chat([requests("image", family)[i]])
        with tokprune.apply(tiny.model, "divprune", budget=BUDGET, processor=tiny.processor):
            assert one["tokens"] == greedy(tiny, **inputs)
        words = int((inputs["input_ids"] != tiny.model.config.image_token_id).sum())
        assert one["prompt"] == words + len(sent[str(i)])


@pytest.mark.parametrize("name", [name for name in jobs(Path()) if name.startswith("half")])
def test_bfloat16_agrees_but_for_rounding(name: str, results: dict[str, Any], checkpoints: Path) -> None:
    """Two programs round differently in bfloat16, and random weights have near ties, in scores and in logits: unpruned
    answers differ, too. Prompts are exact, first tokens agree but for a few, and three of four of all tokens."""
    asked = jobs(checkpoints)[name]
    assert isinstance(results[name], list), results[name]
    (found,), tiny = results[name], load(checkpoints, asked["family"], torch.bfloat16)
    expected = answers(tiny, "image", asked["ratio"])
    assert [one["prompt"] for one in found] == [one["prompt"] for one in expected]
    same = [
        [a == b for a, b in zip(x["tokens"], y["tokens"], strict=True)] for x, y in zip(found, expected, strict=True)
    ]
    assert sum(one[0] for one in same) >= 28
    assert sum(map(sum, same)) >= 0.75 * sum(map(len, same))


def test_apply_refuses_the_transformers_that_vllm_wants(vllm_python: Path, checkpoints: Path) -> None:
    """The package and the methods run beside it; apply() says what to install."""
    code = (
        "import sys, transformers, tokprune; from tokprune.errors import UnsupportedModelError\n"
        "model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
        "try: tokprune.apply(model, ratio=0.5)\n"
        "except UnsupportedModelError as error: print(error)"
    )
    command = [str(vllm_python), "-c", code, str(checkpoints / "llava")]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert "transformers >= 5.23" in told.stdout or "transformers>=5.23" in told.stdout
