"""What ``train`` was given: a corpus or data of one's own, and held-out batches, checked."""

from itertools import chain

import torch
from torch import Tensor

from tl_loops.layout.model import Model
from tl_loops.runs.identity import tensors_fingerprint
from tl_loops.training.corpus import Corpus, check_corpus
from tl_loops.training.data import TrainingBatch, TrainingData, draw_batch
from tl_loops.training.evaluation import held_out_contexts
from tl_loops.training.settings import TrainingSettings

_ROWS_IN_A_PASS = 16


def training_data(
    given: Tensor | TrainingData, settings: TrainingSettings, model: Model
) -> TrainingData:
    """The data of a run; a line of tokens becomes a corpus.

    Raises:
        ValueError: The corpus has no context of the model's tokens, or settings of a corpus stand
            beside data that are none.
    """
    if isinstance(given, Tensor):
        n_context = _context(settings, model, "data")
        check_corpus(given, n_context, model.cfg.d_vocab)
        return Corpus(given, n_context, settings.first_token)
    for name in ("n_context", "first_token"):
        if getattr(settings, name) is not None:
            raise ValueError(
                f"settings.{name}={getattr(settings, name)} says how a line of tokens is cut, but "
                f"data is {type(given).__name__}, which draws its own batches: leave it out"
            )
    if isinstance(given, Corpus):
        _check_length(given.n_context, model)
        check_corpus(given.tokens, given.n_context, model.cfg.d_vocab)
    return given


def held_out_batches(
    given: Tensor | TrainingData | None, settings: TrainingSettings, n: int, model: Model
) -> list[TrainingBatch]:
    """The batches of the evaluations, drawn from the seed of the run; none where none is given.

    Raises:
        ValueError: As :func:`training_data`.
    """
    if given is None:
        return []
    if isinstance(given, Tensor):
        n_context = _context(settings, model, "evaluation")
        check_corpus(given, n_context, model.cfg.d_vocab, "evaluation")
        return held_out_contexts(given, n_context, n, _ROWS_IN_A_PASS, settings.first_token)
    generator = torch.Generator().manual_seed(settings.seed)
    sizes = [min(_ROWS_IN_A_PASS, n - first) for first in range(0, n, _ROWS_IN_A_PASS)]
    return [draw_batch(given, size, generator, model) for size in sizes]


def batches_identity(batches: list[TrainingBatch]) -> str | None:
    """Hash of their tokens and targets."""
    if not batches:
        return None
    tensors = ((batch.tokens, batch.targets) for batch in batches)
    return tensors_fingerprint(chain.from_iterable(tensors))


def _context(settings: TrainingSettings, model: Model, name: str) -> int:
    if settings.n_context is None:
        raise ValueError(
            f"{name} is a line of tokens, which is cut into contexts of settings.n_context, and "
            "that is None: set it, or give TrainingData"
        )
    _check_length(settings.n_context, model)
    return settings.n_context


def _check_length(n_context: int, model: Model) -> None:
    if n_context > model.cfg.n_ctx:
        raise ValueError(f"n_context={n_context} is above the model's cfg.n_ctx={model.cfg.n_ctx}")
