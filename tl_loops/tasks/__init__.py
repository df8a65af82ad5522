"""Prompts: those of the embedded models' tasks, how answers are scored, and files of prompts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .fact_chain import (
    NAMES,
    FactChainTask,
    Prompt,
    Split,
    answer_after,
    corrupt,
    fact_chain_prompts,
    follow,
    question,
    sample_pair,
    sample_prompts,
    score,
    split_of,
    vocabulary,
)

if TYPE_CHECKING:
    from .data_sets import read_column, read_tokens

__all__ = [
    "NAMES",
    "FactChainTask",
    "Prompt",
    "Split",
    "answer_after",
    "corrupt",
    "fact_chain_prompts",
    "follow",
    "question",
    "read_column",
    "read_tokens",
    "sample_pair",
    "sample_prompts",
    "score",
    "split_of",
    "vocabulary",
]


def __getattr__(name: str) -> Any:
    # The tasks need nothing of the project; the reader of data sets does.
    if name in ("read_column", "read_tokens"):
        return getattr(import_module(f"{__name__}.data_sets"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
