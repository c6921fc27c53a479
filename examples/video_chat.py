"""A chat about a video in several turns, on a cache that holds the kept tokens alone. `python examples/video_chat.py`

Later turns neither see the frames again nor pay for the dropped tokens: the cache of the first turn has what stayed.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import DynamicCache

import tokprune
import tokprune.demo
from tokprune.adapters.prompting import build_inputs
from tokprune.video import read_video

QUESTIONS = ["how many scenes are there ?", "what color is the first object ?", "is there a circle ?"]


def main() -> None:
    """Ask one clip several questions; print the answers and what the cache holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", help="a video file; default: a drawn clip")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.25)
    args = parser.parse_args()

    model, processor = tokprune.demo.load_clips()
    with tempfile.TemporaryDirectory() as folder:
        path = args.video or tokprune.demo.held_out_clips(1, folder=folder)[0].path
        video = read_video(path, frames=args.frames)

    # A method that does not read the question: what it keeps must do for questions that are not asked yet.
    with tokprune.apply(model, "vidcom2", ratio=args.ratio) as pruning:
        cache = DynamicCache(config=model.config.get_text_config())
        inputs = dict(build_inputs(model, processor, QUESTIONS[0], videos=[video]))
        for turn, question in enumerate(QUESTIONS):
            if turn:  # words alone, behind all that was said; the mask has the width of the prompt as it was written
                words = f" user: {question} assistant:"
                more = processor.tokenizer(words, return_tensors="pt", add_special_tokens=False)["input_ids"]
                ids = torch.cat([said, more], dim=1)  # noqa: F821  set in the turn before
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            said = model.generate(**inputs, past_key_values=cache, max_new_tokens=3)
            answered = said[0, inputs["input_ids"].shape[1] :]
            text = processor.tokenizer.decode(answered, skip_special_tokens=True).strip()
            print(f"{question:36} {text:8} prompt {said.shape[1]:4} tokens, cache {cache.layers[0].keys.shape[2]:4}")
            if not turn:
                print(pruning.report())


if __name__ == "__main__":
    main()
