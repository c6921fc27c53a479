"""Does a picture still find its text when open_clip's tower runs on fewer tokens?

python examples/openclip_retrieval.py                    random weights: the time is right, the ranks are not
python examples/openclip_retrieval.py --weights laion2b_s34b_b79k --folder pictures
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image

import tokprune
import tokprune.demo
from tokprune.errors import install_line


def pictures_of(folder: Path | None, count: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures and a text for each: a folder's files by their names, or drawn scenes by their objects."""
    if folder is not None:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
        return [Image.open(p).convert("RGB") for p in paths], [f"a photo of {p.stem.replace('_', ' ')}" for p in paths]
    scenes = {e.scene.seed: e for e in tokprune.demo.held_out(4 * count)}
    chosen = list(scenes.values())[:count]
    return [e.image for e in chosen], [
        "a picture of " + " and ".join(f"a {o.color} {o.shape}" for o in e.scene.objects) for e in chosen
    ]


def main() -> None:
    """Recall at 1 and images per second, plain and under ToMe, and how alike the embeddings are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32-256", help="a model of open_clip with a vision transformer")
    parser.add_argument("--weights", help="a tag of open_clip.list_pretrained(); default: random")
    parser.add_argument("--folder", type=Path, help="pictures named after what they show; default: drawn scenes")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--r", type=int, default=2, help="tokens merged away per block")
    args = parser.parse_args()
    try:
        import open_clip
    except ImportError:
        raise SystemExit(f"this example needs open_clip: {install_line('vision')}") from None

    torch.manual_seed(0)
    model, _, prepare = open_clip.create_model_and_transforms(args.model, pretrained=args.weights)
    model.eval()
    pictures, texts = pictures_of(args.folder, args.count)
    pixels = torch.stack([prepare(p) for p in pictures])
    with torch.inference_mode():
        words = model.encode_text(open_clip.get_tokenizer(args.model)(texts), normalize=True)  # (N, E)

        def measured(name: str) -> torch.Tensor:
            start = time.perf_counter()
            seen = model.encode_image(pixels, normalize=True)  # (N, E)
            seconds = time.perf_counter() - start
            found = (seen @ words.T).argmax(dim=1) == torch.arange(len(texts))
            print(f"{name:6} recall@1 {found.float().mean():6.1%}  {len(pictures) / seconds:6.1f} images/s")
            return seen

        model.encode_image(pixels[:1])  # warm up
        plain = measured("plain")
        with tokprune.apply(model, "tome", r=args.r) as pruning:
            merged = measured("tome")
            print(pruning.report())
    print(f"cosine of a picture's two embeddings: {(plain * merged).sum(dim=1).mean():.4f}")


if __name__ == "__main__":
    main()
