"""What users really give: photos on their side, URLs, devices by other names, names that nobody has, a full disk, a
pipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tokprune.cli.app import app
from tokprune.errors import MissingExtraError, OptionError, install_line
from tokprune.loading import check_device, check_dtype, check_reachable, load, split_methods

run = CliRunner().invoke
SCENE = Path(__file__).parent.parent.parent / "docs" / "images" / "scene.png"
QUESTION = "what color is the circle ?"


@pytest.fixture(scope="module")
def sideways(tmp_path_factory) -> Path:
    """The scene as a phone stores a portrait photo: on its side, with a note how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("photos") / "portrait.png"
    Image.open(SCENE).convert("RGB").transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    return path


COMMANDS = {
    "run": ["run", "--question", QUESTION, "--json", "{out}/x.json", "--image"],
    "show": ["show", "--methods", "divprune", "--question", QUESTION, "-o", "{out}/x.png", "--image"],
    "demo": [
        "demo",
        "--methods",
        "divprune",
        "--ratios",
        "0.1",
        "--question",
        QUESTION,
        "--overlays",
        "{out}",
        "--image",
    ],
    "heatmap": ["heatmap", "--signals", "cls_attention", "-o", "{out}/x.png", "--image"],
    "profile": [
        "profile",
        "--methods",
        "divprune",
        "--ratios",
        "0.5",
        "--repeats",
        "1",
        "--new-tokens",
        "2",
        "--plots",
        "{out}",
        "--image",
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_photo_on_its_side_goes_in_upright(name: str, sideways: Path, tmp_path: Path) -> None:
    """Every command sees the same picture in the photo and in the upright file."""
    made = []
    for image in (sideways, SCENE):
        out = tmp_path / image.stem
        result = run(app, [word.format(out=out) for word in COMMANDS[name]] + [str(image)])
        assert result.exception is None, result.exception
        if name == "run":
            report = json.loads((out / "x.json").read_text())
            made.append((report["answer"], report["report"]["streams"]))
        else:
            picture = next(p for p in sorted(out.iterdir()) if p.stem.startswith(("x", "kept")))
            made.append(np.asarray(Image.open(picture)))
    if name == "run":
        assert made[0] == made[1]
    else:
        assert np.array_equal(*made)


def test_a_sixteen_bit_scan_is_not_white(tmp_path: Path) -> None:
    grey = np.asarray(Image.open(SCENE).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "scan.png")
    out = tmp_path / "x.png"
    result = run(app, ["show", "--image", str(tmp_path / "scan.png"), "--methods", "divprune", "-o", str(out)])
    assert result.exception is None, result.exception
    assert np.asarray(Image.open(out).convert("L"))[60:400, 40:400].std() > 20


@pytest.mark.parametrize("command", ["run", "show", "heatmap", "profile", "demo"])
def test_a_url_is_answered_with_the_way_to_download_it(command: str) -> None:
    words = {"run": ["--question", "q"], "demo": ["--question", "q"], "heatmap": ["--signals", "keys:-1"]}
    result = run(app, [command, "--image", "https://example.com/x.jpg", *words.get(command, [])])
    assert isinstance(result.exception, OptionError)
    assert "curl -L -o x.jpg 'https://example.com/x.jpg'" in str(result.exception)


def test_a_url_of_a_video_too() -> None:
    result = run(app, ["run", "--video", "https://example.com/x.mp4", "--question", "q"])
    assert "curl -L -o x.mp4 'https://example.com/x.mp4'" in str(result.exception)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--image", str(SCENE), "--question", "q"],
        ["show", "--image", str(SCENE)],
        ["heatmap", "--image", str(SCENE), "--signals", "keys:-1"],
        ["demo"],
        ["profile"],
        ["eval"],
    ],
    ids=lambda words: words[0],
)
def test_gpu_is_called_cuda(words: list[str]) -> None:
    error = run(app, [*words, "--device", "gpu"]).exception
    assert isinstance(error, OptionError)
    assert "Did you mean 'cuda'" in str(error)


