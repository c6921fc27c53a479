"""Answers for a whole folder of pictures, in batches, as JSON lines.

python examples/batch_caption.py --folder pictures --question "Describe the picture." --model llava-hf/llava-1.5-7b-hf

Pictures of any size and shape share a batch: each keeps its own exact number of tokens, and no row changes another.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

import tokprune
import tokprune.demo
from tokprune.adapters.prompting import answer, build_inputs

ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


def batches(paths: list[Path], size: int) -> Iterator[list[Path]]:
    """`paths` in groups of at most `size`."""
    for at in range(0, len(paths), size):
        yield paths[at : at + size]


def main() -> None:
    """One line per picture: its name, the answer, tokens kept and in all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    parser.add_argument("--model", default="demo", help="a hub id, a folder, or the embedded demo VLM")
    parser.add_argument("--question", default="what shape is the purple object ?", help="or: Describe the picture.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()

    if args.model == "demo":
        model, processor = tokprune.demo.load()
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(args.model)
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto", device_map="auto")
    paths = sorted(p for p in args.folder.iterdir() if p.suffix.lower() in ENDINGS)
    if not paths:
        raise SystemExit(f"{args.folder} has no pictures ({', '.join(sorted(ENDINGS))})")
    with tokprune.apply(model, "divprune", ratio=args.ratio) as pruning:
        for some in batches(paths, args.batch):
            pictures = [[Image.open(path).convert("RGB")] for path in some]
            inputs = build_inputs(model, processor, [args.question] * len(some), images=pictures)
            texts = answer(model, processor, inputs, max_new_tokens=args.max_new_tokens)
            for path, text, stream in zip(some, texts, pruning.last.streams, strict=True):
                print(json.dumps({"picture": path.name, "answer": text, "kept": stream.kept, "of": stream.total}))


if __name__ == "__main__":
    main()
