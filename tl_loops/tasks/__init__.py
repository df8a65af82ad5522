"""The embedded models' tasks: their prompts, and how answers are scored."""

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
    "sample_pair",
    "sample_prompts",
    "score",
    "split_of",
    "vocabulary",
]
