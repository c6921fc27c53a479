"""How vLLM's vision tower is called when clips arrive together: unpruned, with vLLM's own EVS, and with tokprune's.

Run by the python that has vLLM (`make serve-test` sets one up):
    PYTHONPATH=. .serve/bin/python benchmarks/serving_clips.py --json benchmarks/results/serving_clips.json

A tiny Qwen2.5-VL with random weights: calls are counted, not seconds. vLLM's runner for CPUs leaves the switch off with
which its runner for GPUs encodes clips one at a time under --video-pruning-rate; it is set here as that runner sets it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, where calls can be counted

from tests.serving.checkpoints import ARCHITECTURES, build
from tests.serving.engine import settled
from tokprune.environment import commit, machine
from tokprune.files import write_json
from tokprune.serving import overrides
from tokprune.testing import clip

FAMILY = "qwen2_5_vl"
WAYS: dict[str, dict[str, Any]] = {
    "unpruned": {},
    "vLLM's EVS": {"video_pruning_rate": 0.75},
    "tokprune's evs": {"hf_overrides": overrides(ARCHITECTURES[FAMILY], "evs", ratio=0.25)},
}


def count(folder: Path, clips: int, way: dict[str, Any]) -> dict[str, Any]:
    """Calls of the tower while `clips` clips of one size, asked for at once, get their first token."""
    import torch
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    llm = LLM(str(folder), limit_mm_per_prompt={"image": 0, "video": 1}, **settled(), **way)
    gc.unfreeze()  # vLLM hides what a start made
    (runner,) = (o for o in gc.get_objects() if isinstance(o, GPUModelRunner))
    runner.is_multimodal_pruning_enabled = "video_pruning_rate" in way
    calls: list[int] = []
    towers = [m for n, m in runner.model.named_modules() if n == "visual"]
    watch = towers[0].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(args[0])), with_kwargs=True
    )
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]
    prompt = AutoProcessor.from_pretrained(folder).apply_chat_template(turn, tokenize=False)
    frames = 8
    told = {"total_num_frames": frames, "fps": 2.0, "duration": frames / 2, "frames_indices": list(range(frames))}
    more = {"do_sample_frames": False, "video_backend": "none"}
    media = [(clip(frames, 40, 48, seed=i), {**told, **more}) for i in range(clips)]
    asked = [{"prompt": prompt, "multi_modal_data": {"video": [one]}} for one in media]
    done = llm.generate(asked, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    watch.remove()
    result = {"tower calls": len(calls), "patches per call": calls, "prompt tokens": len(done[0].prompt_token_ids)}
    del llm, runner, towers
    gc.collect()
    cleanup_dist_env_and_memory()
    torch.manual_seed(0)
    return result


def main() -> None:
    """Count for every way and number of clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as place:
        build(FAMILY, Path(place))
        for way, more in WAYS.items():
            for clips in told.clips:
                runs.append({"way": way, "clips": clips, **count(Path(place), clips, more)})
                print(json.dumps(runs[-1]), flush=True)
    if told.json:
        head = {
            "type": "tokprune.serving_clips",
            "version": 1,
            "command": shlex.join(["python", "benchmarks/serving_clips.py", *sys.argv[1:]]),
            "commit": commit(),
        }
        write_json(told.json, {**head, "environment": machine(), "runs": runs})


if __name__ == "__main__":
    main()
