"""Train the embedded model ``tl-loops-text`` and save it with its tokenizer.

    apt-get install bible-kjv bible-kjv-text
    python demos/findings/train_text.py --out tl_loops/text

A looped language model of the shape (2, 4⊗4, 2)_I on the King James Bible of 1611, whose text is
in the public domain. Debian's package ``bible-kjv-text`` has the text, and ``bible-kjv`` prints it.
Every twentieth chapter is held out.

Two phases. In the first each step draws its number of iterations as Huginn does (log-normal
Poisson). In the second it is at least three, so that the iterations share the work, and half of the
contexts say one passage again and again: heads learn to copy from there, and rest on the first
token where there is nothing to copy. Gradients flow through the last four iterations. A run that is
killed goes on from its checkpoints when it is called again.
"""

import argparse
import json
import re
import subprocess
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.training import (
    Corpus,
    LogNormalPoissonIterations,
    TrainingBatch,
    TrainingData,
    TrainingSettings,
    UniformIterations,
    evaluate,
    train,
)

HELD_OUT = 20  # one chapter in so many
N_CONTEXT = 128
VOCABULARY = 1024
SPECIAL = ["<bos>", "<eos>", "<pad>"]
N_FIRST = 7_450
"""Steps of the first phase that are done, of the 10,000 over which its learning rate is planned."""


def chapters() -> list[str]:
    """The chapters of the King James Bible, one verse a line.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    printed = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
    ).stdout
    verses = [re.match(r"(\S+?):\d+ (.*)", line) for line in printed.splitlines()]
    found = [(verse[1], verse[2]) for verse in verses if verse]
    return ["\n".join(text for _, text in of) for _, of in groupby(found, key=lambda v: v[0])]


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Chapters to train on, and those that are held out."""
    held = texts[HELD_OUT - 1 :: HELD_OUT]
    return [text for i, text in enumerate(texts) if i % HELD_OUT != HELD_OUT - 1], held


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE that puts ``<bos>`` in front."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a tokenizer as transformers reads it."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": N_CONTEXT,
        "pad_token": "<pad>",
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts in one line of tokens, each followed by ``<eos>``."""
    ids = [[*of.ids, 1] for of in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return torch.tensor([token for text in ids for token in text])


def make_config(seed: int, injection: str | None = "concat") -> LoopedTransformerConfig:
    """The architecture: (2, 4⊗4, 2)_I with Llama-style blocks."""
    d_model, n_heads = 96, 4
    return LoopedTransformerConfig(
        model_name="tl-loops-text",
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=256,
        d_vocab=VOCABULARY,
        n_ctx=N_CONTEXT,
        n_prelude=2,
        n_core=4,
        n_coda=2,
        n_iterations=4,
        block_norm="pre",
        injection=injection,
        initial_state="normal" if injection else "embed",
        initial_state_std=0.02,
        tie_word_embeddings=True,
        state_seed=None if injection else 0,  # drawn afresh at every training step
        initializer_range=0.5 * d_model**-0.5,
        seed=seed,
        device="cpu",
    )


@dataclass(frozen=True, eq=False)
class RepeatedPassages:
    """Contexts of a corpus, half of which are one passage of 16 to 63 tokens, again and again.

    Attributes:
        corpus: Where contexts are drawn from; the first token of each stays.
    """

    corpus: Corpus

    def draw(self, n: int, generator: torch.Generator) -> TrainingBatch:
        """The first half of the batch repeats itself."""
        tokens = self.corpus.draw(n, generator).tokens.clone()
        lengths = torch.randint(16, 64, (n // 2,), generator=generator)
        places = torch.arange(tokens.shape[1] - 1)
        for row, length in zip(tokens, lengths, strict=False):
            row[1:] = row[1:][places % length].clone()
        return TrainingBatch.next_tokens(tokens)

    def identity(self) -> dict[str, Any]:
        """The corpus, and that passages are repeated."""
        return {**self.corpus.identity(), "repeated": [16, 63]}


def phases(seed: int, text: Corpus) -> list[tuple[TrainingData, TrainingSettings, int]]:
    """Data and settings of each phase, and how many steps of its plan are done."""
    both: dict[str, Any] = dict(
        batch_size=8,
        n_gradient=4,
        growth_weight=0.05,
        learning_rate=3e-3,
        warmup_steps=100,
        decay=0.5,
        weight_decay=0.05,
    )
    drawn = LogNormalPoissonIterations(mean=3.5, most=12)
    first = TrainingSettings(n_steps=10_000, iterations=drawn, seed=seed, **both)
    shared = UniformIterations(3, 6)
    second = TrainingSettings(n_steps=5_000, iterations=shared, seed=seed + 1, **both)
    return [(text, first, N_FIRST), (RepeatedPassages(text), second, second.n_steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tl-loops-text and save it.")
    parser.add_argument("--out", type=Path, required=True, help="directory to save into")
    parser.add_argument("--checkpoints", type=Path, help="directory to go on from")
    parser.add_argument("--seed", type=int, default=0, help="weights, contexts, initial states")
    parser.add_argument("--stop-after", type=int, help="at most so many steps of each phase")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    training, held = split(chapters())
    tokenizer = make_tokenizer(training)
    corpus, held_out = encode(tokenizer, training), encode(tokenizer, held)
    print(f"{len(corpus)} tokens to train on, {len(held_out)} held out")
    model = LoopedTransformer(make_config(options.seed))
    print(model.cfg.describe())
    began = time.monotonic()
    text, unseen = (Corpus(tokens, N_CONTEXT, first_token=0) for tokens in (corpus, held_out))
    for number, (data, settings, n_steps) in enumerate(phases(options.seed, text), start=1):
        checkpoint = options.checkpoints and options.checkpoints / f"phase{number}.ckpt"
        log = train(
            model,
            data,
            settings,
            evaluation=unseen,
            evaluate_every=1000,
            checkpoint=checkpoint,
            checkpoint_every=50,
            stop_after=min(n_steps, options.stop_after or n_steps),
        )
        print(log.evaluation_frame().pivot(index="step", columns="n_iterations", values="loss"))
    print(f"trained for {time.monotonic() - began:.0f} s in this process")

    model.cfg.state_seed = 0  # from here on the state is a function of the position
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    write_tokenizer(tokenizer, options.out)
    loaded = LoopedTransformer.from_pretrained_no_processing(str(options.out))
    numbers = (1, 2, 3, 4, 6, 8, 16)
    losses = evaluate(loaded, held_out, N_CONTEXT, numbers, n_contexts=64, first_token=0)
    n_bytes = sum(len(text.encode()) + 1 for text in held) / len(held_out)
    for n, loss in losses.items():
        print(f"| {n} | {loss:.3f} | {loss / 0.6931472 / n_bytes:.3f} |")


if __name__ == "__main__":
    main()
