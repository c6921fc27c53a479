"""Answers of vLLM: runs in the environment that has it, without the server.

    .serve/bin/python -m tests.serving.engine JOBS.json OUT.json

JOBS: a list of jobs as `job` makes them. One process runs them one after the other, for most of a start is imports.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from tests.serving.checkpoints import ARCHITECTURES, TOKENS, requests
from tokprune.testing import Part


def job(folder: Path, family: str, kind: str = "image", ratio: float | None = 0.25, **more: Any) -> dict[str, Any]:
    """A job: answer the requests of a kind. ratio: None for vLLM's own model. more: method, options, rounds, `engine`,
    arguments of vllm.LLM, and `embeds`, a file of embeddings that stand for the pictures, asked one after the other."""
    return {"folder": str(folder / family), "family": family, "kind": kind, "ratio": ratio, **more}


def overrides(job: dict[str, Any]) -> dict[str, Any]:
    """The hf_overrides of a job."""
    if job["ratio"] is None:
        return {}
    settings = {"method": job.get("method", "divprune"), "ratio": job["ratio"], "options": job.get("options", {})}
    return {"architectures": ["Tokprune" + ARCHITECTURES[job["family"]]], "tokprune": settings}


def prompts(job: dict[str, Any], processor: Any) -> list[dict[str, Any]]:
    """The requests as vLLM takes them."""
    return [_prompt(job["family"], parts, processor) for parts in requests(job["kind"], job["family"])]


def _prompt(family: str, parts: list[Part], processor: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0]} for p in parts]
    turn = [{"role": "user", "content": content}]
    prompt: dict[str, Any] = {"prompt": processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)}
    for kind, media in (p for p in parts if not isinstance(p, str)):
        if kind == "video" and family.startswith("qwen"):
            n = len(media)
            told = {"total_num_frames": n, "fps": 2.0, "duration": n / 2, "frames_indices": list(range(n))}
            media = (media, {**told, "do_sample_frames": False, "video_backend": "none"})
        prompt.setdefault("multi_modal_data", {}).setdefault(kind, []).append(media)
    return prompt


def settled(**more: Any) -> dict[str, Any]:
    """Arguments of vllm.LLM for tiny models."""
    told = {"dtype": "float32", "max_num_seqs": 32, "block_size": 32, "max_model_len": 4096, "enforce_eager": True}
    return {**told, "distributed_executor_backend": "uni", "seed": 0, **more}


def run(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Start an engine, answer all requests at once `rounds` times, stop it."""
    from safetensors.torch import load_file
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    limits = {
        "image": 4,
        **({} if job["family"] in ("llava", "llava_next") else {"video": int(job["kind"] == "video")}),
    }
    settings = settled(**job.get("engine", {}))
    llm = LLM(job["folder"], limit_mm_per_prompt=limits, hf_overrides=overrides(job), **settings)
    greedy = SamplingParams(
        temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True, allowed_token_ids=list(range(256))
    )
    asked = prompts(job, AutoProcessor.from_pretrained(job["folder"]))
    together = [asked]
    if "embeds" in job:
        pictures = load_file(job["embeds"])
        together = [[{**asked[int(i)], "multi_modal_data": {"image": [rows]}}] for i, rows in pictures.items()]
    rounds = []
    for _ in range(job.get("rounds", 1)):
        done = [one for group in together for one in llm.generate(group, greedy, use_tqdm=False)]
        rounds.append(
            [
                {
                    "prompt": len(one.prompt_token_ids),
                    "tokens": list(one.outputs[0].token_ids),
                    "cached": one.num_cached_tokens or 0,
                }
                for one in done
            ]
        )
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return rounds


def main() -> None:
    """Run the jobs of a file; an error of one is its result."""
    results: list[Any] = []
    for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            results.append(run(one))
        except Exception as error:  # the test that asked for the job says whether it should have worked
            results.append(f"{type(error).__name__}: {error}")
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