def test_devices_and_dtypes() -> None:
    assert check_device("cpu").type == "cpu"
    with pytest.raises(OptionError, match="'cuda'"):
        check_device("cudaa")
    with pytest.raises(OptionError, match="unknown device"):
        check_device("meta")
    assert str(check_dtype("bf16")) == "torch.bfloat16"
    assert check_dtype("auto") is check_dtype(None) is None
    with pytest.raises(OptionError, match="float16"):
        check_dtype("float17")


def test_lists_of_methods() -> None:
    assert split_methods("quota+divprune") == split_methods(" quota , divprune ") == ["quota", "divprune"]
    assert split_methods("prumerge+") == ["prumerge_plus"]  # not PruMerge without its plus
    assert split_methods("quota+prumerge+") == ["quota", "prumerge_plus"]
    with pytest.raises(OptionError, match="no method is named"):
        split_methods("+")
    with pytest.raises(OptionError, match="divprune"):
        split_methods("tome+divprun")


def test_a_model_that_nobody_has_is_said_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.perf_counter()
    with pytest.raises(OptionError, match="its owner"):
        load("llava-1.5-7b-hf")
    with pytest.raises(OptionError, match="no folder"):
        load("./no/such/folder")
    for kind in ("model", "dataset"):
        with pytest.raises(
            OptionError, match=r"no-such-owner/none-at-all"
        ):  # by the hub, or because there is none here
            check_reachable("no-such-owner/none-at-all", kind=kind)
    assert time.perf_counter() - began < 60  # transformers retries for minutes


def test_without_the_hub_a_copy_on_this_machine_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever was set when the library was first imported
    with pytest.raises(OptionError, match=r"cannot be reached \(no route to host\).*hf download owner/name"):
        check_reachable("owner/name")
    with pytest.raises(OptionError, match="--repo-type dataset"):
        check_reachable("owner/name", kind="dataset")
    (tmp_path / "models--owner--name").mkdir()
    assert check_reachable("owner/name") == {"local_files_only": True}
    assert check_reachable(str(tmp_path)) == {}


def test_a_text_model_is_called_one(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    BertModel(small).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\n")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    bare = tmp_path / "bare"  # without a tokenizer transformers already fails at the processor
    small.save_pretrained(bare)
    for folder in (tmp_path, bare):
        with pytest.raises(OptionError, match="bert is no vision-language model") as caught:
            load(str(folder))
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("words", [["doctor", "--model"], ["plan", "--gpu", "a100", "--model"], ["profile", "--model"]])
def test_every_command_calls_a_text_model_one(words: list[str], tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig(hidden_size=8).save_pretrained(tmp_path)
    error = run(app, [*words, str(tmp_path)]).exception
    assert isinstance(error, OptionError)
    assert "bert is no vision-language model" in str(error)


def test_a_processor_that_needs_torchvision_says_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    def refuse(*arguments: object, **options: object) -> None:
        raise ImportError("Qwen2VLImageProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(MissingExtraError, match=re.escape(install_line("vision"))):
        load(str(tmp_path))


def test_json_goes_to_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--json -` is a pipe for other programs: the JSON alone, and no file of that name."""
    monkeypatch.chdir(tmp_path)
    words = ["run", "--image", str(SCENE), "--question", QUESTION, "--json", "-"]
    result = run(app, words)
    assert result.exception is None, result.exception
    assert json.loads(result.stdout)["type"] == "tokprune.run"
    assert "pink" in result.stderr
    result = run(app, ["demo", "--questions", "7", "--methods", "none", "--ratios", "1", "--json", "-"])
    assert json.loads(result.stdout)["questions"] == 7
    assert not Path("-").exists()


def tokprune(words: str, output: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m tokprune {words} {output}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_ends_in_a_sentence() -> None:
    done = tokprune("methods --json -", "> /dev/full")
    assert done.returncode == 2
    assert "cannot write the output: No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_reader_that_goes_away_is_no_error_to_talk_of() -> None:
    done = tokprune("methods --json -", "| head -c 10")
    assert done.stderr == ""


def test_quiet_shows_no_loading_bars(tmp_path: Path) -> None:
    few = "demo -q --questions 7 --methods none --ratios 1"
    done = tokprune(f"{few} --json {tmp_path / 'x.json'}", "")
    assert (tmp_path / "x.json").exists(), done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
