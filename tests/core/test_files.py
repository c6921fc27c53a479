"""Pictures are read upright, in their true grey levels, or refused with a way out; what cannot be written ends in a
sentence."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tokprune.errors import OptionError
from tokprune.files import (
    STDOUT,
    read_json,
    read_picture,
    refuse_url,
    rgb,
    save_picture,
    write_json,
    write_text,
    writing,
)

ORIENTATION = 0x0112


@pytest.fixture
def scene() -> Image.Image:
    """A picture of 40 x 20 whose four corners differ."""
    pixels = np.full((20, 40, 3), 90, np.uint8)
    pixels[:10, :20], pixels[:10, 20:], pixels[10:, :20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".webp"])
def test_pictures_are_upright_in_every_orientation(scene, tmp_path, orientation, ending):
    stored = {
        1: scene,
        2: scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: scene.transpose(Image.Transpose.ROTATE_180),
        4: scene.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: scene.transpose(Image.Transpose.TRANSPOSE),
        6: scene.transpose(Image.Transpose.ROTATE_90),
        7: scene.transpose(Image.Transpose.TRANSVERSE),
        8: scene.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"photo{ending}"
    stored.save(path, exif=exif, **({"lossless": True} if ending == ".webp" else {}))
    found = read_picture(path)
    assert (found.mode, found.size) == ("RGB", (40, 20))
    error = np.abs(np.asarray(found).astype(int) - np.asarray(scene).astype(int))
    assert np.median(error) <= 2


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_levels(tmp_path, ending):
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    path = tmp_path / f"scan.{ending}"
    Image.fromarray(levels.astype(np.uint16)).save(path)
    found = np.asarray(read_picture(path))
    assert np.abs(found[..., 0] - levels / 257).max() <= 1
    assert (found[..., 0] == found[..., 1]).all()


def test_sixteen_bit_grey_lies_on_its_side_no_more(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    levels = np.zeros((10, 30), np.uint16)
    levels[0] = 65535
    Image.fromarray(levels).save(tmp_path / "scan.png", exif=exif)
    found = np.asarray(read_picture(tmp_path / "scan.png"))
    assert found.shape == (30, 10, 3)
    assert found[:, -1].min() == 255
    assert found[:, :-1].max() == 0


def test_dark_values_of_a_wide_integer_picture_are_not_brightened():
    dark = Image.fromarray(np.full((4, 4), 200, np.int32))
    assert np.asarray(rgb(dark)).max() == 200
    dark.format = "PNG"  # whose integers are 16 bits wide; older Pillows open them like this
    assert np.asarray(rgb(dark)).max() == 1


@pytest.mark.parametrize("values", [np.full((4, 4), 70000, np.int32), np.full((4, 4), 0.5, np.float32)])
def test_values_without_a_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "depth.tif")
    with pytest.raises(OptionError, match="8-bit"):
        read_picture(tmp_path / "depth.tif")


def test_transparent_parts_are_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "logo.png")
    found = np.asarray(read_picture(tmp_path / "logo.png"))
    assert found[:2].max() == 0
    assert found[2:].min() == 255


def huge_png(path: Path, side: int) -> None:
    """A PNG that claims a side of so many pixels and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("photo.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heif-convert"),
        ("paper.pdf", b"%PDF-1.7\n", "pdftoppm"),
        ("drawing.svg", b'<?xml version="1.0"?><svg xmlns="x"/>', "rsvg-convert"),
        ("plain.svg", b"<svg xmlns='x'/>", "rsvg-convert"),
        ("empty.png", b"", "empty"),
        ("notes.jpg", b"these are words", "PNG or JPEG"),
        ("missing.png", None, "No such file"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_way_out(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=words):
        read_picture(tmp_path / name)


def test_a_truncated_picture_is_refused(scene, tmp_path, monkeypatch):
    scene.resize((400, 200)).save(tmp_path / "half.png")
    data = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    for lenient in (False, True):  # lmms-eval switches it on for the whole process
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
        with pytest.raises(OptionError, match=r"cannot read the picture .*half.png"):
            read_picture(tmp_path / "half.png")
        assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def test_a_picture_of_240_megapixels_is_refused_with_a_way_out(tmp_path):
    huge_png(tmp_path / "map.png", 15_500)
    with pytest.raises(OptionError, match=r"too large.*-resize"):
        read_picture(tmp_path / "map.png")


@pytest.mark.parametrize("given", ["https://example.com/a/x.jpg?w=3", Path("https://example.com/a/x.jpg")])
def test_a_url_is_answered_with_the_command_that_downloads_it(given):
    with pytest.raises(OptionError, match=r"curl -L -o x\.jpg 'https://example\.com/a/x\.jpg"):
        read_picture(given)


def test_what_looks_like_a_url_and_is_a_file_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ab:").mkdir()
    write_text("ab:/x.txt", "there")
    refuse_url("ab:/x.txt")
    with pytest.raises(OptionError, match=r"path itself: '/tmp/x\.jpg'"):
        refuse_url("file:///tmp/x.jpg")


def test_what_cannot_be_written_ends_in_a_sentence(tmp_path, scene):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OptionError, match=r"cannot write .*below"):
        write_json(tmp_path / "file" / "below.json", {})
    with pytest.raises(OptionError, match="into"), writing(tmp_path / "file", folder=True):
        pass
    with pytest.raises(OptionError, match=r"cannot write /dev/full.*[Nn]o space"):
        write_text("/dev/full", "x")
    with pytest.raises(OptionError, match=r"end it in \.png"):
        save_picture(scene, tmp_path / "picture.xyz")
    assert save_picture(scene, tmp_path / "new" / "picture.png").is_file()


def test_json_goes_to_a_file_or_to_standard_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert read_json(write_json("a/b.json", {"x": 1}), "results") == {"x": 1}
    assert write_json(STDOUT, {"x": 2}) == STDOUT
    assert json.loads(capsys.readouterr().out) == {"x": 2}
    assert not Path("-").exists()
    write_text("a/b.json", "{")
    with pytest.raises(OptionError, match=r"cannot read the results a/b\.json"):
        read_json("a/b.json", "results")
