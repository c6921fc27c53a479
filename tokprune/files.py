"""Reads pictures and JSON, writes files: the one place where a path that a user gave meets the disk."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tokprune.errors import OptionError
from tokprune.types import JsonObject

if TYPE_CHECKING:
    from PIL.Image import Image

STDOUT = Path("-")
"""A path that means standard output, for JSON."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])")  # a Path keeps one slash of two


def refuse_url(path: str | os.PathLike[str]) -> None:
    """Raise OptionError, with the command that downloads it, when `path` is a URL."""
    text = os.fsdecode(path)
    match = _URL.match(text)
    if match is None or Path(text).exists():
        return
    url = f"{match.group(1)}://{text[match.end() :]}"
    if match.group(1).lower() == "file":
        raise OptionError(f"{url!r} is a URL; give the path itself: '/{text[match.end() :]}'.")
    name = url.split("?")[0].rstrip("/").rpartition("/")[2] or "file"
    raise OptionError(
        f"{url!r} is a URL; tokprune reads local files only. Download it first: curl -L -o {name} '{url}', then "
        f"give {name}."
    )


# -- pictures ---------------------------------------------------------------------------------------------------------


def read_picture(path: str | os.PathLike[str]) -> Image:
    """A picture file as upright 8-bit RGB. Raises OptionError that says how to get a file that can be read.

    The EXIF orientation is applied, 16-bit grey is scaled to 8 bits, transparent parts become white, and of an
    animation the first picture is read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    refuse_url(path)
    try:
        with _whole_pictures(), Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            upright.format = image.format
            return rgb(upright)
    except Image.DecompressionBombError as error:
        raise OptionError(
            f"the picture {path} is too large to open safely ({error}). Scale it down first, for example: "
            f"convert '{path}' -resize 4096x4096 smaller.jpg"
        ) from error
    except UnidentifiedImageError as error:
        raise OptionError(f"cannot read the picture {path}: {_kind_of(Path(path))}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # Pillow's readers raise all of these on broken files
        raise OptionError(f"cannot read the picture {path}: {reason(error)}") from error


@contextmanager
def _whole_pictures() -> Iterator[None]:
    """Pillow refuses truncated pictures meanwhile, whoever set its process-wide switch (lmms-eval does)."""
    from PIL import ImageFile

    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    if not lenient:
        yield
        return
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def rgb(image: Image, on_white: bool = True) -> Image:
    """A Pillow picture as 8-bit RGB: 16-bit grey is scaled, where Pillow's own conversion clips it to white.

    on_white: transparent parts become white, as a viewer shows them; else they show the colour under them, as
    processors do.
    """
    from PIL import Image as pillow

    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if on_white and (image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info):
        image = image.convert("RGBA")
        ground = pillow.new("RGBA", image.size, "white")
        image = pillow.alpha_composite(ground, image)
    return image.convert("RGB")


def _eight_bits(image: Image) -> Image:
    """Grey values of more than 8 bits, as 8 bits."""
    import numpy as np
    from PIL import Image as pillow

    values = np.asarray(image).astype(np.float64)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    top = float(values.max(initial=0.0))
    if image.mode == "F" or float(values.min(initial=0.0)) < 0 or top > 65535:
        raise ValueError(
            f"its {'floating-point' if image.mode == 'F' else '32-bit'} values have no fixed range of grey levels; "
            "save it as an 8-bit PNG or JPEG first."
        )
    scale = 1 / 257 if sixteen or top > 255 else 1.0  # 65535 becomes 255
    return pillow.fromarray((values * scale).round().astype(np.uint8))


def _kind_of(path: Path) -> str:
    """What a file is that Pillow does not know, and how to turn it into one that it does."""
    with path.open("rb") as file:
        head = file.read(256)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heif", b"hevc", b"mif1", b"msf1", b"avif", b"avis"):
        kind = "AVIF" if head[8:11] == b"avi" else "HEIC"
        return (
            f"it is {kind}, which Pillow does not read here. Convert it first: heif-convert '{path}' '{path.stem}.jpg'"
        )
    if head.startswith(b"%PDF"):
        return f"it is a PDF. Draw its pages first: pdftoppm -r 150 -png '{path}' page"
    if b"<svg" in head or (head.lstrip().startswith(b"<?xml") and path.suffix.lower() in (".svg", ".xml")):
        return (
            f"it is SVG, a drawing and no pixels. Convert it first: rsvg-convert -w 1024 '{path}' -o '{path.stem}.png'"
        )
    if not head:
        return "the file is empty."
    return "it is in no format that Pillow reads. Save it as PNG or JPEG first."


# -- JSON and other files ---------------------------------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """An error in a few words: of the operating system's errors without number and path."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(words)


def read_json(path: str | os.PathLike[str], what: str) -> object:
    """The content of a JSON file. what: what it should be, for the error: "results"."""
    try:
        data: object = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the {what} {path}: {reason(error)}") from error
    return data


def checked(data: object, kind: str, version: int, what: str) -> JsonObject:
    """`data` as the JSON object of a kind and version that it has to be. what: names it in the error: "a profile"."""
    if not isinstance(data, dict) or data.get("type") != kind:
        raise OptionError(f'not {what}: expected an object with "type": "{kind}".')
    if data.get("version") != version:
        raise OptionError(
            f"{what}, version {data.get('version')!r} is not readable; this tokprune reads version {version}."
        )
    return data


@contextmanager
def writing(path: str | os.PathLike[str], folder: bool = False) -> Iterator[Path]:
    """Make the folder that `path` lies in (folder: that it is) and let the caller write; what fails ends in an
    OptionError.

    with writing(out) as target: picture.save(target)
    """
    target = Path(path)
    try:
        (target if folder else target.parent).mkdir(parents=True, exist_ok=True)
        yield target
    except OSError as error:
        raise OptionError(f"cannot write {'into ' if folder else ''}{target}: {reason(error)}") from error


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file and the folders above it."""
    with writing(path) as target:
        target.write_text(text, encoding="utf-8")
    return target


def write_json(path: str | os.PathLike[str], data: object) -> Path:
    """Write plain data as JSON; the path "-" means standard output."""
    text = json.dumps(data, indent=2) + "\n"
    if Path(path) == STDOUT:
        sys.stdout.write(text)
        return STDOUT
    return write_text(path, text)


def save_picture(picture: Image, path: str | os.PathLike[str]) -> Path:
    """Save a picture in the format that the end of the path names."""
    from PIL import Image

    ending = Path(path).suffix.lower()
    known = Image.registered_extensions()
    if known.get(ending) not in Image.SAVE:
        raise OptionError(f"cannot write {path}: {ending or 'no ending'!r} names no format; end it in .png or .jpg.")
    with writing(path) as target:
        picture.save(target)
    return target


def check_writable(path: str | os.PathLike[str]) -> None:
    """Say now when a file cannot be written later; leaves nothing behind but its folder."""
    with writing(path) as target:
        new = not target.exists()
        target.open("ab").close()
        if new:
            target.unlink()
