"""Prompts from data sets: columns of texts and of token ids."""

import json

import pandas
import pytest

from tl_loops.cli import main
from tl_loops.measurements.profile import LoopProfile
from tl_loops.tasks.data_sets import read_column, read_tokens
from tl_loops.tasks.prompts import PromptFileError

TEXTS = ["What is 2 + 2 ?", "Who\u2028is it ?", "Why ?"]
IDS = [[1, 2, 3], [4], [5, 6]]
ROWS = [{"question": text, "ids": ids, "n": 1} for text, ids in zip(TEXTS, IDS, strict=True)]


@pytest.fixture(params=["rows.parquet", "lines.jsonl", "rows.json"])
def source(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".parquet":
        pandas.DataFrame(ROWS).to_parquet(path)
    elif path.name == "rows.json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    return path


def test_a_column_of_texts_or_of_ids(source):
    assert read_column(source, "question") == TEXTS
    assert read_column(source, "ids", limit=2) == IDS[:2]
    with pytest.raises(PromptFileError, match="no column 'questions': did you mean question"):
        read_column(source, "questions")
    with pytest.raises(PromptFileError, match="row 0: 'n' must be text or a list of token ids"):
        read_column(source, "n")
    with pytest.raises(ValueError, match="neither splits nor subsets"):
        read_column(source, "question", split="test")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read_column(source, "question", limit=0)


@pytest.mark.slow
def test_a_data_set_is_streamed(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "questions"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{**row, "question": f"{row['question']} {split}"} for row in ROWS]
        pandas.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    expected = [f"{text} test" for text in TEXTS]
    assert read_column(folder, "question", split="test") == expected
    assert read_column(folder, "ids", split="test", limit=2) == IDS[:2]
    with pytest.raises(PromptFileError, match="has the splits train, test: name one"):
        read_column(folder, "question")
    with pytest.raises(PromptFileError, match="cannot be opened"):
        read_column(tmp_path / "nowhere", "question")


@pytest.mark.parametrize("content", ["[1, 2]\n[3]\n", '{"tokens": [1, 2]}\n{"input_ids": [3]}\n'])
def test_prompts_that_are_tokenised(tmp_path, content):
    path = tmp_path / "tokens.jsonl"
    path.write_text(content)
    assert read_tokens(path) == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ("[1, 2]\n[]\n", r"prompt 2: expected a list of token ids, got \[\]"),
        ("[1, 2]\n[1.5]\n", "prompt 2"),
        ("[1, true]\n", "prompt 1"),
        ('{"text": "a"}\n', "prompt 1"),
        ("[1, 2]\nx\n", "line 2: not JSON"),
    ],
)
def test_files_without_ids_are_named(tmp_path, content, message):
    path = tmp_path / "tokens.jsonl"
    path.write_text(content)
    with pytest.raises(PromptFileError, match=message):
        read_tokens(path)


def test_the_command_line_reads_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pandas.DataFrame({"q": ["Ann likes Bob ."] * 3}).to_parquet("q.parquet")
    (tmp_path / "t.jsonl").write_text("[5, 6, 7]\n[5, 6]\n[6]\n")
    options = ["measure", "tl-loops-tiny", "--metrics", "residual_norm", "--quiet", "--limit", "2"]
    for more, bos in (
        (["--dataset", "q.parquet", "--column", "q"], "prepended"),
        (["--tokens", "t.jsonl"], "given"),
    ):
        assert main([*options, *more, "--n-iterations", "1", "--out", "p.csv"]) == 0
        assert LoopProfile.load("p.csv").provenance.bos == bos
        assert LoopProfile.load("p.csv").provenance.n_prompts == 2
    capsys.readouterr()
    for more, message in (
        (["--dataset", "q.parquet"], "--dataset NAME and --column NAME go together"),
        (["--tokens", "t.jsonl", "--prompts", "x"], "give one of --prompts and --tokens"),
        (["--tokens", "t.jsonl", "--split", "test"], "--split is about --dataset"),
    ):
        assert main([*options, *more]) == 2
        assert message in capsys.readouterr().err
