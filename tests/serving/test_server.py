"""The OpenAI-compatible server with the plug-in: many requests at once, restarts, and vLLM as it was without it."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving.answers import answers, load
from tests.serving.checkpoints import TOKENS, picture, requests
from tests.serving.conftest import ROOT, started
from tests.serving.engine import job, overrides
from tokprune.adapters.families.tiny import BOS
from tokprune.testing import Part

pytestmark = pytest.mark.slow


@contextmanager
def served(folder: Path, family: str, ratio: float | None, *more: str, **environment: str) -> Iterator[str]:
    """A server's address; `more` are flags of vLLM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"server_{port}.txt"
    told = overrides(job(folder, family, ratio=ratio))
    flags = f"--served-model-name tiny --dtype float32 --host 127.0.0.1 --port {port} --max-model-len 2048".split()
    flags += ["--enforce-eager", "--max-num-seqs", "32", "--model", str(folder / family)]
    flags += ["--limit-mm-per-prompt", json.dumps({"image": 4} | ({} if family == "llava" else {"video": 0})), *more]
    flags += ["--hf-overrides", json.dumps(told)] if told else []
    process = started("-m", "vllm.entrypoints.openai.api_server", *flags, log=log, **environment)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400
        while not _healthy(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(encoding="utf-8", errors="replace"))
            time.sleep(1)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except Exception:
            process.kill()
            raise


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(address + "/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(address: str, parts: list[Part]) -> dict[str, Any]:
    """Prompt length and answer of one chat request."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            continue
        png = io.BytesIO()
        part[1].save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "min_tokens": TOKENS,
        "ignore_eos": True,
        "add_special_tokens": True,
        "allowed_token_ids": list(range(256)),
        "return_token_ids": True,
    }
    call = urllib.request.Request(
        address + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=300) as answer:
        told = json.load(answer)
    return {"prompt": told["usage"]["prompt_tokens"], "tokens": told["choices"][0]["token_ids"]}


def all_at_once(address: str, family: str) -> list[dict[str, Any]]:
    """The answers to 32 requests that are sent together."""
    asked = requests("image", family)
    assert len(asked) == 32
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda parts: ask(address, parts), asked))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_thirty_two_at_once_twice_and_after_a_restart(family: str, checkpoints: Path) -> None:
    """Mixed sizes; among them one picture with two questions, and whole requests again."""
    expected = answers(load(checkpoints, family), "image", 0.25)
    with served(checkpoints, family, 0.25) as address:
        for _ in range(2):
            assert all_at_once(address, family) == expected
    with served(checkpoints, family, 0.25, "--no-enable-prefix-caching", "--mm-processor-cache-gb", "0") as address:
        assert all_at_once(address, family) == expected


def ask_about_embeddings(address: str, checkpoints: Path) -> None:
    """The two halves of the example: encoded here, asked there; the prompt is as long as what was sent."""
    script, file = str(ROOT / "examples/encode_here_serve_there.py"), str(checkpoints / "picture.st")
    image = checkpoints / "picture.png"
    picture(64, 40, 1).save(image)
    encode = ("encode", str(checkpoints / "llava"), str(image), "--budget", "9", "--out", file)
    for words in (encode, ("ask", address, file, "What is on the picture?")):
        run = subprocess.run([sys.executable, script, *words], check=True, capture_output=True, text=True, cwd=ROOT)
    tiny = load(checkpoints, "llava")
    ids = tiny.chat([[("image", picture(64, 40, 1)), "What is on the picture?"]])["input_ids"][0]
    assert ids[0] == BOS  # which the API leaves to the chat template, and this one has none
    told = re.search(r"'prompt_tokens': (\d+)", run.stdout)
    assert told is not None, run.stdout
    assert int(told.group(1)) == 9 + int((ids[1:] != tiny.model.config.image_token_id).sum())


def test_settings_without_the_architecture_are_refused(checkpoints: Path) -> None:
    """vLLM ignores what it does not know in --hf-overrides, and would serve unpruned."""
    settings = json.dumps({"tokprune": {"method": "divprune", "ratio": 0.25}})
    with (
        pytest.raises(RuntimeError, match="names no architecture of it"),
        served(checkpoints, "llava", None, "--hf-overrides", settings),
    ):
        pass


def test_without_the_plug_in_vllm_is_as_it_was(checkpoints: Path) -> None:
    """The same checkpoint unpruned, with the plug-in left out by vLLM's own switch; pruned models are unknown then."""
    expected = answers(load(checkpoints, "llava"), "image", None)
    with served(checkpoints, "llava", None, "--enable-mm-embeds", VLLM_PLUGINS="none") as address:
        assert all_at_once(address, "llava") == expected
        ask_about_embeddings(address, checkpoints)
    with (
        pytest.raises(RuntimeError, match=r"TokpruneLlavaForConditionalGeneration.*not supported"),
        served(checkpoints, "llava", 0.25, VLLM_PLUGINS="none"),
    ):
        pass
