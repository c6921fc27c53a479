"""Methods of several stages together, and methods around methods. `python examples/compose.py`"""

from __future__ import annotations

import tempfile

import tokprune
import tokprune.demo
from tokprune import get_method
from tokprune.adapters.prompting import answer, build_inputs
from tokprune.video import read_video


def main() -> None:
    """Four compositions on a picture and on a clip, with what each keeps."""
    model, processor = tokprune.demo.load()
    example = tokprune.demo.held_out(1)[0]
    inputs = build_inputs(model, processor, example.question, images=[example.image])
    settings = {
        "DivPrune, what is dropped averaged into its neighbour": get_method("merge", method="divprune"),
        "every tile its share, the first token always kept": get_method(
            "per_tile", method=get_method("protect", method="divprune", border=0, indices=(0,))
        ),
        "ToMe inside the tower, then DivPrune": [get_method("tome", r=8), "divprune"],
    }
    for name, method in settings.items():
        with tokprune.apply(model, method, ratio=0.1) as pruning:
            (stream,) = (answer(model, processor, inputs), pruning.last.streams)[1]
            print(f"{name}: {stream.kept} of {stream.total} tokens")

    model, processor = tokprune.demo.load_clips()
    with tempfile.TemporaryDirectory() as folder:
        clip = tokprune.demo.held_out_clips(1, folder=folder)[0]
        video = read_video(clip.path, frames=clip.frames)
    inputs = build_inputs(model, processor, clip.question, videos=[video])
    with tokprune.apply(model, ["quota", "divprune"], ratio=0.1, processor=processor) as pruning:
        print(f"QuoTA's shares, DivPrune inside each frame: {answer(model, processor, inputs)[0]}")
        print(pruning.report())


if __name__ == "__main__":
    main()
