"""From rows of a data set to prompts: media, questions, controls, and errors that name the row; no lmms-eval needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokprune.evaluation.errors import EvaluationError
from tokprune.evaluation.lmms_requests import MediaRules, RequestReader, TaskRow, question_of
from tokprune.testing import picture

DOCS: list[dict[str, Any]] = [{"image": picture(8, 8, seed=i), "question": f"what is {i} ?"} for i in range(4)]
DOCS.append({"image": DOCS[0]["image"], "question": "and again ?"})


def messages_of(doc: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"] + "\nOne word."}]
    return [{"role": "user", "content": parts}]


def reader(docs: list[dict[str, Any]] | None = None, **more: Any) -> RequestReader:
    rows = DOCS if docs is None else docs
    return RequestReader(lambda t, s, i: rows[i], lambda t, s: len(rows), lambda kind: MediaRules(4), **more)


def parts(prompt: Any, kind: str) -> list[Any]:
    return [p[kind] for m in prompt.chat for p in m["content"] if p["type"] == kind]


def test_a_row_becomes_a_chat_with_its_picture_and_question() -> None:
    prompt = reader().read(TaskRow("t", "test", 2), messages_of, {})
    assert prompt.kind == "image"
    assert prompt.query == "what is 2 ?"
    assert parts(prompt, "text") == ["what is 2 ?\nOne word."]
    assert np.array_equal(parts(prompt, "image")[0], DOCS[2]["image"])


def test_system_prompt_and_bare_questions() -> None:
    prompt = reader(system_prompt="Be brief.", bare=True).read(TaskRow("t", "test", 1), messages_of, {})
    assert [m["role"] for m in prompt.chat] == ["system", "user"]
    assert parts(prompt, "text") == ["Be brief.", "what is 1 ?"]
    assert len(parts(prompt, "image")) == 1


def test_control_without_pictures() -> None:
    prompt = reader(control="no_image").read(TaskRow("t", "test", 1), messages_of, {})
    assert prompt.kind == "text"
    assert parts(prompt, "image") == []


def test_control_with_the_picture_of_another_row() -> None:
    for doc_id in range(len(DOCS)):  # rows 0 and 4 show the same picture
        prompt = reader(control="shuffled").read(TaskRow("t", "test", doc_id), messages_of, {})
        shown = parts(prompt, "image")[0]
        assert not np.array_equal(shown, DOCS[doc_id]["image"])
        assert any(np.array_equal(shown, d["image"]) for d in DOCS)
        assert prompt.query == DOCS[doc_id]["question"]
    same = [DOCS[0], DOCS[4]]
    with pytest.raises(EvaluationError, match="show the same"):
        reader(same, control="shuffled").read(TaskRow("t", "test", 0), messages_of, {})


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Is it red?\nAnswer yes or no.", "Is it red?\nAnswer yes or no."),
        ("Select the best.\nWhat is it?\nA. cat\nB. dog\nAnswer with the letter.", "Select the best.\nWhat is it?"),
        ("What is it?\nOptions:\n(A) cat\n(B) dog", "What is it?"),
        ("A. only options\nB. here", "A. only options\nB. here"),
    ],
)
def test_the_question_is_what_stands_before_the_options(text: str, question: str) -> None:
    assert question_of({}, text) == question


def test_the_rows_own_question_is_preferred_where_the_prompt_contains_it() -> None:
    doc = {"question": "What   is it?\nA. cat\nB. dog", "answer": "A"}
    assert question_of(doc, "Choose. What is it? A. cat B. dog") == "What   is it?"
    assert question_of({"question": "not in it"}, "What is it?") == "What is it?"


def test_errors_name_the_row() -> None:
    empty = [*DOCS[:2], {"image": None, "question": "what ?"}]
    with pytest.raises(
        EvaluationError, match=r"task 'pope', doc_id 2: .*empty fields of this row: image.*no image"
    ) as caught:
        reader(empty).read(TaskRow("pope", "test", 2), messages_of, {})
    assert (caught.value.task, caught.value.doc_id) == ("pope", 2)

    def ends_the_program(doc: dict[str, Any]) -> Any:
        raise SystemExit("video path:x.mp4 does not exist")

    with pytest.raises(EvaluationError, match=r"doc_id 1: .*x\.mp4 does not exist"):
        reader().read(TaskRow("videomme", "test", 1), ends_the_program, {})


def test_missing_files_are_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "clip1.mp4").write_bytes(b"")
    DOCS[0]["image"].save(tmp_path / "a.png")

    def show(kind: str, name: str) -> Any:
        return lambda doc: [{"role": "user", "content": [{"type": kind, "url": str(tmp_path / name)}]}]

    with pytest.raises(EvaluationError, match=r"doc_id 3: cannot read its media: .*clip2\.mp4.*clip1\.mp4"):
        reader().read(TaskRow("t", "test", 3), show("video", "clip2.mp4"), {})
    with pytest.raises(EvaluationError, match=r"b\.png.*a\.png"):
        reader().read(TaskRow("t", "test", 3), show("image", "b.png"), {})
    assert parts(reader().read(TaskRow("t", "test", 3), show("image", "a.png"), {}), "image")[0].size == (8, 8)


def test_audio_is_refused() -> None:
    with pytest.raises(EvaluationError, match="audio input is not supported"):
        reader().read(
            TaskRow("t", "test", 0), lambda d: [{"role": "user", "content": [{"type": "audio", "url": "x"}]}], {}
        )


def test_neighbouring_rows_share_a_decoded_video(tmp_path: Path) -> None:
    pytest.importorskip("av")
    for i, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for frame in range(6):
            picture(16, 16, seed=10 * i + frame).save(tmp_path / name / f"{frame}.png")
    docs = [{"video": str(tmp_path / name), "question": "what ?"} for name in ("a", "a", "b")]

    def show(doc: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "video", "url": doc["video"]}]}]

    source = reader(docs)
    clips = [parts(source.read(TaskRow("t", "test", i), show, {}), "video")[0] for i in range(3)]
    assert clips[0] is clips[1]
    assert clips[2] is not clips[0]
    assert len(clips[0].frames) == 4
