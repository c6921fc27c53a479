"""Encode and prune pictures on one machine, answer questions about them on another: safetensors in between.

Where the pictures are, with transformers:
    python examples/encode_here_serve_there.py encode llava-hf/llava-1.5-7b-hf photo.jpg --budget 64 --out photo.st
Where the server is (no plug-in; for trusted clients only: vLLM 0.32 dies of embeddings of mixed lengths):
    vllm serve llava-hf/llava-1.5-7b-hf --enable-mm-embeds
Anywhere:
    python examples/encode_here_serve_there.py ask http://127.0.0.1:8000 photo.st "What is this?"
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import urllib.request

import torch
from safetensors.torch import load_file, save_file


def encode(model: str, picture: str, budget: int, out: str) -> None:
    """Write the pruned embeddings of a picture."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tokprune.serving import encode as pruned

    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="auto").eval()
    (tokens,) = pruned(loaded, AutoProcessor.from_pretrained(model), [Image.open(picture)], budget=budget)
    save_file({"image": tokens.cpu().contiguous()}, out, {"model": model})
    print(f"{out}: {tuple(tokens.shape)}, {tokens.dtype}")


def ask(server: str, embeddings: str, question: str) -> None:
    """Ask a server about a picture that it has never seen. vLLM's API takes a tensor as base64 of torch.save."""
    packed = io.BytesIO()
    torch.save(load_file(embeddings)["image"], packed)
    picture = {"type": "image_embeds", "image_embeds": base64.b64encode(packed.getvalue()).decode()}
    with urllib.request.urlopen(f"{server}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    turn = {"role": "user", "content": [picture, {"type": "text", "text": question}]}
    body = json.dumps({"model": model, "messages": [turn], "temperature": 0, "max_tokens": 64}).encode()
    call = urllib.request.Request(f"{server}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call) as answer:
        told = json.load(answer)
    print(told["choices"][0]["message"]["content"], told["usage"])


def main() -> None:
    """Two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("encode")
    one.add_argument("model")
    one.add_argument("picture")
    one.add_argument("--budget", type=int, default=64)
    one.add_argument("--out", default="picture.safetensors")
    two = commands.add_parser("ask")
    two.add_argument("server")
    two.add_argument("embeddings")
    two.add_argument("question")
    told = parser.parse_args()
    if told.command == "encode":
        encode(told.model, told.picture, told.budget, told.out)
    else:
        ask(told.server, told.embeddings, told.question)


if __name__ == "__main__":
    main()
