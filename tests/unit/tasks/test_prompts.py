"""Prompt files are read, or refused with file and line."""

import json

import pytest

from tl_loops import tasks
from tl_loops.tasks.prompts import PromptFileError, PromptText, from_task, read_prompts


def test_text_files_hold_one_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\n  second <b>\n", encoding="utf-8")
    assert read_prompts(file) == [PromptText("first"), PromptText("  second <b>")]


def test_json_lines_hold_prompts_questions_and_answers(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a", "answer": "b", "corrupted": "c"}, {"question": "q"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_prompts(file) == [PromptText("a", "b", "c"), PromptText("q")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{oops', r"p\.jsonl, line 2: not JSON"),
        ("p.jsonl", '["a"]', "line 1: expected an object, got list"),
        ("p.jsonl", '{"text": "a"}', "neither a 'prompt' nor a 'question'"),
        ("p.jsonl", '{"prompt": 3}', "'prompt' must be text, got 3"),
        ("p.jsonl", '{"prompt": "  "}', "'prompt' must be text"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PromptFileError, match=message):
        read_prompts(file)


def test_absent_files_and_directories(tmp_path):
    with pytest.raises(PromptFileError, match="no such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(PromptFileError, match="is a directory"):
        read_prompts(tmp_path)


def test_task_prompts_keep_answer_and_counterpart():
    prompt = tasks.fact_chain_prompts(1, n_hops=3, seed=4)[0]
    other = tasks.corrupt(prompt)
    assert from_task([prompt, prompt], [other]) == [
        PromptText(prompt.text, prompt.answer, other.text),
        PromptText(prompt.text, prompt.answer, None),
    ]


@pytest.mark.parametrize("inside", ["\x0c", "\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r"])
@pytest.mark.parametrize("as_json", [False, True])
def test_only_line_feeds_end_a_prompt(tmp_path, inside, as_json):
    texts = [f"one {inside} two", "three"]
    file = tmp_path / ("p.jsonl" if as_json else "p.txt")
    lines = [json.dumps({"prompt": t}, ensure_ascii=False) if as_json else t for t in texts]
    for end in ("\n", "\r\n"):
        for mark in ("", "\ufeff"):
            file.write_bytes((mark + end.join([*lines, ""])).encode())
            assert [p.text for p in read_prompts(file)] == texts
