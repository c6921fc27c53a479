"""A page to try methods on: a picture, a question, a ratio; kept patches and answers side by side.

Runs the embedded demo VLM, or with --model a checkpoint. `python examples/app.py`
needs gradio: pip install '.[app]'
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from PIL import Image

import tokprune
import tokprune.demo
from tokprune.demo.asking import Asker
from tokprune.errors import TokpruneError, install_line
from tokprune.loading import LoadOptions, check_device, demo_scorer, load
from tokprune.registry import method_class
from tokprune.viz.kept import kept_on_image

if TYPE_CHECKING:
    import gradio

START = ("divprune", "random")


def names() -> list[str]:
    """Methods that keep tokens of a picture without being told more."""
    infos = {name: method_class(name).info for name in tokprune.list_methods("connector")}
    return [name for name, info in infos.items() if not info.video and not info.wrapper and name != "none"]


def compare(asker: Asker, picture: Image.Image, question: str, methods: list[str], ratio: float) -> Image.Image:
    """The picture beside what each method keeps of it, each with its answer; all tokens' answer in the title."""
    whole = asker.ask(question, picture, "none", 1.0).text
    answers = [asker.ask(question, picture, method, ratio) for method in methods]
    records = {a.method: a.stream for a in answers if a.stream is not None}
    captions = {a.method: f"answer: {a.text}" for a in answers}
    title = f"{question}  All tokens: {whole}"
    return kept_on_image(picture, records, asker.processor, title=title, captions=captions)


def build(asker: Asker, picture: Image.Image, question: str) -> gradio.Blocks:
    """The page."""
    import gradio as gr

    def on_click(image: Image.Image | None, asked: str, methods: list[str], ratio: float) -> Image.Image:
        if image is None or not asked.strip() or not methods:
            raise gr.Error("give a picture, a question and at least one method")
        try:
            return compare(asker, image.convert("RGB"), asked, methods, ratio)
        except TokpruneError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="tokprune", analytics_enabled=False) as page:
        gr.Markdown("# tokprune\nWhich visual tokens stay, and what the model still answers.")
        with gr.Row():
            with gr.Column(scale=1):
                image = gr.Image(picture, type="pil", label="picture", height=300, format="png")  # webp is lossy
                asked = gr.Textbox(question, label="question")
                methods = gr.Dropdown(names(), value=list(START), multiselect=True, label="methods")
                ratio = gr.Slider(0.02, 1, 0.1, step=0.01, label="share of tokens kept")
                button = gr.Button("compare", variant="primary", elem_id="compare")
            with gr.Column(scale=2):
                out = gr.Image(label="kept", elem_id="kept", format="png")
        inputs: list[Any] = [image, asked, methods, ratio]
        button.click(on_click, inputs, out)
        ratio.release(on_click, inputs, out)
    return page


def main() -> None:
    """Serve the page on this machine alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a hub id, a folder, or the embedded demo VLM")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise SystemExit(f"this example needs gradio: {install_line('app')}") from None
    check_device(args.device)
    loaded = load(args.model, LoadOptions(args.device))
    asker = Asker(loaded.model, loaded.processor, loaded.embedded, demo_scorer(loaded, names()))
    example = tokprune.demo.held_out(1)[0]
    build(asker, example.image, example.question).launch(server_name="127.0.0.1", server_port=args.port, share=False)


if __name__ == "__main__":
    main()
