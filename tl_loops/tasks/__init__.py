"""Prompts: those of the embedded models' tasks, how answers are scored, and files of prompts."""

from .data_sets import read_column, read_tokens
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
