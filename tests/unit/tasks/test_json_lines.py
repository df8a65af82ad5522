"""Odd lines in JSON lines files of prompts."""

import pytest

from tl_loops.tasks.prompts import PromptFileError, read_prompts

ODD = {
    "nested brackets": ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
    "nested lists": ('{"prompt": ' + "[" * 900 + "]" * 900 + "}", "must be text"),
    "half of a surrogate pair": ('{"prompt": "a \\ud800"}', "'prompt' holds half of a surrogate"),
    "half of one in the answer": ('{"prompt": "a", "answer": "\\udc00"}', "'answer' holds half"),
    "an endless number": ('{"prompt": ' + "9" * 10_000 + "}", "number is too long"),
    "a number": ('{"prompt": 7}', "must be text, got 7"),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_json_lines_are_refused_by_file_and_line(tmp_path, what):
    line, message = ODD[what]
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(PromptFileError, match=message) as error:
        read_prompts(file)
    assert f"{file}, line 2: " in str(error.value) and len(str(error.value)) < 400
    str(error.value).encode()


def test_labels_are_text(tmp_path):
    file = tmp_path / "prompts.jsonl"
    labels = ('"yes"', "1", "true", "null")
    file.write_text("\n".join(f'{{"prompt": "a", "label": {label}}}' for label in labels))
    assert [p.label for p in read_prompts(file)] == ["yes", "1", "true", None]
    file.write_text('{"prompt": "a", "label": 0.5}')
    with pytest.raises(PromptFileError, match=r"'label' must be text, got 0\.5"):
        read_prompts(file)


def test_a_whole_surrogate_pair_is_text(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "\\ud83d\\ude00"}')
    assert read_prompts(file)[0].text == "\U0001f600"
