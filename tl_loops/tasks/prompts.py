"""Prompts from files: text, or JSON lines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tl_loops.errors import shortened
from tl_loops.tasks.fact_chain import Prompt

SAMPLE = (
    "The capital of France is Paris, and the capital of Italy is",
    "If it rains the street gets wet. It rains, so the street gets",
    "Three plus four is seven, and seven plus two is",
    "Water boils when it is hot and freezes when it is",
    "Monday, Tuesday, Wednesday, Thursday,",
    "The cat sat on the mat because it was tired, and then the cat fell",
)
"""General prompts for models that have no task of their own."""

VERSES = (
    "In the beginning God created the heaven and the earth.",
    "And the king said unto his servants, Go ye unto the city",
    "The LORD is my shepherd; I shall not want.",
    "And it came to pass in those days, that there went out a decree",
    "Blessed are the poor in spirit: for theirs is the kingdom of heaven.",
    "Then answered the man of God, and said, Be it known unto you",
    "These are the names of the sons of Israel, which came into the land",
    "Vanity of vanities, saith the Preacher, vanity of vanities; all is vanity.",
    "Now when Jesus was born in Bethlehem of Judaea",
    "And David took the sword of the Philistine, and smote him",
    "The children of Levi, by their families, after the house of their fathers",
    "A soft answer turneth away wrath: but grievous words stir up anger.",
    "He that hath an ear, let him hear what the Spirit saith unto the churches.",
    "And Moses stretched forth his hand over the sea",
    "Thou shalt not covet thy neighbour's house.",
    "And the waters prevailed exceedingly upon the earth; and all the high hills were covered.",
)
"""Well-known verses of the King James Bible, which the embedded text model has read."""


class PromptFileError(ValueError):
    """A file of prompts cannot be read; the message names file and line."""


@dataclass(frozen=True)
class PromptText:
    """One prompt.

    Attributes:
        text: What the model reads.
        answer: The expected next word, where it is known.
        corrupted: A text of as many tokens whose answer differs, where there is one.
        label: What probes are to read of it, where that is asked.
    """

    text: str
    answer: str | None = None
    corrupted: str | None = None
    label: str | None = None


def from_task(prompts: Sequence[Prompt], corrupted: Sequence[Prompt] = ()) -> list[PromptText]:
    """Prompts of the embedded model's task, with their corrupted counterparts where given."""
    others: list[str | None] = [p.text for p in corrupted]
    others += [None] * (len(prompts) - len(others))
    return [PromptText(p.text, p.answer, o) for p, o in zip(prompts, others, strict=True)]


def read_prompts(path: str | Path) -> list[PromptText]:
    """Read prompts from a text file (one per line) or a JSON lines file.

    Args:
        path: A file; with the ending ``.jsonl`` or ``.json`` every line is an object with a
            ``prompt`` or ``question`` and, if known, an ``answer``, a ``corrupted`` prompt and a
            ``label`` (text, an integer or a boolean, taken as text). Empty lines are left
            out. Only LF and CR LF end a line; a byte-order mark at the start is skipped.

    Raises:
        PromptFileError: The file is absent, not UTF-8, empty, or a line is not as above.
    """
    path = Path(path)
    try:
        # As bytes: only LF and CR LF end a line. A form feed, U+0085 or U+2028 is part of a prompt,
        # and reading as text would turn a lone CR into a line feed.
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except FileNotFoundError:
        raise PromptFileError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise PromptFileError(f"{path} is a directory; give a file of prompts") from None
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise PromptFileError(f"{path}: {error.strerror}") from None
    as_json = path.suffix.lower() in (".jsonl", ".json")
    prompts = [
        _from_json(line, f"{path}, line {number}") if as_json else PromptText(line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise PromptFileError(f"{path}: holds no prompt")
    return prompts


def _from_json(line: str, where: str) -> PromptText:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptFileError(f"{where}: not JSON ({error.msg})") from None
    except RecursionError:
        raise PromptFileError(f"{where}: not JSON (its brackets are nested too deeply)") from None
    except ValueError:  # a number of thousands of digits
        raise PromptFileError(f"{where}: not JSON (a number is too long)") from None
    if not isinstance(entry, dict):
        raise PromptFileError(f"{where}: expected an object, got {type(entry).__name__}")
    text = entry.get("prompt", entry.get("question"))
    if text is None:
        raise PromptFileError(f"{where}: has neither a 'prompt' nor a 'question' field")
    label = entry.get("label")
    if isinstance(label, int):  # booleans are integers, too
        label = json.dumps(label)
    fields = {"prompt": text, "label": label}
    fields |= {name: entry.get(name) for name in ("answer", "corrupted")}
    for name, value in fields.items():
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise PromptFileError(f"{where}: {name!r} must be text, got {shortened(value)}")
        if value is not None and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise PromptFileError(
                f"{where}: {name!r} holds half of a surrogate pair (\\ud800 to \\udfff), "
                "which is no text"
            )
    return PromptText(text, fields["answer"], fields["corrupted"], label)
