"""Prune a VLM, ask it, look at what it kept, take the pruning off. `python examples/quickstart.py`

With a checkpoint:
python examples/quickstart.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is in it?"
"""

from __future__ import annotations

import argparse

from PIL import Image

import tokprune
import tokprune.demo
from tokprune.adapters.prompting import answer, build_inputs
from tokprune.viz.kept import kept_on_image


def main() -> None:
    """One question with all tokens and with a tenth of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a hub id, a folder, or the embedded demo VLM")
    parser.add_argument("--image", default="docs/images/scene.png")
    parser.add_argument("--question", default="what color is the circle ?")
    parser.add_argument("--out", default="kept.png")
    args = parser.parse_args()

    if args.model == "demo":
        model, processor = tokprune.demo.load()
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(args.model)
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
    picture = Image.open(args.image).convert("RGB")
    inputs = build_inputs(model, processor, args.question, images=[picture])

    print("all tokens:", answer(model, processor, inputs)[0])
    with tokprune.apply(model, method="divprune", ratio=0.1) as pruning:
        print("a tenth:   ", answer(model, processor, inputs)[0])
        print(pruning.report())
        kept_on_image(picture, {"divprune": pruning.last.streams[0]}, processor).save(args.out)


if __name__ == "__main__":
    main()
