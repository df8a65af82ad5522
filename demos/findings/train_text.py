"""Train the embedded model ``tl-loops-text`` and save it with its tokenizer.

    apt-get install bible-kjv bible-kjv-text
    python demos/findings/train_text.py --out tl_loops/text

A looped language model of the shape (2, 4⊗4, 2)_I on the King James Bible of 1611, whose text is
in the public domain. Debian's package ``bible-kjv-text`` has the text, and ``bible-kjv`` prints it.
Every twentieth chapter is held out.

Each step draws its number of iterations as Huginn does (log-normal Poisson); gradients flow through
the last four. The plan is 500 steps with a learning rate that falls from step 250 on; the model of
the package stopped after 400 of them, for want of time. A run that is killed goes on from its
checkpoint when it is called again.
"""

import argparse
import json
import re
import subprocess
import time
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.training import LogNormalPoissonIterations, TrainingSettings, evaluate, train

HELD_OUT = 20  # one chapter in so many
N_CONTEXT = 128
VOCABULARY = 1024
SPECIAL = ["<bos>", "<eos>", "<pad>"]


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tl-loops-text and save it.")
    parser.add_argument("--out", type=Path, required=True, help="directory to save into")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from")
    parser.add_argument("--seed", type=int, default=0, help="weights, contexts, initial states")
    parser.add_argument("--steps", type=int, default=500, help="of the plan")
    parser.add_argument("--stop-after", type=int, default=400, help="steps that are done")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    training, held = split(chapters())
    tokenizer = make_tokenizer(training)
    corpus, held_out = encode(tokenizer, training), encode(tokenizer, held)
    print(f"{len(corpus)} tokens to train on, {len(held_out)} held out")
    model = LoopedTransformer(make_config(options.seed))
    print(model.cfg.describe())
    settings = TrainingSettings(
        n_steps=options.steps,
        batch_size=options.batch_size,
        n_context=N_CONTEXT,
        first_token=0,
        iterations=LogNormalPoissonIterations(mean=3.5, most=12),
        n_gradient=4,
        growth_weight=0.05,
        learning_rate=options.lr,
        warmup_steps=100,
        decay=0.5,
        weight_decay=0.05,
        seed=options.seed,
    )
    began = time.monotonic()
    log = train(
        model,
        corpus,
        settings,
        evaluation=held_out,
        evaluate_every=200,
        checkpoint=options.checkpoint,
        checkpoint_every=50,
        stop_after=options.stop_after,
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
