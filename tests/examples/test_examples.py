"""Every example runs as its first lines say, and does what it promises."""

from __future__ import annotations

import base64
import io
import json
import re
import runpy
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import tokprune
from tests.docs.blocks import ROOT
from tokprune import registry

APART = {"app"}  # tests/browser/test_app.py


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs examples/NAME.py from the root with arguments, as a command would; returns what it printed."""
    tokprune.list_methods()
    before = dict(registry._methods)
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run
    registry._methods.clear()
    registry._methods.update(before)


def test_quickstart(example, tmp_path: Path) -> None:
    out = example("quickstart", "--out", tmp_path / "kept.png")
    assert re.search(r"all tokens: pink\na tenth: +pink\n", out)
    assert "26/256 tokens" in out
    assert (tmp_path / "kept.png").stat().st_size > 10_000


def test_own_method(example, tmp_path: Path) -> None:
    out = example("own_method", "--questions", 7, "--out", tmp_path / "own.png")
    assert re.findall(r"^(\w+) +(\d+) tokens", out, re.MULTILINE) == [
        ("none", "256"),
        ("random", "64"),
        ("brightest", "64"),
    ]
    assert (tmp_path / "own.png").exists()


def test_video_chat(example) -> None:
    out = example("video_chat", "--ratio", 0.25)
    turns = [tuple(map(int, t)) for t in re.findall(r"prompt +(\d+) tokens, cache +(\d+)", out)]
    assert len(turns) == 3
    # A cache holds what the prompt has, less what was dropped in the first turn and the token that was said last.
    assert {prompt - cache for prompt, cache in turns} == {512 - 128 + 1}


def test_batch_caption(example) -> None:
    lines = [json.loads(line) for line in example("batch_caption", "--batch", 4).splitlines()]
    assert [line["picture"] for line in lines] == sorted(p.name for p in (ROOT / "docs/images").glob("*.png"))
    assert {(line["kept"], line["of"]) for line in lines} == {(64, 256)}
    assert all(line["answer"] for line in lines)


def test_compose(example) -> None:
    out = example("compose")
    assert len(re.findall(r": 26 of 256 tokens", out)) == 3
    assert "51/512 tokens" in out


class Server(BaseHTTPRequestHandler):
    """What the example asks of a server: its models, and an answer to embeddings."""

    seen: ClassVar[list[torch.Tensor]] = []

    def _answer(self, data: object) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "served"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, words = body["messages"][0]["content"]
        assert (body["model"], words["text"]) == ("served", "what color is the circle ?")
        self.seen.append(torch.load(io.BytesIO(base64.b64decode(picture["image_embeds"])), weights_only=True))
        self._answer({"choices": [{"message": {"content": "pink"}}], "usage": {"prompt_tokens": 9}})

    def log_message(self, *words: object) -> None:
        """Nothing."""


def test_encode_here_serve_there(example, tmp_path: Path) -> None:
    file = tmp_path / "picture.st"
    weights = ROOT / "tokprune/demo/weights"
    out = example("encode_here_serve_there", "encode", weights, "docs/images/scene.png", "--budget", 32, "--out", file)
    assert "(32, " in out
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        out = example("encode_here_serve_there", "ask", address, file, "what color is the circle ?")
        server.shutdown()
    assert out.startswith("pink")
    assert torch.equal(Server.seen[0], load_file(file)["image"])


@pytest.mark.slow
def test_train_with_pruning(example) -> None:
    pytest.importorskip("peft")
    before, after = map(
        float, re.search(r"loss ([\d.]+) -> ([\d.]+)", example("train_with_pruning", "--steps", 24)).groups()
    )
    assert after < 0.95 * before


@pytest.mark.slow
def test_timm_tome(example) -> None:
    pytest.importorskip("timm")
    out = example("timm_tome", "--model", "vit_tiny_patch16_224", "--batch", 2, "--rounds", 1)
    assert re.search(r"images/s -> [\d.]+ images/s", out)


@pytest.mark.slow
def test_openclip_retrieval(example) -> None:
    pytest.importorskip("open_clip")
    out = example("openclip_retrieval", "--count", 3)
    assert len(re.findall(r"recall@1", out)) == 2
    assert "64 patches -> 40 (62.5%)" in out


@pytest.mark.parametrize(
    ("name", "package"),
    [("timm_tome", "timm"), ("openclip_retrieval", "open_clip"), ("app", "gradio"), ("train_with_pruning", "peft")],
)
def test_a_missing_package_is_named_with_its_pip_line(example, monkeypatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=r"this example needs .+: pip install "):
        example(name)


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    names = {p.stem for p in (ROOT / "examples").glob("*.py")}
    assert names <= set(re.findall(r'example\("(\w+)"', text)) | APART
