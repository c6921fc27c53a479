"""Eight prompts whose lengths differ tenfold, padded to one length and in groups: how long prefill and answer take.

    python benchmarks/grouping.py --json benchmarks/results/grouping.json

Random weights: a LLaVA of 4 layers and 256 channels, in float32. The two ways take turns, so that each ratio is of two
runs beside each other; the median of these ratios is told, and how far the logits are apart. `overhead` is the cost of
one more call of the LLM in tokens of a row: the time of eight rows one by one, less that of one call with all of them,
by seven calls and by the time of a token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokprune
from tokprune.environment import commit, machine
from tokprune.files import write_json

PICTURE, VOCABULARY, IMAGE = 144, 4000, 3999
LENGTHS = (110, 160, 210, 300, 420, 600, 830, 1100)
"""Tokens of the prompts once pruned to a quarter of their picture."""
RATIO = 0.25


def model() -> LlavaForConditionalGeneration:
    """A LLaVA that fits a laptop, with random weights."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=168, patch_size=14
    )
    llm = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(vision_config=tower, text_config=llm, image_token_id=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


def inputs(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A picture and random words in each row, padded on the left."""
    torch.manual_seed(1)
    width = max(lengths) - round(RATIO * PICTURE) + PICTURE
    ids = torch.randint(3, IMAGE, (len(lengths), width))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        words = length - round(RATIO * PICTURE)
        ids[row, : width - words] = 0
        ids[row, width - words - PICTURE : width - words] = IMAGE
        mask[row, : width - words - PICTURE] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(len(lengths), 3, 168, 168)}


@torch.no_grad()
def seconds(llava: LlavaForConditionalGeneration, call: dict[str, torch.Tensor], packing: str, new: int) -> float:
    """Time of generate() with `new` tokens."""
    with tokprune.apply(llava, "divprune", ratio=RATIO, packing=packing):
        began = time.perf_counter()
        llava.generate(**call, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - began


def pairs(
    llava: LlavaForConditionalGeneration, call: dict[str, torch.Tensor], new: int, repeats: int
) -> dict[str, object]:
    """Both ways in turns: median times and the paired ratio."""
    for packing in ("padded", "grouped"):
        seconds(llava, call, packing, new)
    taken = [{packing: seconds(llava, call, packing, new) for packing in ("padded", "grouped")} for _ in range(repeats)]
    ratios = sorted(pair["grouped"] / pair["padded"] for pair in taken)
    medians = {f"{packing}_s": statistics.median(pair[packing] for pair in taken) for packing in ("padded", "grouped")}
    return {"new_tokens": new, **medians, "ratio": statistics.median(ratios), "ratios": ratios}


@torch.no_grad()
def overhead(llava: LlavaForConditionalGeneration, repeats: int) -> float:
    """Tokens that one more call of the LLM costs."""
    embeds, found = torch.randn(8, 200, 256), []
    for _ in range(repeats):
        times = []
        for rows in ([embeds], embeds.split(1)):
            began = time.perf_counter()
            for part in rows:
                llava.model.language_model(inputs_embeds=part, use_cache=False)
            times.append(time.perf_counter() - began)
        found.append((times[1] - times[0]) / 7 / (times[0] / (8 * 200)))
    return statistics.median(found)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/grouping.json"))
    args = parser.parse_args()
    llava, call = model(), inputs(LENGTHS)
    logits, note = {}, ""
    with torch.no_grad():
        for packing in ("padded", "grouped"):
            with tokprune.apply(llava, "divprune", ratio=RATIO, packing=packing) as pruning:
                logits[packing] = llava(**call).logits[pruning.last.keep]
                note, lengths = pruning.last.note, pruning.last.keep.sum(1).tolist()
    data = {
        "type": "tokprune.grouping",
        "version": 1,
        "command": f"python benchmarks/grouping.py --repeats {args.repeats}",
        "environment": machine(),
        "commit": commit(),
        "lengths": lengths,
        "note": note,
        "apart": float((logits["padded"] - logits["grouped"]).abs().max()),
        "overhead_tokens": overhead(llava, args.repeats),
        "runs": [pairs(llava, call, new, args.repeats) for new in (1, 16)],
    }
    write_json(args.json, data)
    for run in data["runs"]:
        print({k: v for k, v in run.items() if k != "ratios"})
    print(data["note"], data["apart"], data["overhead_tokens"])


if __name__ == "__main__":
    main()
